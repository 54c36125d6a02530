"""Batches of strided copies by kernels or torch, for GPUs and for conversions in memory on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import strided
from automodel_conv.execution.moves import CopyGeometry, VerbCall, choose_verb
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.kernels.address_table import at_addresses
from automodel_conv.kernels.launch import Launches, start, why_not
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.kernels.variants import Variant
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import StridedCopy

BACKENDS = ("auto", "torch", "triton")


def uses_kernels(backend: str, tensors: Iterable[Tensor]) -> bool:
    """Return whether kernels copy between these tensors: always for "triton", never for "torch".

    For "auto" they do if all tensors are on one GPU and Triton can run there.

    Raises:
        UnsupportedError: the backend is unknown, or it is "triton" and kernels cannot run on the tensors.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(message(f"unknown backend {backend!r}", expected=f"one of {BACKENDS}"))
    if backend == "torch":
        return False
    devices = {tensor.device for tensor in tensors}
    if not devices:
        return False
    if len(devices) > 1:
        reason = f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    else:
        (device,) = devices
        if backend == "auto" and device.type != "cuda":
            return False
        reason = why_not(device)
    if backend == "triton" and reason is not None:
        raise UnsupportedError(
            message(f'backend="triton" cannot run: {reason}', do='use backend="torch", which writes the same bytes')
        )
    return reason is None


class _CopyKind(NamedTuple):
    """The properties that copies must share to be carried out by one call of a verb."""

    geometry: CopyGeometry
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    device: torch.device


class _EqualCopies(NamedTuple):
    """Copies of one kind, in columns; offsets count elements from the first element of a tensor."""

    sources: list[Tensor]
    source_offsets: list[int]
    targets: list[Tensor]
    target_offsets: list[int]


class PlannedCopies(NamedTuple):
    """A batch of copies as launches of kernels, and as copies that torch carries out because no kernel fits.

    Launches keep no tensor alive; the batch does, until it runs or is dropped.
    """

    launches: list[Launches]
    """Arguments for ``start``."""
    by_torch: tuple[list[Tensor], list[Tensor]]
    """Destinations and sources, for ``strided_copy_torch``."""
    counts: CopyCounts


class CopyBatch:
    """A batch of strided copies that are carried out together by ``run``.

    ``plan`` returns the launches of the batch, for a caller that starts them together with launches of its own.
    ``variants`` returns the variants of kernels that the batch would need.
    """

    def __init__(self) -> None:
        self._kinds: dict[_CopyKind, _EqualCopies] = {}

    def add(self, copy: StridedCopy, sources: Sequence[Tensor], output: Tensor) -> None:
        """Add a copy from ``sources`` to ``output``; ``copy.ordinals`` are indices of ``sources``.

        The tensors must stay alive until the work that ``run`` queues is done.
        """
        dtypes = {sources[ordinal].dtype for ordinal in copy.ordinals}
        for dtype in dtypes:
            geometry = CopyGeometry(copy.box, dtype.itemsize, output.dtype.itemsize)
            kind = _CopyKind(geometry, dtype, output.dtype, output.device)
            if kind not in self._kinds:
                self._kinds[kind] = _EqualCopies([], [], [], [])
            copies = self._kinds[kind]
            same_dtype = copy if len(dtypes) == 1 else _select_dtype(dtype, sources, copy)
            _, ordinals, source_offsets, target_offsets = same_dtype
            copies.sources.extend([sources[ordinal] for ordinal in ordinals])
            copies.source_offsets.extend(source_offsets)
            copies.targets.extend([output] * len(ordinals))
            copies.target_offsets.extend(target_offsets)

    def variants(self) -> Counter[frozenset[Variant]]:
        """Return the bytes that kernels would write, by the set of variants that they would need for them."""
        nbytes: Counter[frozenset[Variant]] = Counter()
        for kind, copies in self._kinds.items():
            call = _verb_call(kind, copies)
            if call is not None:
                geometry = kind.geometry
                nbytes[_launches(kind, call).variants] += (
                    len(copies.sources) * geometry.box.numel * geometry.target_itemsize
                )
        return nbytes

    @torch.no_grad()
    def plan(self, use_kernels: bool, allowed: frozenset[Variant] | None = None) -> PlannedCopies:
        """Return the launches and the torch copies that ``run`` would start, without starting them.

        Args:
            use_kernels, allowed: as for ``run``.
        """
        parts = [_plan(kind, copies, use_kernels, allowed) for kind, copies in self._kinds.items()]
        return PlannedCopies(
            [launches for part in parts for launches in part.launches],
            ([dst for part in parts for dst in part.by_torch[0]], [src for part in parts for src in part.by_torch[1]]),
            sum((part.counts for part in parts), CopyCounts(0, 0)),
        )

    @torch.no_grad()
    def run(self, use_kernels: bool, allowed: frozenset[Variant] | None = None) -> CopyCounts:
        """Carry out all copies: queue kernels on the current stream, after one upload of their tables.

        Args:
            use_kernels: use kernels for the copies that one fits; torch carries out the others.
            allowed: the variants that may be compiled; None for any.
        """
        planned = self.plan(use_kernels, allowed)
        start(*planned.launches)
        strided_copy_torch(*planned.by_torch)
        self._kinds.clear()
        return planned.counts


def _select_dtype(dtype: torch.dtype, sources: Sequence[Tensor], copy: StridedCopy) -> StridedCopy:
    """Return the columns of a copy that read sources of one dtype."""
    box, *columns = copy
    selected = [column for column in zip(*columns, strict=True) if sources[column[0]].dtype == dtype]
    return StridedCopy(box, *zip(*selected, strict=True))


def _plan(
    kind: _CopyKind, copies: _EqualCopies, use_kernels: bool, allowed: frozenset[Variant] | None
) -> PlannedCopies:
    count = len(copies.sources)
    call = _verb_call(kind, copies) if use_kernels else None
    launches = _launches(kind, call) if call is not None else None
    if call is None or launches is None or (allowed is not None and not launches.variants <= allowed):
        return PlannedCopies([], _views(kind.geometry.box, *copies), CopyCounts(0, count))
    places = []
    for copy, source_address, target_address in zip(*call.unpaired, strict=True):
        source, target = copies.sources[copy], copies.targets[copy]
        source_offset = (int(source_address) - source.data_ptr()) // source.itemsize
        target_offset = (int(target_address) - target.data_ptr()) // target.itemsize
        places.append((source, source_offset, target, target_offset))
    unpaired = _views(call.unpaired_geometry.box, *zip(*places, strict=True)) if places else ([], [])
    by_torch = len({*map(int, call.unpaired.copies)})
    return PlannedCopies([launches], unpaired, CopyCounts(count - by_torch, by_torch))


def _views(
    box: Box,
    sources: Iterable[Tensor],
    source_offsets: Iterable[int],
    targets: Iterable[Tensor],
    target_offsets: Iterable[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the destinations and the sources of equal copies, as views for ``strided_copy_torch``."""
    return (
        [strided(t, box.shape, box.target_strides, offset) for t, offset in zip(targets, target_offsets, strict=True)],
        [strided(s, box.shape, box.source_strides, offset) for s, offset in zip(sources, source_offsets, strict=True)],
    )


def _verb_call(kind: _CopyKind, copies: _EqualCopies) -> VerbCall | None:
    """Return the call of a verb that carries out these copies, or None if no kernel fits."""
    from automodel_conv.kernels.verbs import VERBS  # deferred, because it imports Triton

    # A flag marks conjugate and negative views, and kernels do not see it.
    if any(map(Tensor.is_conj, copies.sources)) or any(map(Tensor.is_neg, copies.sources)):
        return None
    sources = _addresses(copies.sources, copies.source_offsets)
    targets = _addresses(copies.targets, copies.target_offsets)
    call = choose_verb(kind.geometry, sources, targets, VERBS)
    if call is None or not call.verb.supports(call.matrix, kind.source_dtype, kind.target_dtype):
        return None
    return call


def _addresses(tensors: Sequence[Tensor], offsets: Sequence[int]) -> np.ndarray:
    """Return the address of the element at an offset of each tensor, in bytes, int64 ``[n]``."""
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    return starts + np.array(offsets, np.int64) * (tensors[0].itemsize if tensors else 1)


def _launches(kind: _CopyKind, call: VerbCall) -> Launches:
    verb, matrix, sources, targets, *_ = call
    target_shape, source_shape = verb.shapes(matrix)
    return verb.launches(
        *(
            at_addresses(column, target_shape, matrix.target_stride, kind.target_dtype, kind.device)
            for column in targets
        ),
        *(
            at_addresses(column, source_shape, matrix.source_stride, kind.source_dtype, kind.device)
            for column in sources
        ),
    )
