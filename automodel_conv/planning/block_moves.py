"""Determine whether copies move the codes of whole blocks; pure.

Codes may move to another matrix, and rows and columns may be swapped, but each block must still be one. A block that
mixes rows of gate and up, or whose sides are swapped, is not one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from automodel_conv.planning.copies import Decode, StridedCopy

Matrix = tuple[int, int]
"""Number of rows and number of columns."""
_ROW, _COLUMN, _MATRIX = range(3)  # axes of a stack of matrices
_STRAIGHT, _TRANSPOSED = (_ROW, _COLUMN, _MATRIX), (_COLUMN, _ROW, _MATRIX)


def has_same_blocks(source: Decode, target: Decode, copies: Sequence[StridedCopy], ordinal: int) -> bool:
    """Return whether copies map every block of one source onto a block of the target, all in the same orientation.

    Args:
        copies: the target's copies, of all sources.
        ordinal: ordinal of the source.
    """
    copies = [copy for copy in copies if ordinal in copy.ordinals]
    return any(
        source.block == (target.block[order[_ROW]], target.block[order[_COLUMN]])
        and all(_moves_blocks(copy, ordinal, source, target, order) for copy in copies)
        for order in (_STRAIGHT, _TRANSPOSED)
    )


def _moves_blocks(copy: StridedCopy, ordinal: int, source: Decode, target: Decode, order: Sequence[int]) -> bool:
    """Return whether a copy moves rows and columns of its elements by multiples of the sides of a block.

    Args:
        order: axes of the target's matrices, in the order of the source's.
    """
    extents = [1, 1]
    for size, step, new_step in _by_axis(copy, source.matrix, target.matrix):
        axis, new_axis = _axis(size, step, source.matrix), _axis(size, new_step, target.matrix)
        if axis is None or new_axis != order[axis]:
            return False
        if axis != _MATRIX:
            extents[axis] = size
    for column_ordinal, read, written in zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True):
        start, new_start = _position(read, source.matrix), _position(written, target.matrix)
        for axis in (_ROW, _COLUMN) if column_ordinal == ordinal else ():
            first, new_first, extent = start[axis], new_start[order[axis]], extents[axis]
            fits = first + extent <= source.matrix[axis] and new_first + extent <= target.matrix[order[axis]]
            if not fits or (first - new_first) % source.block[axis]:
                return False
    return True


def _by_axis(copy: StridedCopy, source: Matrix, target: Matrix) -> Iterator[tuple[int, int, int]]:
    """Yield size and steps of each dimension of a copy, with runs of whole rows or matrices divided into both."""
    (rows, columns), (new_rows, new_columns) = source, target
    # All elements have the same order on both sides, also if a matrix of one row becomes one of one column.
    same_order = source == target or (min(source) == 1 and source == target[::-1])
    for size, step, new_step in zip(*copy.box, strict=True):
        if step == new_step == 1 and same_order and size % (rows * columns) == 0:
            yield size // (rows * columns), rows * columns, rows * columns
            size = rows * columns
        if step == new_step == 1 and columns == new_columns and size % columns == 0:
            yield size // columns, columns, columns
            size = columns
        elif (step, new_step) == (columns, new_columns) and rows == new_rows and size % rows == 0:
            yield size // rows, rows * columns, rows * new_columns
            size = rows
        yield size, step, new_step


def _axis(size: int, step: int, matrix: Matrix) -> int | None:
    """Return the axis along which a dimension of a copy goes; None if it separates neighbours, as interleaving does.

    A dimension of size 1 goes along any axis, and is reported as one that goes from matrix to matrix.
    """
    rows, columns = matrix
    if size == 1 or step % (rows * columns) == 0:
        return _MATRIX
    if step == 1 and size <= columns:
        return _COLUMN
    return _ROW if step == columns and size <= rows else None


def _position(offset: int, matrix: Matrix) -> tuple[int, int]:
    """Return the row and column of an element in a stack of matrices."""
    rows, columns = matrix
    return offset // columns % rows, offset % columns
