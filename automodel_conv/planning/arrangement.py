"""The arrangement of codes: how the matrix that they are stored in is viewed as the weight.

Codes and scales have one grid of blocks in the stored matrix. The weight is a strided view of its decoded values, so
the copies of a plan contain the arrangement, and the code that decodes has no notion of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.planning.values import Value, narrow, permute, reshape

_LETTERS = "rwabcdef"


class Arrangement(NamedTuple):
    """How a stored matrix is viewed as a weight.

    The stored matrix has these axes: 0 is its rows, 1 the words of a row, and 2 and up are the axes within a word.

    Example:
        >>> str(TRANSPOSED), str(rows_in_words(8).transposed())
        ('r w -> w r', 'r (w a) -> w (r a)')
    """

    word: tuple[int, ...] = ()
    """Sizes of the axes within a word. Their product is the number of columns of a word."""
    rows: tuple[int, ...] = (0,)
    """Axes that form the rows of the weight, the outermost first."""
    columns: tuple[int, ...] = (1,)
    """Axes that form the columns of the weight, the outermost first."""
    width: int | None = None
    """Number of columns of the weight if each of its rows ends in padding; None if no row does."""

    def transposed(self) -> Arrangement:
        """Return the arrangement of the transposed weight, without padding."""
        return Arrangement(self.word, self.columns, self.rows)

    def shape(self, matrix: tuple[int, int]) -> tuple[int, int] | None:
        """Return rows and columns of the weight that a stored matrix is viewed as; None if it does not fit."""
        axes = 2 + len(self.word)
        if sorted((*self.rows, *self.columns)) != list(range(axes)) or min(self.word, default=1) < 1:
            return None
        if matrix[1] % prod(self.word):
            return None
        sizes = self._sizes(matrix)
        rows, columns = (prod(sizes[axis] for axis in side) for side in (self.rows, self.columns))
        if self.width is not None and not 0 <= self.width <= columns:
            return None
        return rows, columns if self.width is None else self.width

    def view(self, stored: Value) -> Value:
        """Return the weight as a view of its stored matrix, or of a stack of matrices.

        Args:
            stored: values that are decoded as they are stored; ``shape`` of its last two dimensions is not None.
        """
        *lead, rows, columns = stored.shape
        sizes = self._sizes((rows, columns))
        order = [*range(len(lead)), *(len(lead) + axis for axis in (*self.rows, *self.columns))]
        moved = permute(reshape(stored, (*lead, *sizes)), order)
        whole = [prod(sizes[axis] for axis in side) for side in (self.rows, self.columns)]
        weight = reshape(moved, (*lead, *whole))
        return weight if self.width is None else narrow(weight, -1, 0, self.width)

    def _sizes(self, matrix: tuple[int, int]) -> tuple[int, ...]:
        """Return the size of each axis of a stored matrix."""
        return matrix[0], matrix[1] // prod(self.word), *self.word

    def __str__(self) -> str:
        stored, rows, columns = (_group(axes) for axes in (range(1, 2 + len(self.word)), self.rows, self.columns))
        text = f"{_LETTERS[0]} {stored} -> {rows} {columns}"
        return text if self.width is None else f"{text}, {self.width} columns"


def _group(axes: Sequence[int]) -> str:
    """Return axes as einops writes them, in parentheses if there are several."""
    text = " ".join(_LETTERS[axis] for axis in axes)
    return text if len(axes) == 1 else f"({text})"


PLAIN = Arrangement()
"""The stored matrix is the weight."""
TRANSPOSED = PLAIN.transposed()
"""The stored matrix is the transposed weight."""


def rows_in_words(size: int) -> Arrangement:
    """Return the arrangement in which a word holds the elements of ``size`` consecutive rows in one column."""
    return Arrangement((size,), rows=(0, 2), columns=(1,))


def permuted_words(*sizes: int) -> Arrangement:
    """Return the arrangement in which the columns of a word are stored in the reverse order of its axes.

    ``permuted_words(2, 4)`` stores columns 0, 2, 4, 6, 1, 3, 5, 7.

    Args:
        sizes: sizes of the axes within a word, as stored.
    """
    inner = range(len(sizes) + 1, 1, -1)
    return Arrangement(sizes, columns=(1, *inner))
