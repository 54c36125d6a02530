"""Codes in windows of device memory into numbers: one table for all scales of a kind, equal rectangles together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of, strided
from automodel_conv.execution.code_windows import Place, Rectangle, ScaleKind, ScaleRun
from automodel_conv.execution.jobs import SCRATCH
from automodel_conv.kernels.address_table import Matrices, at_addresses
from automodel_conv.kernels.code_tables import (
    bits_of,
    byte_scale_table,
    byte_scale_values,
    prepare_scale_table,
    scale_table,
)
from automodel_conv.kernels.dequantize import dequantize_launches, dequantize_torch
from automodel_conv.kernels.launch import Launches

# Zero points that one I32 holds, along the rows; the first in the lowest bits.
_PACKED = 8
_BYTE_SCALES = 256


class WindowDecoder:
    """Decodes the windows of one load, on the current stream, and never waits for the device.

    What all windows share is made first: tables that do not depend on scales, and the numbers of scales of one byte.
    """

    def __init__(self, runs: Iterable[ScaleRun], tensors: Sequence[Tensor], device: torch.device):
        """Make what windows share.

        Args:
            runs: of all windows.
            tensors: the targets, by number.
        """
        self._tensors = tensors
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._tables: dict[ScaleKind, Tensor] = {}
        self._byte_values: dict[ScaleKind, Tensor] = {}
        for kind in {run.kind for run in runs}:
            scales, numbers = _dtype(kind.scales), _dtype(kind.numbers)
            if kind.is_shared:
                self._tables[kind] = byte_scale_table(kind.format, scales, numbers, kind.like_upstream, device)
                continue
            if scales.itemsize == 1:
                self._byte_values[kind] = byte_scale_values(scales, kind.like_upstream, device)
                scales = torch.float32
            prepare_scale_table(kind.format, scales, kind.has_global, device)

    def make_tables(self, runs: Iterable[ScaleRun], window: Tensor) -> None:
        """Make the tables of a window's scales, in the window."""
        for run in runs:
            kind = run.kind
            if kind.is_shared:
                continue
            scales = self._scales(run, window)
            scale_table(
                kind.format,
                scales,
                _dtype(kind.numbers),
                zero_points=_zero_points(run, window),
                global_scales=_global_scales(run, window, len(scales)),
                divide=kind.divides,
                like_upstream=kind.like_upstream,
                out=self._table(run, window),
            )
            if not kind.has_byte_cells:
                torch.arange(run.count, out=_cells(run, window))

    def _scales(self, run: ScaleRun, window: Tensor) -> Tensor:
        """The scales that a row of the table is made of each."""
        kind = run.kind
        if kind.has_byte_cells:
            return self._byte_values[kind].repeat(run.sources)
        dtype = _dtype(kind.scales)
        stored = _typed(window, run.scales_bytes, run.count, dtype if dtype.itemsize > 1 else torch.uint8)
        return stored if dtype.itemsize > 1 else self._byte_values[kind].index_select(0, stored.to(torch.int32))

    def _table(self, run: ScaleRun, window: Tensor) -> Tensor:
        """``[rows, codes]``: the one that all share, or the one in the window."""
        if run.kind.is_shared:
            return self._tables[run.kind]
        codes = 1 << bits_of(run.kind.format)
        return _typed(window, run.table_bytes, run.table_rows * codes, _dtype(run.kind.numbers)).view(-1, codes)

    def launches(self, rectangle: Rectangle, places: Sequence[Place], run: ScaleRun, window: Tensor) -> Launches:
        """The launches that decode equal rectangles of a window."""
        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, device = bits_of(kind.format), window.device
        table, dtype = self._table(run, window), _dtype(kind.numbers)
        targets, offsets, codes_bytes, scales, sources = np.array(places, np.int64).T
        starts = np.where(targets == SCRATCH, window.data_ptr(), self._addresses[targets]) + offsets * dtype.itemsize
        row_stride, column_stride = rectangle.target_strides
        is_transposed = min(rows, columns) > 1 and row_stride < column_stride
        shape = (columns, rows) if is_transposed else (rows, columns)
        cells, tables = self._cells_and_tables(scales, sources, run, window, table, (rows, rectangle.across))
        return dequantize_launches(
            at_addresses(starts, shape, column_stride if is_transposed else row_stride, dtype, device),
            at_addresses(
                window.data_ptr() + codes_bytes,
                (rows, columns * bits // 8),
                rectangle.codes_stride,
                torch.uint8,
                device,
            ),
            cells,
            tables,
            bits=bits,
            block=rectangle.block,
            start=rectangle.start,
            is_transposed=is_transposed,
            step=row_stride if is_transposed else column_stride,
        )

    def _cells_and_tables(
        self,
        scales: np.ndarray,
        sources: np.ndarray,
        run: ScaleRun,
        window: Tensor,
        table: Tensor,
        shape: tuple[int, int],
    ) -> tuple[Matrices, Matrices]:
        """The rows of the table that the blocks of each rectangle take, and the table that each takes."""
        codes = table.shape[1]
        if run.kind.has_byte_cells:
            addresses, dtype = window.data_ptr() + run.scales_bytes + scales, torch.uint8
        else:
            addresses, dtype = window.data_ptr() + run.cells_bytes + 4 * scales, torch.int32
        tables = np.full(len(scales), table.data_ptr())
        if run.kind.has_byte_cells and not run.kind.is_shared:
            tables += sources * (_BYTE_SCALES * codes * table.itemsize)
        return (
            at_addresses(addresses, shape, shape[1], dtype, window.device),
            at_addresses(tables, (table.shape[0], codes), codes, table.dtype, window.device),
        )

    def decode_by_torch(self, rectangle: Rectangle, places: Sequence[Place], run: ScaleRun, window: Tensor) -> None:
        """Decode equal rectangles of a window without kernels, one after another."""
        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, table, dtype = bits_of(kind.format), self._table(run, window), _dtype(kind.numbers)
        grid = tuple(
            -(-(size + start) // block)
            for size, start, block in zip(rectangle.shape, rectangle.start, rectangle.block, strict=True)
        )
        scratch = window.view(dtype)
        for target, target_offset, codes_bytes, scale, source in places:
            output = scratch if target == SCRATCH else self._tensors[target]
            if kind.has_byte_cells:
                cells = strided(window, grid, (rectangle.across, 1), run.scales_bytes + scale)
            else:
                cells = strided(_cells(run, window), grid, (rectangle.across, 1), scale)
            of_source = table
            if kind.has_byte_cells and not kind.is_shared:
                of_source = table[source * _BYTE_SCALES : (source + 1) * _BYTE_SCALES]
            dequantize_torch(
                [strided(output, rectangle.shape, rectangle.target_strides, target_offset)],
                [strided(window, (rows, columns * bits // 8), (rectangle.codes_stride, 1), codes_bytes)],
                [cells],
                of_source,
                bits=bits,
                block=rectangle.block,
                start=rectangle.start,
            )


def _dtype(code: str) -> torch.dtype:
    return dtype_of(code, "a quantized tensor")


def _typed(window: Tensor, start_bytes: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` elements that lie in a window, at a multiple of their size."""
    return window[start_bytes : start_bytes + count * dtype.itemsize].view(dtype)


def _cells(run: ScaleRun, window: Tensor) -> Tensor:
    """The number of each scale of a run, which is its row of the table."""
    return _typed(window, run.cells_bytes, run.count, torch.int32)


def _zero_points(run: ScaleRun, window: Tensor) -> Tensor | None:
    """The code that stands for zero under each scale, 0 to 15."""
    kind = run.kind
    if kind.zero_points is None or kind.grid is None:
        return None
    (packed_rows, first), (rows, across) = kind.zero_points, kind.grid
    packed = _typed(window, run.zero_points_bytes, run.sources * packed_rows * across, torch.int32)
    numbers = torch.arange(first, first + rows, dtype=torch.int32, device=window.device)
    found = packed.view(run.sources, packed_rows, across).index_select(1, numbers // _PACKED)
    return found.bitwise_right_shift((numbers % _PACKED * 4)[:, None]).bitwise_and_(15).view(-1)


def _global_scales(run: ScaleRun, window: Tensor, rows: int) -> Tensor | None:
    """For each row of the table the scale of its source by which its own is multiplied or divided."""
    if not run.kind.has_global:
        return None
    found = _typed(window, run.globals_bytes, run.sources, torch.float32)
    return found[:, None].expand(run.sources, rows // run.sources).reshape(-1)
