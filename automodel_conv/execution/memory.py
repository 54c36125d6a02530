"""From tensors to tensors on the device they are on: the same plan, with no file in sight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import Aim, checked, dtype_of, span_bytes
from automodel_conv.execution.copy_batch import CopyBatch, Work, takes_kernels
from automodel_conv.execution.upstream import run_upstream, upstream_calls
from automodel_conv.planning.copies import StridedCopy, group_pieces
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.view import NotAffine, Piece, chain, contiguous_strides


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
        ConversionError: a source or a buffer does not fit, or a buffer shares memory with a source;
            before anything is written.
        UnsupportedError: a dtype that torch does not know, strides that copies cannot follow, or
            "triton" for tensors that kernels cannot reach.
    """
    rows = sorted(plan.used_sources)
    tensors = {row: _checked_source(plan, row, sources[row]) for row in rows}
    outputs = [checked(target, buffers) for target in plan.targets]
    _refuse_shared_memory(
        ((plan.sources.names[row], tensor) for row, tensor in tensors.items()),
        ((target.name, output) for target, output in zip(plan.targets, outputs, strict=True)),
    )
    use_kernels = takes_kernels(backend, [*tensors.values(), *outputs])
    aim = Aim()
    aimed = [aim(target, output) for target, output in zip(plan.targets, outputs, strict=True)]
    batch = CopyBatch()
    for target, output, copies in zip(plan.targets, outputs, aimed, strict=True):
        if output.numel() and target.fallback is None:
            copies, reads = _from_real_strides(copies, [tensors[row] for row in target.sources])
            for copy in copies:
                batch.add(copy, reads, output)
    work = batch.run(use_kernels)
    for call in upstream_calls(plan):
        run_upstream(call, {row: tensors[row] for row in call.rows}, buffers)
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


def _refuse_shared_memory(sources: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]]) -> None:
    """No buffer may meet a source from first to last element: a copy would read what it wrote."""
    spans: list[tuple[str, int, int, bool, str]] = []
    for written, tensors in ((False, sources), (True, buffers)):
        for name, tensor in tensors:
            if tensor.numel():
                start = tensor.data_ptr()
                spans.append((str(tensor.device), start, start + span_bytes(tensor), written, name))
    spans.sort()
    # The farthest end so far of each kind, so that a long span still meets a late one.
    ends: dict[tuple[str, bool], tuple[int, str]] = {}
    for device, start, stop, written, name in spans:
        other_stop, other = ends.get((device, not written), (0, ""))
        if start < other_stop:
            source, buffer = (other, name) if written else (name, other)
            raise ConversionError(
                message(
                    f"the buffer of {buffer} lies in the memory of the source {source}",
                    do="pass a buffer of its own",
                )
            )
        if stop > ends.get((device, written), (0, ""))[0]:
            ends[device, written] = (stop, name)


def _from_real_strides(
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
            real = Piece(ordinal, shape, source.stride(), 0, contiguous_strides(shape), 0)
            try:
                pieces[ordinal] = chain([real], reads, source.numel())
            except NotAffine:
                sources[ordinal] = source.contiguous()
    return group_pieces(piece for reads in pieces.values() for piece in reads), sources
