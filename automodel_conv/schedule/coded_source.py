"""A quantized source as stored: rows of codes in matrices, and the grid of blocks that share a scale; pure."""

from __future__ import annotations

from collections.abc import Iterator

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import ZEROS_IN_I32, Decode

GLOBAL_BYTES = 4
"""Bytes of a global scale, F32."""


def geometry_of(row: int, decode: Decode, checkpoint: Checkpoint) -> tuple[object, ...]:
    """Return all that a ``CodedSource`` depends on, except its dtype and the places of its parts.

    Sources of equal geometry are cut into the same slabs.
    """
    dtypes, nbytes = checkpoint.dtypes, checkpoint.nbytes
    parts = [None if part is None else (dtypes[part], nbytes[part]) for part in decode.part_rows]
    return nbytes[row], decode.kind, *parts


class CodedSource:
    """A quantized source of a checkpoint, and the dtype that its codes are decoded to.

    Attributes:
        columns: elements of a row.
        section: elements that share a global scale: a matrix if each has its own, else the whole source. Nothing that
            is decoded at once reaches into two sections.
        matrix_rows: rows of a matrix. Consecutive matrices of a section count as one if blocks do not end within them.
        grid_rows: rows of blocks of a matrix of ``matrix_rows`` rows.
        grid_columns: blocks, and so scales, of a row of blocks.
        zero_columns: elements of a row of packed zero points, if there are any.
        numel: elements of the whole source.
    """

    def __init__(self, row: int, decode: Decode, checkpoint: Checkpoint, dtype: str):
        self.row, self.decode, self.checkpoint, self.dtype = row, decode, checkpoint, dtype
        rows, self.columns = decode.matrix
        self.numel = checkpoint.nbytes[row] * 8 // decode.bits
        block_rows, block_columns = decode.block
        self.grid_rows, self.grid_columns = -(-rows // block_rows), -(-self.columns // block_columns)
        self.zero_columns = decode.zero_packing.columns(self.grid_columns)
        self.matrix_rows = rows
        matrix = rows * self.columns
        own_global = decode.global_scale is not None and checkpoint.nbytes[decode.global_scale] > GLOBAL_BYTES
        self.section = matrix if own_global else self.numel
        if rows % block_rows == 0:
            matrices = self.section // matrix
            self.matrix_rows, self.grid_rows = rows * matrices, self.grid_rows * matrices

    @property
    def scales_per_element(self) -> float:
        """Average number of scales for an element; larger if blocks are cut off at the end of each matrix."""
        return self.grid_columns * self.grid_rows / (self.columns * self.matrix_rows)

    def global_bytes(self, element: int) -> int:
        """Return the offset of the global scale of an element among the global scales."""
        return element // self.section * GLOBAL_BYTES

    @property
    def zero_words_per_element(self) -> float:
        """Average number of elements of packed zero points for an element."""
        rows = self.grid_rows if self.decode.zero_packing.by_columns else self.grid_rows / ZEROS_IN_I32
        return self.zero_columns * rows / (self.columns * self.matrix_rows)

    def block_row(self, element: int) -> int:
        """Return the row of blocks that contains an element, counted over all matrices."""
        matrix, row = divmod(element // self.columns, self.matrix_rows)
        return matrix * self.grid_rows + row // self.decode.block[0]

    def rectangles(self, start: int, stop: int, columns: tuple[int, int]) -> Iterator[tuple[int, int, int, int, int]]:
        """Divide elements ``start`` to ``stop`` into rectangles, each within one matrix.

        Args:
            start, stop: the range of elements.
            columns: the range of columns to keep; parts of rows outside it are left out.

        Yields:
            The first element of a rectangle, its first row and the row after its last, counted within the matrix, and
            its first column and the column after its last.
        """
        element = start
        while element < stop:
            matrix, row = divmod(element // self.columns, self.matrix_rows)
            first = element % self.columns
            matrix_stop = min(stop, (matrix + 1) * self.matrix_rows * self.columns)
            whole_rows = (matrix_stop - element) // self.columns
            if first or not whole_rows:
                rows, last = 1, min(self.columns, first + matrix_stop - element)
            else:
                rows, last = whole_rows, self.columns
            left, right = max(first, columns[0]), min(last, columns[1])
            if left < right:
                yield element - first + left, row, row + rows, left, right
            element += rows * self.columns - first if rows > 1 or last == self.columns else last - first
