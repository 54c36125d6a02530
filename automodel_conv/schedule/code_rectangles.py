"""Turn a copy out of a quantized source into rectangles of codes that are decoded straight into its target; pure.

A rectangle has adjacent columns of one matrix, in rows that are equally far apart. A move becomes no rectangles if its
strides do not allow that, or if there would be too many. Its values are then decoded into the window and copied.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from automodel_conv.planning.boxes import Box
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.jobs import Move

# With more rectangles than this, one call for each costs more than decoding whole rows and copying.
_MOST_RECTANGLES = 1024


class SourceRectangle(NamedTuple):
    """A rectangle of codes of a source, and the place that its values go to; offsets and strides in elements."""

    element: int
    """Element of the source at the first row and column."""
    shape: tuple[int, int]
    """Rows and columns."""
    row_step: int
    """Rows of the source from one row of the rectangle to the next."""
    target_strides: tuple[int, int]
    """Elements of the target from row to row and from column to column."""
    target: int
    """Number of the tensor that is written; 0 if the values go to the window."""
    target_offset: int
    """Element of the target, or of the window, where the first value goes."""


def find_rectangles(move: Move, source: CodedSource) -> tuple[SourceRectangle, ...] | None:
    """Return the rectangles that decode a move straight into its target, or None if its strides do not allow that."""
    decode = source.decode
    rectangles = _box_rectangles(
        move.box, move.source_offset, source.columns, source.matrix_rows, decode.block[0], decode.bits
    )
    if rectangles is None:
        return None
    return tuple(r._replace(target=move.target, target_offset=move.target_offset + r.target_offset) for r in rectangles)


@lru_cache(maxsize=4096)
def _box_rectangles(
    box: Box,
    source_offset: int,
    columns: int,
    matrix_rows: int,
    block_rows: int,
    bits: int,
) -> tuple[SourceRectangle, ...] | None:
    """Return the rectangles of a source that a box reads, or None if it is not worth a call for each.

    A rectangle has adjacent columns of one matrix, in rows that are equally far apart, and whole bytes of codes. Target
    offsets are relative to the start of the copy. None is returned if the strides of the box do not allow such
    rectangles, or if there are more than ``_MOST_RECTANGLES``.

    Args:
        box: the geometry of the copy.
        source_offset: element of the source where the copy starts.
        columns: elements of a row of the source.
        matrix_rows: rows of a matrix of the source.
        block_rows: rows that share a scale.
        bits: bits per code.
    """
    dims = sorted(d for d in zip(box.source_strides, box.shape, box.target_strides, strict=True) if d[1] != 1)
    repeated = [d for d in dims if not d[0]]
    dims = [d for d in dims if d[0]]
    run, run_stride = 1, 1
    if dims and dims[0][0] == 1:
        _, run, run_stride = dims.pop(0)
    if any(stride % columns for stride, _, _ in dims) or prod(d[1] for d in (*dims[1:], *repeated)) > _MOST_RECTANGLES:
        return None
    # Fields: first element, rows, columns, step between rows, target offset, target stride from row to row.
    pieces: list[tuple[int, int, int, int, int, int]] = []
    column = source_offset % columns
    if column + run <= columns:
        stride, rows, target_stride = dims.pop(0) if dims else (columns, 1, 0)
        pieces.append((source_offset, rows, run, stride // columns, 0, target_stride))
    else:
        head = -column % columns
        body = (run - head) // columns
        tail = run - head - body * columns
        for done, rows, width in ((0, 1, head), (head, body, columns), (head + body * columns, 1, tail)):
            if rows and width:
                pieces.append((source_offset + done, rows, width, 1, done * run_stride, columns * run_stride))
    rectangles = []
    steps = [
        [(stride * n, target_stride * n) for n in range(size)] for stride, size, target_stride in (*dims, *repeated)
    ]
    for offsets in product(*steps):
        source_shift, target_shift = sum(offset[0] for offset in offsets), sum(offset[1] for offset in offsets)
        for element, rows, width, step, target_offset, target_stride in pieces:
            element, target_offset = element + source_shift, target_offset + target_shift
            if bits == 4 and (element % columns % 2 or width % 2):
                return None
            while rows:  # one rectangle for each matrix
                row = element // columns % matrix_rows
                fitting = min(rows, -(-(matrix_rows - row) // step))
                if fitting > 1 and step > 1 and block_rows < matrix_rows and block_rows % step and step % block_rows:
                    return None
                strides = target_stride, run_stride
                rectangles.append(SourceRectangle(element, (fitting, width), step, strides, 0, target_offset))
                element, target_offset = element + fitting * step * columns, target_offset + fitting * target_stride
                rows -= fitting
                if len(rectangles) > _MOST_RECTANGLES:
                    return None
    return tuple(rectangles)
