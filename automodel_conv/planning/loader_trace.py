"""Record what loading code writes: a dispatch mode under which tensors without data tell every copy.

On the meta device nothing is computed, but every view keeps its storage, offset and strides. So a copy is known as two
views of storages. ``traced_copies.py`` composes the recorded writes to copies from sources to targets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.planning.dispatched import (
    elementwise,
    is_composite,
    made_on_meta,
    mutated_by,
    needs_values,
    on_meta,
    returned_by,
    tensors_in,
)
from automodel_conv.planning.hidden_data import CPU, Addresses
from automodel_conv.planning.loader_writes import (
    OWN_VALUES,
    UNSEEN,
    Computed,
    Constant,
    NeedsValues,
    View,
    Write,
    key_of,
    view_of,
)
from automodel_conv.planning.moving_operations import MOVERS

aten = torch.ops.aten

_OF_INDICES = (torch.bool, torch.int32, torch.int64)
_MOST_BYTES = 1 << 16
"""Most bytes of a small tensor of numbers."""
_CHANGED_VIEW = "the loading code views elements as their negatives or conjugates"


class LoaderTrace(TorchDispatchMode):
    """Records writes while it is active.

    Tensors on the meta device have no data. Writes to them, to targets, and of tensors without data are recorded, but
    not done. All other operations run as usual, so that indices have their values.

    Args:
        targets: tensors that loading code fills, with or without data. They are not changed.
        stand_ins: key of the storage that stands in for that of a target, by the target's.
        sources: keys of the storages of sources that have data. What is copied from them is recorded as computed.
        values: targets, or what stands in for them, whose values loading code reads and changes.
        fills_large: whether large tensors of numbers that loading code makes have data, not only indices and small
            ones. They would take as much memory as the targets.
    """

    def __init__(
        self,
        targets: Iterable[Tensor] = (),
        stand_ins: Mapping[int, int] | None = None,
        sources: Collection[int] = (),
        values: Iterable[Tensor] = (),
        fills_large: bool = False,
    ):
        super().__init__()
        self._stand_ins = dict(stand_ins or {})
        self._sources = frozenset(sources)
        self._fills_large = fills_large
        self.writes: list[Write] = []
        """The writes, in order."""
        self.nbytes: dict[int, int] = {}
        """Bytes of each storage, by key."""
        self._kept: list[Tensor] = []
        self._without_data: set[int] = set()
        self._seen: set[int] = set()
        """Storages that were made where the trace sees it."""
        self._uniform: dict[int, int | None] = {}
        """For storages with data that consist of one repeated value: its bytes; None: nothing is written yet."""
        self._escaped: set[int] = set()
        """Storages with data that others than torch may write to."""
        self._devices: dict[int, torch.device] = {}
        """The device that loading code would find a storage without data on, by its key, unless that is the CPU."""
        self._addresses = Addresses()
        self._lock = RLock()
        for target in targets:
            storage = self.keep(target).storage
            self._without_data.add(key_of(target))
            if not target.is_meta or storage not in self._devices:
                self._devices[storage] = target.device
        for target in values:
            key = self.keep(target).storage
            self._uniform[key], self._sources = None, self._sources | {key}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that nothing is compiled here, so that it does not import its compiler."""
        return False

    def keep(self, tensor: Tensor) -> View:
        """Keep a tensor, whose storage the trace knows from now on; return its view."""
        view = self._look_at(tensor)
        self._seen.add(view.storage)
        return view

    def _look_at(self, tensor: Tensor) -> View:
        """Return the view of a tensor, and hold the tensor, so that no other storage gets its key."""
        self._kept.append(tensor)
        view = view_of(tensor)
        if view.storage in self._stand_ins:
            view = view._replace(storage=self._stand_ins[view.storage])
        self.nbytes[view.storage] = max(self.nbytes.get(view.storage, 0), tensor.untyped_storage().nbytes())
        return view

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        mover = MOVERS.get(func)
        with self._lock, torch._C.DisableTorchFunction():  # no answers for loading code here
            return self.run(func, args, kwargs) if mover is None else mover(self, func, *args, **kwargs)

    def has_data(self, tensor: Tensor) -> bool:
        """Return whether a tensor has values, which loading code has given it."""
        return not tensor.is_meta and key_of(tensor) not in self._without_data

    def device_of(self, tensor: Tensor) -> torch.device:
        """Return the device that loading code would find a tensor on if it ran on sources with data."""
        return self._devices.get(key_of(tensor), CPU) if tensor.is_meta else tensor.device

    def write(self, target: Tensor, source: View | Constant | Computed) -> Tensor:
        """Record a write to a tensor, which has no data from now on; return the tensor."""
        if self.has_data(target):
            self._forget_data(target)
        if key_of(target) not in self.nbytes:
            made_from = (source,) if isinstance(source, View) else getattr(source, "inputs", ()) or ()
            self.place(target, next((self._devices.get(view.storage) for view in made_from), None))
        view = self.keep(target)
        if _is_changed_view(target):
            source = Computed(_CHANGED_VIEW, (source,) if isinstance(source, View) else getattr(source, "inputs", ()))
        self.writes.append(Write(view, source))
        return target

    def place(self, made: Tensor, device: torch.device | str | None) -> Tensor:
        """Remember the device of a new tensor without data (None: the CPU), and return the tensor."""
        if device is not None:
            self._devices[self.keep(made).storage] = torch.device(device)
        return made

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """Record a copy, or do it if both tensors have data; return the target."""
        if self.has_data(target) and self.has_data(source):
            self._uniform.pop(key_of(target), None)
            return aten.copy_.default(target, source)
        return self.write(target, self.content(source.expand(target.shape), target.dtype))

    def fill(self, target: Tensor, value: float) -> Tensor:
        """Record that a tensor is filled, or do it if it has data; return the tensor."""
        if not self.has_data(target):
            return self.write(target, Constant(value))
        if not target.numel():
            return target
        key, itemsize = key_of(target), target.element_size()
        before = _first_bytes(target)
        aten.fill_.Scalar(target, value)
        if target.numel() * itemsize == target.untyped_storage().nbytes() and key not in self._escaped:
            self._uniform[key] = itemsize
        elif self._uniform.get(key) != itemsize or before != _first_bytes(target):
            self._uniform.pop(key, None)
        return target

    def make(self, func: Any, value: float | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Run a function that makes a tensor of one value, or of none (None); it has data only on the CPU."""
        like = next((leaf for leaf in args if isinstance(leaf, Tensor)), None)
        device = kwargs.get("device") or ("cpu" if like is None else like.device)
        made = made_on_meta(func, args, kwargs)
        is_small = made.dtype in _OF_INDICES or made.nbytes <= _MOST_BYTES
        if torch.device(device).type == "cpu" and (is_small or self._fills_large):
            made = func(*args, **{**kwargs, "device": CPU})
            key = self.keep(made).storage
            self._uniform[key] = None if value is None else made.element_size()
            return made
        self.keep(made)
        self.place(made, kwargs.get("device") or (None if like is None else self._devices.get(key_of(like))))
        return made if value is None else self.write(made, Constant(value))

    def content(self, tensor: Tensor, dtype: torch.dtype | None = None) -> View | Constant | Computed:
        """Return what a tensor contains, as the source of a write to elements of a dtype (None: of its own)."""
        view = self._look_at(tensor)
        if not self.has_data(tensor):
            if view.storage not in self._seen:
                return UNSEEN
            return Computed(_CHANGED_VIEW, (view,)) if _is_changed_view(tensor) else view
        if view.storage in self._sources:
            return Computed("the loading code reads values", (view,))
        itemsize = self._uniform.get(view.storage)
        is_uniform = itemsize is not None and view.dtype.itemsize % itemsize == 0
        return _constant(tensor, dtype or view.dtype) if is_uniform or not any(view.strides) else OWN_VALUES

    def is_unwritten(self, tensor: Tensor) -> bool:
        """Return whether a tensor with data is as it was when the trace was told that nothing is written to it."""
        return self.has_data(tensor) and self._uniform.get(key_of(tensor), 0) is None

    def escapes(self, tensor: Tensor) -> None:
        """Take into account that others than torch, such as NumPy, may write to a tensor from now on."""
        self._uniform.pop(key_of(tensor), None)
        self._escaped.add(key_of(tensor))

    def address(self, tensor: Tensor) -> int:
        """Return what stands for the address of a tensor without data."""
        return self._addresses.of(tensor)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that computes, or record that it does if it has no data."""
        tensors = tensors_in((args, kwargs))
        without = [tensor for tensor in tensors if not self.has_data(tensor)]
        if torch.Tag.inplace_view in func.tags:
            return self._change(func, args, kwargs, tensors)
        mutated = tensors_in(mutated_by(func, args, kwargs))
        if not without:
            for tensor in mutated if func.namespace == "aten" else tensors:  # others may not tell what they write to
                self._uniform.pop(key_of(tensor), None)
            result = func(*args, **kwargs)
            for tensor in tensors_in(result):
                if tensor.is_meta:
                    self.write(self.place(tensor, kwargs.get("device")), OWN_VALUES)
            return result
        name = str(func).removesuffix(".default")
        inputs = tuple(map(self._look_at, without))
        if needs_values(func, args):
            raise NeedsValues(name, inputs)
        if mutated:
            if func._schema.arguments[-1].is_out:
                self._resize(func, args, kwargs)
            for tensor in mutated:
                self.write(tensor, Computed(name, inputs))
            return returned_by(func, mutated)
        device = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
        args, kwargs = pytree.tree_map_only(Tensor, on_meta, (tuple(args), {**kwargs, **device}))
        try:
            result = elementwise(func, args, kwargs)
            result = func(*args, **kwargs) if result is None else result
        except NotImplementedError as error:
            raise NeedsValues(f"{name}: {error}", inputs) from error
        storages = set(map(key_of, without))
        for tensor in tensors_in(result):
            if key_of(tensor) not in storages:
                self.write(tensor, Computed(name, inputs))
        return result

    def _resize(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Give the tensors that an operation writes its results to (``out=``) their shapes, as torch does."""
        given = pytree.tree_map_only(Tensor, on_meta, (tuple(args), dict(kwargs)))
        func(*given[0], **given[1])
        for tensor, meta in zip(mutated_by(func, args, kwargs), mutated_by(func, *given), strict=True):
            if tensor.shape != meta.shape:
                self._change(aten.resize_.default, (tensor, meta.shape), {}, [tensor])

    def _change(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """Run an operation that changes the shape, strides or storage of a tensor, and no elements."""
        without = [self._look_at(tensor) for tensor in tensors if tensor.is_meta]
        if without and len(without) < len(tensors):
            raise NeedsValues(str(func), without)
        for tensor in tensors:
            self._uniform.pop(key_of(tensor), None)
        result = func(*args, **kwargs)
        self._look_at(args[0])
        return result

    def _forget_data(self, tensor: Tensor) -> None:
        """Record what the storage of a tensor with data contains; it has no data from now on."""
        key = key_of(tensor)
        if not self.is_unwritten(tensor):
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            whole = View(key, tensor.dtype, 0, (size,), (1,))
            self.writes.append(Write(whole, self.content(tensor.as_strided((size,), (1,), 0))))
        self._without_data.add(key)


def _is_changed_view(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor are the negatives or conjugates of those in its storage."""
    return tensor.is_neg() or tensor.is_conj()


def _constant(tensor: Tensor, dtype: torch.dtype) -> Constant | Computed:
    """Return what a tensor of equal elements contains, cast to a dtype."""
    if not tensor.numel():
        return Constant(0)
    value = tensor.flatten()[0].item()
    if value != value:
        value = float("nan")  # without the bits that a NaN may carry
    if isinstance(value, complex) or _first_bytes(torch.tensor([value], dtype=tensor.dtype)) != _first_bytes(tensor):
        return OWN_VALUES
    return Constant(value if dtype == tensor.dtype else torch.tensor(value, dtype=tensor.dtype).to(dtype).item())


def _first_bytes(tensor: Tensor) -> list[int]:
    return tensor.flatten()[0].resolve_neg().resolve_conj().reshape(1).view(torch.uint8).tolist()
