"""Turn a copy out of a quantized source into rectangles of codes, which are decoded straight into the target; pure."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from automodel_conv.planning.boxes import Box
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.jobs import Move

# A copy that is more rectangles than this is not worth a call for each.
_MOST_RECTANGLES = 1024


class SourceRectangle(NamedTuple):
    """A rectangle of a source: where it begins, and where it goes."""

    element: int
    shape: tuple[int, int]
    row_step: int
    """Rows of the source from one row of the rectangle to the next."""
    target_strides: tuple[int, int]
    target: int
    """Which of the tensors that are written; 0 where it goes to the window."""
    target_offset: int


def rectangles_of(move: Move, source: CodedSource) -> tuple[SourceRectangle, ...] | None:
    """The rectangles of a source that a copy takes straight to its target; None where its strides do not allow it."""
    decode = source.decode
    found = _rectangles(move.box, move.source_offset, source.columns, source.height, decode.block[0], decode.bits)
    if found is None:
        return None
    return tuple(r._replace(target=move.target, target_offset=move.target_offset + r.target_offset) for r in found)


@lru_cache(maxsize=4096)
def _rectangles(
    box: Box,
    source_offset: int,
    columns: int,
    height: int,
    block_rows: int,
    bits: int,
) -> tuple[SourceRectangle, ...] | None:
    """Rectangles of a source of rows of ``columns`` elements, in matrices of ``height`` rows, that a copy reads.

    Their offsets in the target count from where the copy begins. A rectangle has adjacent columns of one matrix, in
    rows that are equally far apart, and whole bytes of codes.
    """
    dims = sorted(d for d in zip(box.source_strides, box.shape, box.target_strides, strict=True) if d[1] != 1)
    repeated = [d for d in dims if not d[0]]
    dims = [d for d in dims if d[0]]
    run, run_stride = 1, 1
    if dims and dims[0][0] == 1:
        _, run, run_stride = dims.pop(0)
    if any(stride % columns for stride, _, _ in dims) or prod(d[1] for d in (*dims[1:], *repeated)) > _MOST_RECTANGLES:
        return None
    # Element, rows, columns, step between rows, offset in the target, its stride from row to row.
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
    found = []
    steps = [[(stride * n, to * n) for n in range(size)] for stride, size, to in (*dims, *repeated)]
    for places in product(*steps):
        moved, target = sum(place[0] for place in places), sum(place[1] for place in places)
        for element, rows, width, step, target_offset, target_stride in pieces:
            element, target_offset = element + moved, target_offset + target
            if bits == 4 and (element % columns % 2 or width % 2):
                return None
            while rows:  # of one matrix
                row = element // columns % height
                fitting = min(rows, -(-(height - row) // step))
                if fitting > 1 and step > 1 and block_rows < height and block_rows % step and step % block_rows:
                    return None
                strides = target_stride, run_stride
                found.append(SourceRectangle(element, (fitting, width), step, strides, 0, target_offset))
                element, target_offset = element + fitting * step * columns, target_offset + fitting * target_stride
                rows -= fitting
                if len(found) > _MOST_RECTANGLES:
                    return None
    return tuple(found)
