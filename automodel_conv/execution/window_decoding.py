"""Decode codes in windows of device memory: one table for each group of scales, one call for equal rectangles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of, strided
from automodel_conv.execution.grids import in_code_order, unpacked_zeros
from automodel_conv.kernels.address_table import Matrices, at_addresses
from automodel_conv.kernels.code_tables import (
    byte_scale_table,
    byte_scale_values,
    check_table,
    prepare_scale_table,
    rounded_quotients,
    scale_table,
)
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.kernels.launch import Launches
from automodel_conv.schedule.code_slabs import BYTE_SCALES, Position, Rectangle, ScaleKind
from automodel_conv.schedule.code_windows import ScaleGroup

# Maximum rows of a table that are computed at once, if each needs scratch for its zero point or its global scale.
_BAND_ROWS = 1 << 16


class WindowDecoder:
    """The decoder of all windows of one load; it works on the current stream and never waits for the device.

    Everything that windows share is computed first: tables that do not depend on scales, and the values of scales of
    one byte.
    """

    def __init__(self, groups: Iterable[ScaleGroup], tensors: Sequence[Tensor], device: torch.device):
        """Compute everything that windows share.

        Args:
            groups: the groups of scales of all windows.
            tensors: the targets, by number.
            device: the device of windows and targets.

        Raises:
            UnsupportedError: codes cannot be decoded to the dtype of a target.
        """
        self._tensors = tensors
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._tables: dict[ScaleKind, Tensor] = {}
        self._byte_values: dict[ScaleKind, Tensor] = {}
        for kind in {group.kind for group in groups}:
            scale_dtype, value_dtype = _dtype(kind.scale_dtype), _dtype(kind.value_dtype)
            check_table(kind.format, scale_dtype, value_dtype)
            if kind.is_shared:
                self._tables[kind] = byte_scale_table(kind.format, scale_dtype, value_dtype, kind.like_upstream, device)
                continue
            if scale_dtype.itemsize == 1:
                self._byte_values[kind] = byte_scale_values(scale_dtype, kind.like_upstream, device)
                scale_dtype = torch.float32
            prepare_scale_table(kind.format, scale_dtype, kind.has_global, device)

    def compute_tables(self, groups: Iterable[ScaleGroup], window: Tensor) -> None:
        """Compute the tables of a window's scales, in the window."""
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
        """Return the scales that rows of the table are computed from."""
        kind, count = group.kind, sources.stop - sources.start
        if kind.scale_is_table_row:
            return self._byte_values[kind].repeat(count)
        dtype = _dtype(kind.scale_dtype)
        stored = _typed(window, group.scales_bytes, group.count, dtype if dtype.itemsize > 1 else torch.uint8)
        scales = in_code_order(stored.view(group.table_groups, -1)[sources, rows].flatten(), kind.scale_word)
        return scales if dtype.itemsize > 1 else self._byte_values[kind].index_select(0, scales.to(torch.int32))

    def _table(self, group: ScaleGroup, window: Tensor) -> Tensor:
        """Return the table of a group, ``[rows, codes]``: the one that all windows share, or the one in the window."""
        if group.kind.is_shared:
            return self._tables[group.kind]
        codes, value_dtype = 1 << group.kind.bits, _dtype(group.kind.value_dtype)
        return _typed(window, group.table_bytes, group.table_rows * codes, value_dtype).view(-1, codes)

    def launches(self, rectangle: Rectangle, places: Sequence[Position], group: ScaleGroup, window: Tensor) -> Launches:
        """Return the launches that decode equal rectangles of a window."""
        from automodel_conv.kernels.dequantize import dequantize_launches  # deferred, because it imports Triton

        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, device = kind.bits, window.device
        table, dtype = self._table(group, window), _dtype(kind.value_dtype)
        targets, offsets, codes_bytes, scales, sources = np.array(places, np.int64).T
        bases = window.data_ptr() if rectangle.in_window else self._addresses[targets]
        starts = bases + offsets * dtype.itemsize
        row_stride, column_stride = rectangle.target_strides
        is_transposed = min(rows, columns) > 1 and row_stride < column_stride
        shape = (columns, rows) if is_transposed else (rows, columns)
        table_rows, tables = self._table_rows_and_tables(
            scales, sources, group, window, table, (rows, rectangle.scales_stride)
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
        """Return, for each rectangle, the table rows of its blocks and its table.

        Args:
            scales: index in the group of the scale of each rectangle's first block.
            sources: index in the group of the source of each rectangle.
            group: the group of scales.
            window: the memory of the window.
            table: the table of the group.
            shape: rows of a rectangle, and scales from one row of blocks to the next.
        """
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
        """Decode equal rectangles of a window with torch, one after another."""
        kind, (rows, columns) = rectangle.kind, rectangle.shape
        bits, table, dtype = kind.bits, self._table(group, window), _dtype(kind.value_dtype)
        grid = tuple(
            -(-(size + start) // block)
            for size, start, block in zip(rectangle.shape, rectangle.start, rectangle.block, strict=True)
        )
        scratch = window.view(dtype)
        for target, target_offset, codes_bytes, scale, source in places:
            output = scratch if rectangle.in_window else self._tensors[target]
            if kind.scale_is_table_row:
                table_rows = strided(window, grid, (rectangle.scales_stride, 1), group.scales_bytes + scale)
            else:
                table_rows = strided(_table_rows(group, window), grid, (rectangle.scales_stride, 1), scale)
            source_table = table
            if kind.has_table_for_each_source:
                source_table = table[source * BYTE_SCALES : (source + 1) * BYTE_SCALES]
            dequantize_torch(
                [strided(output, rectangle.shape, rectangle.target_strides, target_offset)],
                [strided(window, (rows, columns * bits // 8), (rectangle.codes_stride, 1), codes_bytes)],
                [table_rows],
                source_table,
                bits=bits,
                block=rectangle.block,
                start=rectangle.start,
            )


def _dtype(code: str) -> torch.dtype:
    return dtype_of(code, "a quantized tensor")


def _typed(window: Tensor, start_bytes: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return a view of ``count`` elements of a window; ``start_bytes`` is a multiple of their size."""
    return window[start_bytes : start_bytes + count * dtype.itemsize].view(dtype)


def _table_rows(group: ScaleGroup, window: Tensor) -> Tensor:
    """Return the table row of each scale of a group, int32 ``[count]``: scale ``n`` has row ``n``."""
    return _typed(window, group.table_rows_bytes, group.count, torch.int32)


def _bands(group: ScaleGroup) -> Iterator[tuple[slice, slice]]:
    """Divide the rows of a group's table into bands that need little scratch.

    Rows are whole rows of blocks if there are zero points.

    Yields:
        The sources of a band, and the rows of each of these sources.
    """
    source_rows = group.table_rows // group.table_groups
    if group.kind.grid is None:  # scale_table divides the rows itself
        yield slice(0, 1), slice(0, source_rows)
        return
    band_sources = max(1, _BAND_ROWS // source_rows)
    grid_columns = group.kind.grid[1] if group.kind.zero_points else 1
    band_rows = source_rows if source_rows <= _BAND_ROWS else max(1, _BAND_ROWS // grid_columns) * grid_columns
    for source in range(0, group.sources, band_sources):
        for row in range(0, source_rows, band_rows):
            yield (
                slice(source, min(source + band_sources, group.sources)),
                slice(row, min(row + band_rows, source_rows)),
            )


def _zero_points(group: ScaleGroup, window: Tensor, sources: slice, rows: slice) -> Tensor | None:
    """Return the zero points of table rows ``rows`` of ``sources``, 0 to 15, int32 ``[n]``; None if there are none."""
    kind = group.kind
    if kind.zero_points is None or kind.grid is None:
        return None
    (packed_rows, first), (_, grid_columns) = kind.zero_points, kind.grid
    packed_columns = kind.zero_packing.columns(grid_columns)
    packed = _typed(window, group.zero_points_bytes, group.sources * packed_rows * packed_columns, torch.int32)
    packed = packed.view(group.sources, packed_rows, packed_columns)[sources]
    shape = (rows.stop - rows.start) // grid_columns, grid_columns
    return unpacked_zeros(packed, kind.zero_packing, first + rows.start // grid_columns, shape).flatten()


def _global_scales(group: ScaleGroup, window: Tensor, sources: slice, rows: slice) -> Tensor | None:
    """Return the global scale for each of the ``rows`` of ``sources``, float32 ``[n]``; None if sources have none."""
    if not group.kind.has_global:
        return None
    count = group.sources * (1 + group.kind.has_divisor)
    stored = _typed(window, group.globals_bytes, count, torch.float32).view(-1, group.sources)[:, sources, None]
    global_scales = stored[0]
    if group.kind.has_divisor:
        global_scales = rounded_quotients(stored[0], stored[1], _dtype(group.kind.value_dtype))
    return global_scales.expand(-1, rows.stop - rows.start).flatten()
