"""Copies of many targets, gathered so that equal ones are one launch of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.moves import Moves, Verb, moves_of
from automodel_conv.kernels.address_table import at_addresses
from automodel_conv.kernels.interleave import deinterleave, interleave
from automodel_conv.kernels.launch import MOST_RUN, MOST_STRIDE, why_not
from automodel_conv.kernels.strided_copy import is_foldable, strided_copy
from automodel_conv.kernels.transpose import transpose
from automodel_conv.kernels.variants import CASTS
from automodel_conv.planning.copies import StridedCopy

BACKENDS = ("auto", "torch", "triton")
_VERBS: dict[Verb, Callable[..., None]] = {
    "strided_copy": strided_copy,
    "transpose": transpose,
    "interleave": interleave,
    "deinterleave": deinterleave,
}


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
        reason = why_not(device)
        if backend == "auto" and device.type != "cuda":
            return False
    if backend == "triton" and reason is not None:
        raise UnsupportedError(
            message(f'backend="triton" cannot run: {reason}', do='backend="torch" gives the same bytes')
        )
    return reason is None


class _Kind(NamedTuple):
    """What one call of a verb has in common."""

    verb: Verb
    shape: tuple[int, int]
    source_stride: int
    target_stride: int
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    device: torch.device


class KernelBatch:
    """Moves of one kind, whatever copies they come from, to be launched together."""

    def __init__(self) -> None:
        # Columns of addresses: those of the targets, then those of the sources.
        self._columns: dict[_Kind, list[list[np.ndarray]]] = {}
        # Layers share their copies. The copy is kept, so that its id stays its own.
        self._known: dict[int, tuple[StridedCopy, Moves | None]] = {}

    def add(self, copy: StridedCopy, sources: Sequence[Tensor], output: Tensor) -> bool:
        """Take a copy from ``sources``, all of one dtype, to ``output``; False if no kernel fits it.

        The tensors must live until the work that ``launch`` queues is done.
        """
        dtype = sources[copy.ordinals[0]].dtype
        if id(copy) not in self._known:
            self._known[id(copy)] = (copy, moves_of(copy))
        moves = self._known[id(copy)][1]
        # Conjugate and negative views are told by a flag that no kernel sees.
        if moves is None or not _fits(moves, dtype, output.dtype) or any(t.is_conj() or t.is_neg() for t in sources):
            return False
        if not len(moves.sources[0].offsets):
            return True
        starts = np.array([source.data_ptr() for source in sources], np.int64)
        addresses = [output.data_ptr() + places.offsets * output.element_size() for places in moves.targets]
        addresses += [starts[places.ordinals] + places.offsets * dtype.itemsize for places in moves.sources]
        kind = _Kind(*moves[:4], dtype, output.dtype, output.device)
        columns = self._columns.setdefault(kind, [[] for _ in addresses])
        for column, more in zip(columns, addresses, strict=True):
            column.append(more)
        return True

    def launch(self) -> None:
        """Queue everything taken so far on the current stream."""
        for kind, columns in self._columns.items():
            rows, width = kind.shape
            halves = 2 if kind.verb == "deinterleave" else 1
            twice = 2 if kind.verb == "interleave" else 1
            target = kind.shape if kind.verb == "strided_copy" else (width // halves, rows * twice)
            operands = []
            for number, column in enumerate(columns):
                addresses = np.concatenate(column)
                if number < halves:
                    shape, stride, dtype = target, kind.target_stride, kind.target_dtype
                else:
                    shape, stride, dtype = kind.shape, kind.source_stride, kind.source_dtype
                operands.append(at_addresses(addresses, shape, stride, dtype, kind.device))
            _VERBS[kind.verb](*operands)
        self._columns.clear()


def _fits(moves: Moves, src: torch.dtype, dst: torch.dtype) -> bool:
    """Whether the verb moves these dtypes, and matrices this wide."""
    if src != dst and not (src in CASTS and dst in CASTS):
        return False
    strides = (moves.source_stride, moves.target_stride)
    if moves.verb == "strided_copy":
        rows, columns = moves.shape
        if rows == 1 or strides == (columns, columns):
            nbytes = rows * columns * max(src.itemsize, dst.itemsize)
            return nbytes <= MOST_RUN or is_foldable(nbytes)
        return max(columns, *strides) <= MOST_STRIDE
    return src.itemsize <= 4 and max(*moves.shape, *strides) <= MOST_STRIDE
