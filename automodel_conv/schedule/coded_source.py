"""How a quantized source is stored: rows of codes in matrices, and the blocks of them that share a scale; pure."""

from __future__ import annotations

from collections.abc import Iterator

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode


class CodedSource:
    """A quantized source and the numbers it becomes."""

    def __init__(self, row: int, decode: Decode, checkpoint: Checkpoint, dtype: str):
        self.row, self.decode, self.checkpoint, self.dtype = row, decode, checkpoint, dtype
        rows, self.columns = decode.matrix
        self.numel = checkpoint.nbytes[row] * 8 // decode.bits
        block_rows, block_columns = decode.block
        self.down, self.across = -(-rows // block_rows), -(-self.columns // block_columns)
        # Matrices that follow each other are one where blocks do not end within them.
        matrices = self.numel // (rows * self.columns)
        self.height = rows if rows % block_rows else rows * matrices
        self.blocks_high = self.down if rows % block_rows else self.down * matrices

    @property
    def scales_per_element(self) -> float:
        """How many scales there are for each element, on average; more where blocks end with their matrix."""
        return self.across * self.blocks_high / (self.columns * self.height)

    def block_row(self, element: int) -> int:
        """The row of blocks in which an element lies, counted over all matrices."""
        matrix, row = divmod(element // self.columns, self.height)
        return matrix * self.blocks_high + row // self.decode.block[0]

    def rectangles(self, start: int, stop: int, columns: tuple[int, int]) -> Iterator[tuple[int, int, int, int, int]]:
        """A range of elements as rectangles: first element, rows, columns; none reaches beyond its matrix."""
        at = start
        while at < stop:
            matrix, row = divmod(at // self.columns, self.height)
            first = at % self.columns
            ends = min(stop, (matrix + 1) * self.height * self.columns)
            whole = (ends - at) // self.columns
            if first or not whole:
                rows, last = 1, min(self.columns, first + ends - at)
            else:
                rows, last = whole, self.columns
            left, right = max(first, columns[0]), min(last, columns[1])
            if left < right:
                yield at - first + left, row, row + rows, left, right
            at += rows * self.columns - first if rows > 1 or last == self.columns else last - first
