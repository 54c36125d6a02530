"""Decode quantized codes in host memory to numbers in the same memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of, strided
from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.planning.copies import ZEROS_IN_I32
from automodel_conv.schedule.jobs import CodeRectangle, Grid

# Entries of the tables made at a time, where each scale has a row of its own.
TABLE_ENTRIES = 1 << 18


def decode_codes(decodings: Iterable[CodeRectangle], memory: Tensor) -> None:
    """Decode rectangles of codes in ``memory``, uint8 ``[n]`` at a multiple of 64, to numbers that lie there too."""
    for decoding in decodings:
        for rows in _bands(decoding):
            _decode(decoding, rows, memory)


def _bands(decoding: CodeRectangle) -> Iterable[tuple[int, int]]:
    """Rows of a rectangle in portions of whole blocks, of which the tables are not too large."""
    rows, columns = decoding.shape
    block_rows, block_columns = decoding.decode.block
    across = -(-(decoding.start[1] + columns) // block_columns)
    height = max(1, TABLE_ENTRIES // (across << decoding.decode.bits)) * block_rows
    at = -decoding.start[0]
    while at < rows:
        yield max(0, at), min(rows, at + height)
        at += height


def _decode(decoding: CodeRectangle, rows: tuple[int, int], memory: Tensor) -> None:
    first, last = rows
    decode, columns = decoding.decode, decoding.shape[1]
    block_rows, block_columns = decode.block
    start = (decoding.start[0] + first) % block_rows, decoding.start[1]
    top = decoding.block_row + (decoding.start[0] + first) // block_rows
    blocks = (
        slice(top, top + -(-(start[0] + last - first) // block_rows)),
        slice(decoding.block_column, decoding.block_column + -(-(start[1] + columns) // block_columns)),
    )
    scales = _grid(decoding.scales, memory)[blocks].contiguous()
    global_scale = None
    if decoding.global_bytes is not None:
        global_scale = memory[decoding.global_bytes : decoding.global_bytes + 4].view(torch.float32)
    numbers = memory.view(dtype_of(decoding.dtype, "a target"))
    table, table_rows = code_table(
        decode.format,
        scales,
        numbers.dtype,
        zero_points=_zero_points(decoding, blocks, memory),
        global_scale=global_scale,
        divide=decode.divides,
        like_upstream=decode.like_upstream,
    )
    codes_at = decoding.codes_bytes + first * decoding.codes_stride
    numbers_at = decoding.numbers_bytes // numbers.element_size() + first * decoding.numbers_stride
    codes = strided(memory, (last - first, columns * decode.bits // 8), (decoding.codes_stride, 1), codes_at)
    numbers = strided(numbers, (last - first, columns), (decoding.numbers_stride, 1), numbers_at)
    dequantize_torch([numbers], [codes], [table_rows], table, bits=decode.bits, block=decode.block, start=start)


def _grid(grid: Grid, memory: Tensor) -> Tensor:
    typed = memory.view(dtype_of(grid.dtype, "a scale"))
    return strided(typed, grid.shape, (grid.shape[1], 1), grid.start_bytes // typed.element_size())


def _zero_points(decoding: CodeRectangle, blocks: tuple[slice, slice], memory: Tensor) -> Tensor | None:
    """The codes of zero of some blocks."""
    if decoding.zero_points is None:
        return None
    rows = torch.arange(blocks[0].start, blocks[0].stop, device=memory.device) + decoding.zero_row
    packed = _grid(decoding.zero_points, memory)[:, blocks[1]].index_select(0, rows // ZEROS_IN_I32)
    return packed.bitwise_right_shift((rows % ZEROS_IN_I32 * 4).to(torch.int32)[:, None]).bitwise_and_(15)
