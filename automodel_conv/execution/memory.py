"""The executor of conversions in memory: it fills buffers from source tensors on the same device in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import BufferCopies, checked_buffer, dtype_of, fill_constants, span_bytes
from automodel_conv.execution.copy_batch import CopyBatch, uses_kernels
from automodel_conv.execution.fallbacks import fallback_calls, run_fallback
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan

# ``max_work`` of ``np.shares_memory``: a few milliseconds. Beyond it, tensors count as not sharing memory.
_MOST_WORK = 100_000


def convert_tensors(
    plan: CopyPlan, sources: Sequence[Tensor], buffers: Mapping[str, Tensor], *, backend: str = "torch"
) -> CopyCounts:
    """Fill the buffers of all targets of a plan from source tensors.

    This allocates only three things: a contiguous copy of each source whose strides the copies cannot follow, the
    memory that transformers' own code needs for its targets, and a small table of addresses for each kernel.

    Args:
        plan: the plan to execute.
        sources: source tensors by row of the plan's sources, with any strides. Rows that no target reads are ignored.
        buffers: buffers by target name, with the target's shape and dtype and any strides. Written in place. The
            buffer of a target that is a whole source, unchanged, may be the source itself: nothing is copied then.
        backend: "torch", "triton" or "auto". "triton" runs kernels, and torch for the copies that no kernel supports.
            "auto" is "triton" if kernels run on the tensors' device, which they do not on a CPU.

    Returns:
        The numbers of copies that kernels and torch executed.

    Raises:
        ConversionError: a source or a buffer does not fit, or a buffer shares memory with a source or another buffer.
            Two names of one tensor may share it, if both targets are the same function of the same sources. Raised
            before anything is written.
        UnsupportedError: torch does not have a dtype, copies cannot follow the strides of a buffer, or the backend is
            "triton" and kernels cannot reach the tensors.
    """
    rows = sorted(plan.used_sources)
    tensors = {row: _checked_source(plan, row, sources[row]) for row in rows}
    outputs = [checked_buffer(target, buffers) for target in plan.targets]
    read = [_Operand(plan.sources.names[row], tensor, None) for row, tensor in tensors.items()]
    # A buffer that is its own source is not written, so it counts only as a source in the check of shared memory.
    to_write = [
        (target, output)
        for target, output in zip(plan.targets, outputs, strict=True)
        if not (is_unchanged(plan, target) and _is_same_tensor(output, tensors[target.sources[0]]))
    ]
    _raise_if_memory_is_shared([*read, *(_Operand(t.name, output, t) for t, output in to_write)], tensors)
    use_kernels = uses_kernels(backend, [*tensors.values(), *outputs])
    copies_for = BufferCopies()
    copies_by_target = [copies_for(target, output) for target, output in to_write]
    batch = CopyBatch()
    for (target, output), copies in zip(to_write, copies_by_target, strict=True):
        if output.numel() and target.fallback is None:
            copies, reads = with_source_strides(copies, [tensors[row] for row in target.sources])
            for copy in copies:
                batch.add(copy, reads, output)
            fill_constants(target, output)
    counts = batch.run(use_kernels)
    for call in fallback_calls(plan):
        run_fallback(call, {row: tensors[row] for row in call.rows}, buffers)
    return counts


def is_unchanged(plan: CopyPlan, target: Target) -> bool:
    """Whether the target is one whole source, unchanged."""
    if len(target.sources) != 1 or target.fallback is not None:
        return False
    row = target.sources[0]
    return target.is_whole and (plan.sources.dtypes[row], plan.sources.shapes[row]) == (target.dtype, target.shape)


def _is_same_tensor(buffer: Tensor, source: Tensor) -> bool:
    """Whether both are the same elements in the same memory, so that a copy would change nothing."""
    views = [(_memory_key(t), t.device, t.is_conj(), t.is_neg()) for t in (buffer, source)]
    return views[0] == views[1]


def _checked_source(plan: CopyPlan, row: int, tensor: Tensor) -> Tensor:
    name, read_as = plan.sources.names[row], (plan.sources.dtypes[row], plan.sources.shapes[row])
    code, shape = plan.sources.stored.get(row, read_as)
    dtype = dtype_of(code, name)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ConversionError(
            message(
                f"{name} does not match the plan",
                expected=f"{dtype} {list(shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        )
    tensor = tensor.detach()
    if row not in plan.sources.stored:
        return tensor
    code, shape = read_as
    return tensor.reshape(-1).view(dtype_of(code, name)).view(shape)


class _Operand(NamedTuple):
    """A source or a buffer of a conversion."""

    name: str
    tensor: Tensor
    """The memory to read or to write."""
    target: Target | None
    """The target that the buffer is for; None for a source."""

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def stop(self) -> int:
        return self.start + span_bytes(self.tensor)


def _raise_if_memory_is_shared(operands: Iterable[_Operand], sources: Mapping[int, Tensor]) -> None:
    """Raise ConversionError if a buffer shares a byte with a source or another buffer: the result would be undefined.

    numpy decides exactly whether two tensors have a byte in common, because views may alternate within one storage, as
    columns of a matrix do. Pairs that need more than ``_MOST_WORK`` steps, as some strides do, count as not sharing
    memory. Tied weights are accepted: two names of one tensor that are computed from the same memory in the same way.

    Not detected: memory that is reached under two addresses or on two devices, and elements of one buffer that overlap.
    """
    # Open operands are those that extend beyond the start of the next operand.
    open_by_device: dict[torch.device, list[_Operand]] = {}
    for operand in sorted((o for o in operands if o.tensor.numel()), key=lambda o: o.start):
        device = operand.tensor.device
        others = [o for o in open_by_device.get(device, []) if o.stop > operand.start]
        for other in others:
            if (operand.target or other.target) and share_bytes(operand.tensor, other.tensor):
                _raise_unless_tied(operand, other, sources)
        open_by_device[device] = [*others, operand]


def share_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have a byte in common; False if that takes too long to find out."""
    try:
        # numpy's stub allows only two values of ``max_work``.
        return np.shares_memory(_address_array(first), _address_array(second), max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _address_array(tensor: Tensor) -> np.ndarray:
    """Return an array at the addresses of a tensor on any device; for comparing addresses, never for reading."""
    size = tensor.element_size()
    holder = SimpleNamespace(
        __array_interface__={
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }
    )
    return np.asarray(holder)


def _raise_unless_tied(first: _Operand, second: _Operand, sources: Mapping[int, Tensor]) -> None:
    if first.target is None or second.target is None:
        source, buffer = (first, second) if first.target is None else (second, first)
        what = f"the buffer of {buffer.name} overlaps the memory of the source {source.name}"
        do = "pass a buffer of its own, as torch.empty_like() creates; only an unchanged target may be its source"
    elif _memory_key(first.tensor) == _memory_key(second.tensor) and (
        _computation_key(first.target, sources) == _computation_key(second.target, sources)
    ):
        return
    else:
        what = "the buffers of {} and {} share memory".format(*sorted((first.name, second.name)))
        do = "pass buffers that share no memory"
    raise ConversionError(message(what, do=do))


def _computation_key(target: Target, sources: Mapping[int, Tensor]) -> tuple[object, ...]:
    return target.fallback, target.copies, [_memory_key(sources[row]) for row in target.sources]


def _memory_key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def with_source_strides(
    copies: Sequence[StridedCopy], sources: Sequence[Tensor]
) -> tuple[Sequence[StridedCopy], Sequence[Tensor]]:
    """Return copies that read the sources with their actual strides, and the sources to read.

    A source is replaced by a contiguous copy only if the copies cannot follow its strides.
    """
    if all(source.is_contiguous() for source in sources):
        return copies, sources
    sources = list(sources)
    pieces: dict[int, list[Piece]] = {}
    for copy in copies:
        for piece in copy.pieces():
            pieces.setdefault(piece.source, []).append(piece)
    for ordinal, reads in pieces.items():
        source = sources[ordinal]
        if not source.is_contiguous():
            shape = tuple(source.shape)
            to_contiguous = Piece(ordinal, Box(shape, source.stride(), contiguous_strides(shape)), 0, 0)
            try:
                pieces[ordinal] = chain([to_contiguous], reads, source.numel())
            except NotAffine:
                sources[ordinal] = source.contiguous()
    return group_pieces(piece for reads in pieces.values() for piece in reads), sources
