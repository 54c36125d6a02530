"""Run loading code for some of its targets only: a dispatch mode under which all other tensors have no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.planning.dispatched import is_composite, mutated_by, returned_by, tensors_in
from automodel_conv.planning.hidden_data import CPU, DEVICES, SET_DATA, Addresses
from automodel_conv.planning.loader_writes import key_of
from automodel_conv.planning.moving_operations import FACTORIES


class PartOfLoader(TorchDispatchMode):
    """Runs operations on tensors with data; those without data are neither read nor written.

    Sources and targets that are not needed are on the meta device. Tensors that loading code makes have data, and those
    that it makes of tensors without data only have none.

    Args:
        targets: keys of the storages of the targets that are needed.
    """

    def __init__(self, targets: Collection[int]):
        super().__init__()
        self._targets = targets
        self.lacks_data = False
        """Whether something without data was written to a target that is needed, or to what is read later."""
        self._same: dict[int, int] = {}
        """For storages without data that are one with data for the loading code: that one."""
        self._outdated: set[int] = set()
        """Storages with data whose elements the loading code has changed through a tensor without data."""
        self._unknown: set[int] = set()
        """Storages with data some of whose elements come from tensors without data, and are anything."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that nothing is compiled here, so that it does not import its compiler."""
        return False

    def lacks(self, tensor: Tensor) -> None:
        """Take into account that something without data is written to a tensor."""
        key = key_of(tensor)
        self.lacks_data |= key in self._targets
        if key in self._same:
            self._outdated.add(self._same[key])
        if not tensor.is_meta:
            self._unknown.add(key)

    def _spread(self, tensors: Sequence[Tensor], mutated: Sequence[Tensor], result: Any, is_unknown: bool) -> None:
        """Take into account which tensors an operation makes of unknown elements, and which of others."""
        keys = set(map(key_of, tensors))
        is_unknown = is_unknown or not keys.isdisjoint(self._unknown)
        for made in {key_of(tensor) for tensor in tensors_in(result) if not tensor.is_meta} - keys:
            self._unknown.add(made) if is_unknown else self._unknown.discard(made)
        for tensor in mutated if is_unknown else ():
            self.lacks(tensor)

    def without_data(self, tensor: Tensor) -> Tensor:
        """Return a tensor without data that shares the memory of a tensor for the loading code."""
        made = tensor.to("meta")
        self._same[key_of(made)] = key_of(tensor)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        without = [tensor for tensor in tensors if tensor.is_meta]
        self.lacks_data |= bool(self._outdated) and any(key_of(tensor) in self._outdated for tensor in tensors)
        if func in FACTORIES:
            if without or torch.device(kwargs.get("device") or "cpu").type == "meta":
                kwargs["device"] = torch.device("cpu")
            made = func(*args, **kwargs)
            self._unknown.discard(key_of(made))
            return made
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        mutated = tensors_in(mutated_by(func, args, kwargs))
        if not without:
            result = func(*args, **kwargs)
            if self._unknown:
                self._spread(tensors, mutated, result, is_unknown=False)
            return result
        if mutated:
            for tensor in mutated:
                self.lacks(tensor)
            return returned_by(func, mutated)
        if len(without) == len(tensors):
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
            return func(*args, **kwargs)
        like = next(tensor for tensor in tensors if not tensor.is_meta)
        filled = pytree.tree_map_only(Tensor, lambda tensor: _filled_up(tensor, like), (tuple(args), kwargs))
        result = func(*filled[0], **filled[1])
        self._spread(tensors, (), result, is_unknown=True)
        return result


class PartOfFunctions(TorchFunctionMode):
    """Does for a ``PartOfLoader`` what no dispatch mode is asked.

    Args:
        mode: the mode.
    """

    def __init__(self, mode: PartOfLoader):
        super().__init__()
        self._mode = mode
        self._addresses = Addresses()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DEVICES and args[0].is_meta:
            return DEVICES[func](CPU)
        if func == Tensor.data_ptr and args[0].is_meta:
            return self._addresses.of(args[0])
        if func == SET_DATA and args[0].is_meta != args[1].is_meta:
            if args[1].is_meta:
                self._mode.lacks(args[0])
                args = args[0], _filled_up(args[1], args[0])
            else:
                args = args[0], self._mode.without_data(args[1])
        return func(*args, **(kwargs or {}))


def _filled_up(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with data, whatever it is, in place of one without."""
    if not tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=like.device)
