"""Decode quantized codes in host memory to values in the same memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of, strided
from automodel_conv.execution.grids import in_code_order, unpacked_zeros
from automodel_conv.kernels.code_tables import code_table, rounded_quotients
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.schedule.jobs import CodeRectangle, Grid

# Maximum entries of a table that is computed at once, if each scale has a row of its own.
TABLE_ENTRIES = 1 << 18


def decode_codes(rectangles: Iterable[CodeRectangle], memory: Tensor) -> None:
    """Decode rectangles of codes to values in the same memory.

    Args:
        rectangles: the places of codes, scales and values in ``memory``.
        memory: uint8 ``[n]``, at a multiple of 64.
    """
    for rectangle in rectangles:
        for rows in _bands(rectangle):
            _decode(rectangle, rows, memory)


def _bands(rectangle: CodeRectangle) -> Iterable[tuple[int, int]]:
    """Divide the rows of a rectangle into bands of whole blocks with tables that are not too large.

    Yields:
        The first row of a band, and the row after its last.
    """
    rows, columns = rectangle.shape
    block_rows, block_columns = rectangle.decode.block
    grid_columns = -(-(rectangle.start[1] + columns) // block_columns)
    height = max(1, TABLE_ENTRIES // (grid_columns << rectangle.decode.bits)) * block_rows
    first = -rectangle.start[0]
    while first < rows:
        yield max(0, first), min(rows, first + height)
        first += height


def _decode(rectangle: CodeRectangle, rows: tuple[int, int], memory: Tensor) -> None:
    """Decode some rows of a rectangle: from the first of ``rows`` to before the second."""
    first, last = rows
    decode, columns = rectangle.decode, rectangle.shape[1]
    block_rows, block_columns = decode.block
    start = (rectangle.start[0] + first) % block_rows, rectangle.start[1]
    top = rectangle.block_row + (rectangle.start[0] + first) // block_rows
    blocks = (
        slice(top, top + -(-(start[0] + last - first) // block_rows)),
        slice(rectangle.block_column, rectangle.block_column + -(-(start[1] + columns) // block_columns)),
    )
    scales = in_code_order(_grid(rectangle.scales, memory)[blocks[0]], decode.scale_word)[:, blocks[1]].contiguous()
    typed = memory.view(dtype_of(rectangle.dtype, "a target"))
    table, table_rows = code_table(
        decode.format,
        scales,
        typed.dtype,
        zero_points=_zero_points(rectangle, blocks, memory),
        global_scale=_global_scale(rectangle, memory, typed.dtype),
        divide=decode.divides,
        like_upstream=decode.like_upstream,
    )
    first_code = rectangle.codes_bytes + first * rectangle.codes_stride
    first_value = rectangle.values_bytes // typed.element_size() + first * rectangle.values_stride
    codes = strided(memory, (last - first, columns * decode.bits // 8), (rectangle.codes_stride, 1), first_code)
    values = strided(typed, (last - first, columns), (rectangle.values_stride, 1), first_value)
    dequantize_torch([values], [codes], [table_rows], table, bits=decode.bits, block=decode.block, start=start)


def _grid(grid: Grid, memory: Tensor) -> Tensor:
    """Return a view of a grid in memory, ``grid.shape``."""
    typed = memory.view(dtype_of(grid.dtype, "a scale"))
    return strided(typed, grid.shape, (grid.shape[1], 1), grid.start_bytes // typed.element_size())


def _global_scale(rectangle: CodeRectangle, memory: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the global scale, float32 ``[1]``; None if there is none.

    Args:
        rectangle: the places in ``memory``.
        memory: the memory.
        dtype: dtype of the values.
    """
    if rectangle.global_bytes is None:
        return None
    stored = memory[rectangle.global_bytes :][: 4 * (1 + rectangle.has_divisor)].view(torch.float32)
    return rounded_quotients(stored[:1], stored[1:], dtype) if rectangle.has_divisor else stored


def _zero_points(rectangle: CodeRectangle, blocks: tuple[slice, slice], memory: Tensor) -> Tensor | None:
    """Return the zero points of a range of blocks, 0 to 15, int32 ``[rows, columns]``; None if there are none."""
    if rectangle.zero_points is None:
        return None
    rows, skipped = blocks[0].stop - blocks[0].start, rectangle.zero_row + blocks[0].start
    packed, packing = _grid(rectangle.zero_points, memory), rectangle.decode.zero_packing
    return unpacked_zeros(packed, packing, skipped, (rows, rectangle.scales.shape[1]))[:, blocks[1]]
