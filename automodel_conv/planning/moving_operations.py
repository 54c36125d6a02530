"""Operations of torch that only move elements, as writes that a ``LoaderTrace`` records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from automodel_conv.planning.dispatched import on_meta
from automodel_conv.planning.known_indices import known_indices, without_known_masks

aten = torch.ops.aten


class Recorder(Protocol):
    """Records what operations do; ``LoaderTrace`` does."""

    def has_data(self, tensor: Tensor) -> bool:
        """Return whether a tensor has values."""
        ...

    def keep(self, tensor: Tensor) -> Any:
        """Note that the recorder has seen where a tensor was made."""
        ...

    def content(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
        """Return what a tensor contains, as the source of a write to elements of a dtype (None: of its own)."""
        ...

    def write(self, target: Tensor, source: Any) -> Tensor:
        """Record a write to a tensor; return the tensor."""
        ...

    def place(self, made: Tensor, device: torch.device | str | None) -> Tensor:
        """Remember the device of a new tensor without data (None: the CPU), and return the tensor."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """Record a copy, or do it if both tensors have data; return the target."""
        ...

    def fill(self, target: Tensor, value: float) -> Tensor:
        """Record that a tensor is filled, or do it if it has data; return the tensor."""
        ...

    def make(self, func: Any, value: float | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Run a function that makes a tensor of one value, or of none (None)."""
        ...

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that computes, or record that it does if it has no data."""
        ...


def _copy_(trace: Recorder, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return trace.copy(target, source)


def _foreach_copy_(
    trace: Recorder, func: Any, targets: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False
) -> None:
    for target, source in zip(targets, sources, strict=True):
        trace.copy(target, source)


def _clone(trace: Recorder, func: Any, tensor: Tensor, **kwargs: Any) -> Tensor:
    """Record ``clone``, or ``_to_copy``, which may also cast."""
    device = kwargs.get("device")
    if trace.has_data(tensor) and (device is None or torch.device(device).type == "cpu"):
        return func(tensor, **kwargs)
    if device is not None:
        kwargs["device"] = torch.device("meta")
    made = func(on_meta(tensor), **kwargs)
    return trace.place(trace.write(made, trace.content(tensor, made.dtype)), device)


def _cat(trace: Recorder, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    if all(map(trace.has_data, tensors)):
        return func(tensors, dim)
    joined = _joined(func, tensors, dim)
    start = 0
    for tensor in tensors:
        if tensor.dim() == joined.dim():  # torch leaves out tensors of shape [0]
            trace.copy(joined.narrow(dim, start, tensor.shape[dim]), tensor)
            start += tensor.shape[dim]
    return joined


def _joined(func: Any, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return the result of ``cat`` on the meta device.

    Only in unusual cases torch computes its form: that imports torch's compiler, which takes more than a second.
    """
    first = tensors[0]
    axis = dim % max(first.dim(), 1)
    others = {(t.dtype, t.dim(), *t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}
    if len(others) > 1 or not -first.dim() <= dim < first.dim() or first.dim() > 4:
        return func([on_meta(tensor) for tensor in tensors], dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _stack(trace: Recorder, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    if all(map(trace.has_data, tensors)):
        return func(tensors, dim)
    stacked = _joined(aten.cat.default, [on_meta(tensor).unsqueeze(dim) for tensor in tensors], dim)
    for index, tensor in enumerate(tensors):
        trace.copy(stacked.select(dim, index), tensor)
    return stacked


def _fill_(trace: Recorder, func: Any, target: Tensor, value: Any = 0) -> Tensor:
    """Record ``fill_`` with a number or a tensor, or ``zero_``."""
    if not isinstance(value, Tensor):
        return trace.fill(target, value)
    if not trace.has_data(value):
        return trace.copy(target, value)
    return trace.fill(target, value.to(target.dtype).item())  # a tensor is cast; a number must fit


def _empty(trace: Recorder, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return trace.make(func, None, args, kwargs)


def _zeros(trace: Recorder, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return trace.make(func, 0, args, kwargs)


def _ones(trace: Recorder, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return trace.make(func, 1, args, kwargs)


def _full(trace: Recorder, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return trace.make(func, args[-1], args, kwargs)


def _scalar(trace: Recorder, func: Any, value: float, **kwargs: Any) -> Tensor:
    return trace.make(func, value, (value,), kwargs)


def _pad(trace: Recorder, func: Any, tensor: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    if trace.has_data(tensor):
        return func(tensor, pad, value)
    padded = trace.fill(func(on_meta(tensor), pad, value), value)
    inner, outer = tensor, padded
    for index, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = tensor.dim() - 1 - index
        length = tensor.shape[dim] + min(before, 0) + min(after, 0)
        inner = inner.narrow(dim, max(-before, 0), length)
        outer = outer.narrow(dim, max(before, 0), length)
    trace.copy(outer, inner)
    return padded


def _repeat(trace: Recorder, func: Any, tensor: Tensor, repeats: Sequence[int]) -> Tensor:
    if trace.has_data(tensor):
        return func(tensor, repeats)
    if len(repeats) < tensor.dim() or any(count < 0 for count in repeats):
        return func(on_meta(tensor), repeats)  # raises torch's own error
    shape = (1,) * (len(repeats) - tensor.dim()) + tuple(tensor.shape)
    lengths = [count * size for count, size in zip(repeats, shape, strict=True)]
    repeated = torch.empty(lengths, dtype=tensor.dtype, device="meta")
    split = [size for pair in zip(repeats, shape, strict=True) for size in pair]
    inner = tensor.as_strided(
        [size for length in shape for size in (1, length)],
        [stride for own in (0,) * (len(repeats) - tensor.dim()) + tensor.stride() for stride in (0, own)],
    )
    trace.copy(repeated.view(split), inner)
    return repeated


def _index(trace: Recorder, func: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    if trace.has_data(tensor) and all(index is None or trace.has_data(index) for index in indices):
        return func(tensor, indices)
    known = None if trace.has_data(tensor) else known_indices(tensor, indices, trace.has_data)
    if known is None:
        return trace.run(func, (tensor, without_known_masks(indices, trace.has_data)), {})
    dim, shape = known.dim, known.shape
    result = torch.empty((*tensor.shape[:dim], *shape, *tensor.shape[dim + 1 :]), dtype=tensor.dtype, device="meta")
    trace.keep(result)
    flat = result.view(*tensor.shape[:dim], shape.numel(), *tensor.shape[dim + 1 :])
    for run in known.runs:
        trace.copy(flat.narrow(dim, run.start, run.count), run.of(tensor, dim))
    return result


def _index_select(trace: Recorder, func: Any, tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if trace.has_data(tensor) or not trace.has_data(index) or not tensor.dim():
        return trace.run(func, (tensor, dim, index), {})
    return _index(trace, aten.index.Tensor, tensor, [*[None] * (dim % tensor.dim()), index.reshape(-1)])


def _index_put_(
    trace: Recorder,
    func: Any,
    target: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> Tensor:
    on_host = trace.has_data(target) and trace.has_data(values)
    known = None if on_host or accumulate else known_indices(target, indices, trace.has_data)
    if known is None or len(known.shape) > 1:
        return trace.run(func, (target, indices, values, accumulate), {})
    dim = known.dim
    values = values.expand(*target.shape[:dim], *known.shape, *target.shape[dim + 1 :])
    values = values if known.shape else values.unsqueeze(dim)
    for run in known.runs:
        trace.copy(run.of(target, dim), values.narrow(dim, run.start, run.count))
    return target


def _index_copy_(trace: Recorder, func: Any, target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not target.dim():
        return trace.run(func, (target, dim, index, source), {})
    return _index_put_(
        trace, aten.index_put_.default, target, [*[None] * (dim % target.dim()), index.reshape(-1)], source
    )


def _into(func: Any, record: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what records the variant of an operation that writes to a given tensor (``out=``)."""

    def write(trace: Recorder, variant: Any, *args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        made = record(trace, func, *args, **kwargs)
        if made.shape != out.shape:
            trace.run(aten.resize_.default, (out, made.shape), {})
        return trace.copy(out, made)

    return write


def _with_out(movers: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Return operations with their variants that write to a given tensor, if they write all of it."""
    variants = {}
    for func, record in movers.items():
        for name in func.overloadpacket.overloads():
            variant = getattr(func.overloadpacket, name)
            arguments = variant._schema.arguments
            if arguments and arguments[-1].is_out and record is not _empty:
                variants[variant] = _into(func, record)
    return {**movers, **variants}


_MOVERS: Mapping[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy_,
    aten._foreach_copy_.default: _foreach_copy_,
    aten.clone.default: _clone,
    aten._to_copy.default: _clone,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.fill_.Scalar: _fill_,
    aten.fill_.Tensor: _fill_,
    aten.zero_.default: _fill_,
    aten.empty.memory_format: _empty,
    aten.empty_strided.default: _empty,
    aten.empty_like.default: _empty,
    aten.new_empty.default: _empty,
    aten.new_empty_strided.default: _empty,
    aten.zeros.default: _zeros,
    aten.zeros_like.default: _zeros,
    aten.new_zeros.default: _zeros,
    aten.ones.default: _ones,
    aten.ones_like.default: _ones,
    aten.new_ones.default: _ones,
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.new_full.default: _full,
    aten.scalar_tensor.default: _scalar,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_put_.default: _index_put_,
    aten.index_copy_.default: _index_copy_,
}
MOVERS: Mapping[Any, Callable[..., Any]] = _with_out(_MOVERS)
"""Operations by what records them; a function is called with the trace, the operation and its arguments."""

FACTORIES = frozenset(func for func, record in _MOVERS.items() if record in (_empty, _zeros, _ones, _full, _scalar))
"""Operations that make a tensor of one value, or of none."""
