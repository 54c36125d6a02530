"""Codes in windows of device memory into numbers: one table for all scales of a kind, equal rectangles together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of, strided
from automodel_conv.kernels.address_table import Matrices, at_addresses
from automodel_conv.kernels.code_tables import (
    byte_scale_table,
    byte_scale_values,
    check_table,
    prepare_scale_table,
    scale_table,
)
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.kernels.launch import Launches
from automodel_conv.planning.copies import ZEROS_IN_I32
from automodel_conv.schedule.code_slabs import BYTE_SCALES, Position, Rectangle, ScaleKind
from automodel_conv.schedule.code_windows import ScaleGroup

# Rows of a table that are made at a time, where each takes scratch for its zero point or its global scale.
_BAND_ROWS = 1 << 16


class WindowDecoder:
    """Decodes the windows of one load, on the current stream, and never waits for the device.

    What all windows share is made first: tables that do not depend on scales, and the numbers of scales of one byte.
    """

    def __init__(self, groups: Iterable[ScaleGroup], tensors: Sequence[Tensor], device: torch.device):
        """Make what windows share.

        Args:
            groups: of all windows.
            tensors: the targets, by number.

        Raises:
            UnsupportedError: codes do not become numbers of a target's dtype.
        """
        self._tensors = tensors
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._tables: dict[ScaleKind, Tensor] = {}
        self._byte_values: dict[ScaleKind, Tensor] = {}
        for kind in {group.kind for group in groups}:
            scales, numbers = _dtype(kind.scales), _dtype(kind.numbers)
            check_table(kind.format, scales, numbers)
            if kind.is_shared:
                self._tables[kind] = byte_scale_table(kind.format, scales, numbers, kind.like_upstream, device)
                continue
            if scales.itemsize == 1:
                self._byte_values[kind] = byte_scale_values(scales, kind.like_upstream, device)
                scales = torch.float32
            prepare_scale_table(kind.format, scales, kind.has_global, device)

    def make_tables(self, groups: Iterable[ScaleGroup], window: Tensor) -> None:
        """Make the tables of a window's scales, in the window."""
        for group in groups:
            kind = group.kind
            if kind.is_shared:
                continue
            table = self._table(group, window)
            for sources, rows in _bands(group):
                scale_table(
                    kind.format,
                    self._scales(group, window, sources, rows),
                    table.dtype,
                    zero_points=_zero_points(group, window, sources, rows),
                    global_scales=_global_scales(group, window, sources, rows),
                    divide=kind.divides,
                    like_upstream=kind.like_upstream,
                    out=table.view(group.table_groups, -1, table.shape[1])[sources, rows].flatten(0, 1),
                )
            if not kind.scale_is_table_row:
                torch.arange(group.count, out=_table_rows(group, window))

    def _scales(self, group: ScaleGroup, window: Tensor, sources: slice, rows: slice) -> Tensor:
        """The scales that rows of the table are made of."""
        kind, count = group.kind, sources.stop - sources.start
        if kind.scale_is_table_row:
            return self._byte_values[kind].repeat(count)
        dtype = _dtype(kind.scales)
        stored = _typed(window, group.scales_bytes, group.count, dtype if dtype.itemsize > 1 else torch.uint8)
        some = stored.view(group.table_groups, -1)[sources, rows].flatten()
        return some if dtype.itemsize > 1 else self._byte_values[kind].index_select(0, some.to(torch.int32))

    def _table(self, group: ScaleGroup, window: Tensor) -> Tensor:
        """``[rows, codes]``: the one that all share, or the one in the window."""
        if group.kind.is_shared:
            return self._tables[group.kind]
        codes = 1 << group.kind.bits
        return _typed(window, group.table_bytes, group.table_rows * codes, _dtype(group.kind.numbers)).view(-1, codes)

    def launches(self, rectangle: Rectangle, places: Sequence[Position], group: ScaleGroup, window: Tensor) -> Launches:
        """The launches that decode equal rectangles of a window."""
        from automodel_conv.kernels.dequantize import dequantize_launches  # and Triton with it

        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, device = kind.bits, window.device
        table, dtype = self._table(group, window), _dtype(kind.numbers)
        targets, offsets, codes_bytes, scales, sources = np.array(places, np.int64).T
        bases = window.data_ptr() if rectangle.in_window else self._addresses[targets]
        starts = bases + offsets * dtype.itemsize
        row_stride, column_stride = rectangle.target_strides
        is_transposed = min(rows, columns) > 1 and row_stride < column_stride
        shape = (columns, rows) if is_transposed else (rows, columns)
        table_rows, tables = self._table_rows_and_tables(
            scales, sources, group, window, table, (rows, rectangle.across)
        )
        return dequantize_launches(
            at_addresses(starts, shape, column_stride if is_transposed else row_stride, dtype, device),
            at_addresses(
                window.data_ptr() + codes_bytes,
                (rows, columns * bits // 8),
                rectangle.codes_stride,
                torch.uint8,
                device,
            ),
            table_rows,
            tables,
            bits=bits,
            block=rectangle.block,
            start=rectangle.start,
            is_transposed=is_transposed,
            step=row_stride if is_transposed else column_stride,
        )

    def _table_rows_and_tables(
        self,
        scales: np.ndarray,
        sources: np.ndarray,
        group: ScaleGroup,
        window: Tensor,
        table: Tensor,
        shape: tuple[int, int],
    ) -> tuple[Matrices, Matrices]:
        """The rows of the table that the blocks of each rectangle take, and the table that each takes."""
        codes = table.shape[1]
        if group.kind.scale_is_table_row:
            addresses, dtype = window.data_ptr() + group.scales_bytes + scales, torch.uint8
        else:
            addresses, dtype = window.data_ptr() + group.table_rows_bytes + 4 * scales, torch.int32
        tables = np.full(len(scales), table.data_ptr())
        if group.kind.has_table_for_each_source:
            tables += sources * (BYTE_SCALES * codes * table.itemsize)
        return (
            at_addresses(addresses, shape, shape[1], dtype, window.device),
            at_addresses(tables, (table.shape[0], codes), codes, table.dtype, window.device),
        )

    def decode_by_torch(
        self, rectangle: Rectangle, places: Sequence[Position], group: ScaleGroup, window: Tensor
    ) -> None:
        """Decode equal rectangles of a window without kernels, one after another."""
        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, table, dtype = kind.bits, self._table(group, window), _dtype(kind.numbers)
        grid = tuple(
            -(-(size + start) // block)
            for size, start, block in zip(rectangle.shape, rectangle.start, rectangle.block, strict=True)
        )
        scratch = window.view(dtype)
        for target, target_offset, codes_bytes, scale, source in places:
            output = scratch if rectangle.in_window else self._tensors[target]
            if kind.scale_is_table_row:
                table_rows = strided(window, grid, (rectangle.across, 1), group.scales_bytes + scale)
            else:
                table_rows = strided(_table_rows(group, window), grid, (rectangle.across, 1), scale)
            of_source = table
            if kind.has_table_for_each_source:
                of_source = table[source * BYTE_SCALES : (source + 1) * BYTE_SCALES]
            dequantize_torch(
                [strided(output, rectangle.shape, rectangle.target_strides, target_offset)],
                [strided(window, (rows, columns * bits // 8), (rectangle.codes_stride, 1), codes_bytes)],
                [table_rows],
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


def _table_rows(group: ScaleGroup, window: Tensor) -> Tensor:
    """The number of each scale of a group, which is its row of the table."""
    return _typed(window, group.table_rows_bytes, group.count, torch.int32)


def _bands(group: ScaleGroup) -> Iterator[tuple[slice, slice]]:
    """The rows of a group's table in portions, of which the scratch is small: sources, and rows of each of them.

    Rows are whole rows of blocks, where there are zero points.
    """
    each = group.table_rows // group.table_groups
    if group.kind.grid is None:  # scale_table itself takes them in portions
        yield slice(0, 1), slice(0, each)
        return
    together = max(1, _BAND_ROWS // each)
    across = group.kind.grid[1] if group.kind.zero_points else 1
    step = each if each <= _BAND_ROWS else max(1, _BAND_ROWS // across) * across
    for source in range(0, group.sources, together):
        for row in range(0, each, step):
            yield slice(source, min(source + together, group.sources)), slice(row, min(row + step, each))


def _zero_points(group: ScaleGroup, window: Tensor, sources: slice, rows: slice) -> Tensor | None:
    """The codes that stand for zero under some scales, 0 to 15."""
    kind = group.kind
    if kind.zero_points is None or kind.grid is None:
        return None
    (packed_rows, first), (_, across) = kind.zero_points, kind.grid
    packed = _typed(window, group.zero_points_bytes, group.sources * packed_rows * across, torch.int32)
    start, stop = first + rows.start // across, first + rows.stop // across
    numbers = torch.arange(start, stop, dtype=torch.int32, device=window.device)
    found = packed.view(group.sources, packed_rows, across)[sources].index_select(1, numbers // ZEROS_IN_I32)
    return found.bitwise_right_shift((numbers % ZEROS_IN_I32 * 4)[:, None]).bitwise_and_(15).flatten()


def _global_scales(group: ScaleGroup, window: Tensor, sources: slice, rows: slice) -> Tensor | None:
    """For each row of the table the scale of its source by which its own is multiplied or divided."""
    if not group.kind.has_global:
        return None
    found = _typed(window, group.globals_bytes, group.sources, torch.float32)[sources, None]
    return found.expand(-1, rows.stop - rows.start).flatten()
