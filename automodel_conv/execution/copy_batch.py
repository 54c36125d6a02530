"""Strided copies between tensors of one device, gathered so that equal ones are one launch of a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import strided
from automodel_conv.execution.moves import Form, Moves, moves_of
from automodel_conv.execution.stats import Work
from automodel_conv.kernels.address_table import at_addresses
from automodel_conv.kernels.launch import Launches, start, why_not
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.kernels.variants import Variant
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import StridedCopy

BACKENDS = ("auto", "torch", "triton")


def takes_kernels(backend: str, tensors: Iterable[Tensor]) -> bool:
    """Whether kernels shall move between these tensors: always for "triton", never for "torch".

    "auto" says yes for tensors of one GPU where Triton can run.

    Raises:
        UnsupportedError: an unknown backend, or "triton" where kernels cannot run on the tensors.
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
            message(f'backend="triton" cannot run: {reason}', do='backend="torch" gives the same bytes')
        )
    return reason is None


class _Kind(NamedTuple):
    """What copies that one call of a verb makes have in common."""

    form: Form
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    device: torch.device


class _Copies(NamedTuple):
    """Copies of one kind; offsets count elements from a tensor's own first one."""

    sources: list[Tensor]
    source_offsets: list[int]
    targets: list[Tensor]
    target_offsets: list[int]


class Planned(NamedTuple):
    """A batch as launches, for ``start``, and as copies that no kernel fits, for torch.

    Launches keep nothing alive: the batch does, until it runs or is dropped.
    """

    launches: list[Launches]
    by_torch: tuple[list[Tensor], list[Tensor]]  # destinations and their sources, for strided_copy_torch
    work: Work


class CopyBatch:
    """Copies to be made together: ``run`` makes them.

    ``plan`` says how, for a caller that starts their launches with others of its own. ``variants`` says what would be
    compiled for them.
    """

    def __init__(self) -> None:
        self._kinds: dict[_Kind, _Copies] = {}

    def add(self, copy: StridedCopy, sources: Sequence[Tensor], output: Tensor) -> None:
        """Take a copy from ``sources``, which ``copy.ordinals`` number, to ``output``.

        The tensors must live until the work that ``run`` queues is done.
        """
        dtypes = {sources[ordinal].dtype for ordinal in copy.ordinals}
        for dtype in dtypes:
            form = Form(copy.box, dtype.itemsize, output.dtype.itemsize)
            kind = _Kind(form, dtype, output.dtype, output.device)
            if kind not in self._kinds:
                self._kinds[kind] = _Copies([], [], [], [])
            copies = self._kinds[kind]
            _, ordinals, source_offsets, target_offsets = copy if len(dtypes) == 1 else _of_dtype(dtype, sources, copy)
            copies.sources.extend([sources[ordinal] for ordinal in ordinals])
            copies.source_offsets.extend(source_offsets)
            copies.targets.extend([output] * len(ordinals))
            copies.target_offsets.extend(target_offsets)

    def variants(self) -> Counter[frozenset[Variant]]:
        """Bytes written by the copies of each kind, by the variants that kernels would need for it."""
        found: Counter[frozenset[Variant]] = Counter()
        for kind, copies in self._kinds.items():
            moves = _moves(kind, copies)
            if moves is not None:
                nbytes = len(copies.sources) * kind.form.box.numel * kind.form.target_itemsize
                found[_launches(kind, moves).variants] += nbytes
        return found

    @torch.no_grad()
    def plan(self, use_kernels: bool, allowed: frozenset[Variant] | None = None) -> Planned:
        """How ``run`` makes the copies; queues nothing and writes nothing."""
        parts = [_planned(kind, copies, use_kernels, allowed) for kind, copies in self._kinds.items()]
        return Planned(
            [launches for part in parts for launches in part.launches],
            ([dst for part in parts for dst in part.by_torch[0]], [src for part in parts for src in part.by_torch[1]]),
            sum((part.work for part in parts), Work(0, 0)),
        )

    @torch.no_grad()
    def run(self, use_kernels: bool, allowed: frozenset[Variant] | None = None) -> Work:
        """Make all copies; kernels are queued on the current stream, and their tables come by one upload.

        Args:
            use_kernels: for the copies that a kernel fits; all others are torch's.
            allowed: the variants that may be compiled; None: any.
        """
        planned = self.plan(use_kernels, allowed)
        start(*planned.launches)
        strided_copy_torch(*planned.by_torch)
        self._kinds.clear()
        return planned.work


def _of_dtype(dtype: torch.dtype, sources: Sequence[Tensor], copy: StridedCopy) -> StridedCopy:
    """The copies from sources of one dtype."""
    box, *columns = copy
    of_dtype = [place for place in zip(*columns, strict=True) if sources[place[0]].dtype == dtype]
    return StridedCopy(box, *zip(*of_dtype, strict=True))


def _planned(kind: _Kind, copies: _Copies, use_kernels: bool, allowed: frozenset[Variant] | None) -> Planned:
    count = len(copies.sources)
    moves = _moves(kind, copies) if use_kernels else None
    launches = _launches(kind, moves) if moves is not None else None
    if moves is None or launches is None or (allowed is not None and not launches.variants <= allowed):
        return Planned([], _views(kind.form.box, *copies), Work(0, count))
    places = []
    for copy, at_source, at_target in zip(*moves.unpaired, strict=True):
        source, target = copies.sources[copy], copies.targets[copy]
        source_offset = (int(at_source) - source.data_ptr()) // source.itemsize
        places.append((source, source_offset, target, (int(at_target) - target.data_ptr()) // target.itemsize))
    unpaired = _views(moves.unpaired_form.box, *zip(*places, strict=True)) if places else ([], [])
    by_torch = len(np.unique(moves.unpaired.copies))
    return Planned([launches], unpaired, Work(count - by_torch, by_torch))


def _views(
    box: Box,
    sources: Iterable[Tensor],
    source_offsets: Iterable[int],
    targets: Iterable[Tensor],
    target_offsets: Iterable[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The destinations and the sources of equal copies, as torch copies them."""
    return (
        [strided(t, box.shape, box.target_strides, at) for t, at in zip(targets, target_offsets, strict=True)],
        [strided(s, box.shape, box.source_strides, at) for s, at in zip(sources, source_offsets, strict=True)],
    )


def _moves(kind: _Kind, copies: _Copies) -> Moves | None:
    """What kernels do for these copies; None where none fits."""
    from automodel_conv.kernels.verbs import VERBS  # and Triton with it

    # Conjugate and negative views are told by a flag that no kernel sees.
    if any(map(Tensor.is_conj, copies.sources)) or any(map(Tensor.is_neg, copies.sources)):
        return None
    sources = _addresses(copies.sources, copies.source_offsets)
    targets = _addresses(copies.targets, copies.target_offsets)
    moves = moves_of(kind.form, sources, targets, VERBS)
    if moves is None or not moves.verb.supports(moves.matrix, kind.source_dtype, kind.target_dtype):
        return None
    return moves


def _addresses(tensors: Sequence[Tensor], offsets: Sequence[int]) -> np.ndarray:
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    return starts + np.array(offsets, np.int64) * (tensors[0].itemsize if tensors else 1)


def _launches(kind: _Kind, moves: Moves) -> Launches:
    verb, matrix, sources, targets, *_ = moves
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
