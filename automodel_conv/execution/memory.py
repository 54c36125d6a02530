"""From tensors to tensors on the device they are on: the same plan, with no file in sight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import BufferCopies, checked_buffer, dtype_of, span_bytes
from automodel_conv.execution.copy_batch import CopyBatch, takes_kernels
from automodel_conv.execution.fallbacks import fallback_calls, run_fallback
from automodel_conv.execution.stats import Work
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan

# ``max_work`` of ``np.shares_memory``, which takes milliseconds; beyond it, tensors count as apart.
_MOST_WORK = 100_000


def convert_tensors(
    plan: CopyPlan, sources: Sequence[Tensor], buffers: Mapping[str, Tensor], *, backend: str = "torch"
) -> Work:
    """Fill the buffers of all targets of a plan from tensors.

    Allocates nothing, but a contiguous copy of a source whose strides the copies cannot follow, what
    upstream's own code allocates for its targets, and a small table of addresses for each kernel.

    Args:
        sources: by row of the plan's sources, any strides; rows that no target takes are ignored.
        buffers: by target name, of the target's shape and dtype, any strides. Written in place.
        backend: "torch"; "triton": kernels, but torch, counted, for the copies that none fits; "auto":
            "triton" where kernels run on the tensors' device, which on a CPU they do not.

    Raises:
        ConversionError: a source or a buffer does not fit, or a buffer shares memory with a source or with another
            buffer (two names of one tensor may, if one tensor is what they are made of); before anything is written.
        UnsupportedError: a dtype that torch does not know, strides that copies cannot follow, or
            "triton" for tensors that kernels cannot reach.
    """
    rows = sorted(plan.used_sources)
    tensors = {row: _checked_source(plan, row, sources[row]) for row in rows}
    outputs = [checked_buffer(target, buffers) for target in plan.targets]
    read = [_Operand(plan.sources.names[row], tensor, None) for row, tensor in tensors.items()]
    written = [_Operand(target.name, output, target) for target, output in zip(plan.targets, outputs, strict=True)]
    _refuse_shared_memory([*read, *written], tensors)
    use_kernels = takes_kernels(backend, [*tensors.values(), *outputs])
    copies_for = BufferCopies()
    aimed = [copies_for(target, output) for target, output in zip(plan.targets, outputs, strict=True)]
    batch = CopyBatch()
    for target, output, copies in zip(plan.targets, outputs, aimed, strict=True):
        if output.numel() and target.fallback is None:
            copies, reads = with_source_strides(copies, [tensors[row] for row in target.sources])
            for copy in copies:
                batch.add(copy, reads, output)
    work = batch.run(use_kernels)
    for call in fallback_calls(plan):
        run_fallback(call, {row: tensors[row] for row in call.rows}, buffers)
    return work


def _checked_source(plan: CopyPlan, row: int, tensor: Tensor) -> Tensor:
    name, shape = plan.sources.names[row], plan.sources.shapes[row]
    dtype = dtype_of(plan.sources.dtypes[row], name)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ConversionError(
            message(
                f"{name} is not what the plan was made for",
                expected=f"{dtype} {list(shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        )
    return tensor.detach()


class _Operand(NamedTuple):
    name: str
    tensor: Tensor
    buffer: Target | None  # the target it is the buffer of; None for a source

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def stop(self) -> int:
        return self.start + span_bytes(self.tensor)


def _refuse_shared_memory(operands: Iterable[_Operand], sources: Mapping[int, Tensor]) -> None:
    """No byte of a buffer may be one of a source or of another buffer: what is read or left there would be chance.

    Views may alternate within one storage, as columns of a matrix do: whether two have a byte in common is decided
    exactly, by numpy; where that takes over ``_MOST_WORK`` steps, as odd strides may, they pass. So do two names of one
    tensor that are made alike of the same memory: tied weights.

    Not detected: memory that is reached under two addresses or two devices, and elements of one buffer that meet.
    """
    # Open: those that reach beyond the start of the next one.
    open_by_device: dict[torch.device, list[_Operand]] = {}
    for operand in sorted((o for o in operands if o.tensor.numel()), key=lambda o: o.start):
        device = operand.tensor.device
        others = [o for o in open_by_device.get(device, []) if o.stop > operand.start]
        for other in others:
            if (operand.buffer or other.buffer) and _share_bytes(operand.tensor, other.tensor):
                _refuse_unless_tied(operand, other, sources)
        open_by_device[device] = [*others, operand]


def _share_bytes(first: Tensor, second: Tensor) -> bool:
    try:
        # numpy's stub knows two of the numbers that it takes.
        return np.shares_memory(_placed(first), _placed(second), max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _placed(tensor: Tensor) -> np.ndarray:
    """An array that lies where the tensor lies, on whatever device: to be compared, never read."""
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


def _refuse_unless_tied(first: _Operand, second: _Operand, sources: Mapping[int, Tensor]) -> None:
    if first.buffer is None or second.buffer is None:
        source, buffer = (first, second) if first.buffer is None else (second, first)
        what = f"the buffer of {buffer.name} lies in the memory of the source {source.name}"
    elif _place(first.tensor) == _place(second.tensor) and _made_of(first.buffer, sources) == _made_of(
        second.buffer, sources
    ):
        return
    else:
        what = "the buffers of {} and {} share memory".format(*sorted((first.name, second.name)))
    raise ConversionError(message(what, do="pass a buffer of its own"))


def _made_of(target: Target, sources: Mapping[int, Tensor]) -> tuple[object, ...]:
    return target.fallback, target.copies, [_place(sources[row]) for row in target.sources]


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def with_source_strides(
    copies: Sequence[StridedCopy], sources: Sequence[Tensor]
) -> tuple[Sequence[StridedCopy], Sequence[Tensor]]:
    """Copies that read sources as they lie, and sources, contiguous where copies cannot follow."""
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
            real = Piece(ordinal, Box(shape, source.stride(), contiguous_strides(shape)), 0, 0)
            try:
                pieces[ordinal] = chain([real], reads, source.numel())
            except NotAffine:
                sources[ordinal] = source.contiguous()
    return group_pieces(piece for reads in pieces.values() for piece in reads), sources
