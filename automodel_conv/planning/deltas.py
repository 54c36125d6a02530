"""Deltas, which change tensors by the product of two small matrices, and the places of their elements; pure.

A delta is a virtual tensor: nothing ever holds all of it. Pieces connect its elements to those of a tensor, as they
connect a source to a target, so the same algebra carries a delta through a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, reach
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan

Placed = Mapping[int, Sequence[Piece]]
"""Pieces that write deltas into the sources of a plan, by row; ``Piece.source`` is the number of a delta."""


class Delta(NamedTuple):
    """A virtual tensor ``[stack, rows, columns]`` that a module of an adapter describes.

    Its matrix ``e`` is ``scale * B[e] @ A[e]``, where ``A[e]`` is ``[rank, columns]`` and ``B[e]`` is ``[rows, rank]``.
    It is added to tensors. If it has no B, it is a tensor of the adapter that replaces another one.
    """

    module: str
    """Name of the module in the adapter."""
    adapter: int
    """Number of the adapter, of those that are merged together."""
    shape: tuple[int, int, int]
    a: int
    """Row of A in the adapter: ``[stack * rank, columns]``, the matrices of the stack one below the other."""
    b: int | None
    """Row of B in the adapter: ``[rows, rank * stack]``, where the number in the stack varies fastest."""
    rank: int = 0
    scale: float = 1.0
    is_b_grouped: bool = False
    """Whether B is ``[rows, stack * rank]`` instead: the columns of a matrix are next to each other."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def onto(self, offset: int, row_stride: int, column_stride: int, stack_stride: int = 0) -> Piece:
        """Return the piece that writes all elements to a tensor, given the strides in that tensor."""
        _, rows, columns = self.shape
        box = Box(self.shape, (rows * columns, columns, 1), (stack_stride, row_stride, column_stride))
        return Piece(0, box.canonical(), 0, offset)


class Block(NamedTuple):
    """A rectangle of one matrix of a delta, and its place in a contiguous tensor.

    Element ``[row + i * row_step, column + j * column_step]`` of matrix ``matrix`` belongs to element
    ``offset + i * row_stride + j * column_stride`` of the tensor.
    """

    delta: int
    matrix: int
    row: int
    row_step: int
    rows: int
    column: int
    column_step: int
    columns: int
    offset: int
    row_stride: int
    column_stride: int

    @property
    def row_slice(self) -> slice:
        """The rows of the delta's matrix."""
        return slice(self.row, self.row + (self.rows - 1) * self.row_step + 1, self.row_step)

    @property
    def column_slice(self) -> slice:
        """The columns of the delta's matrix."""
        return slice(self.column, self.column + (self.columns - 1) * self.column_step + 1, self.column_step)

    def transposed(self) -> Block:
        """Return the same block of the transposed matrix."""
        return self._replace(
            row=self.column,
            row_step=self.column_step,
            rows=self.columns,
            column=self.row,
            column_step=self.row_step,
            columns=self.rows,
            row_stride=self.column_stride,
            column_stride=self.row_stride,
        )

    @property
    def stop(self) -> int:
        """The element after the last one in the tensor."""
        return self.offset + reach((self.rows, self.columns), (self.row_stride, self.column_stride)) + 1


def through(plan: CopyPlan, placed: Placed) -> dict[str, list[Piece]]:
    """Return the pieces that write deltas into the targets of a plan, by name, given those into its sources.

    Args:
        plan: the plan. Deltas are added to what it writes.
        placed: pieces into the sources.

    Raises:
        UnsupportedError: the places in a target cannot be described, or transformers' own code fills it.
    """
    found: dict[str, list[Piece]] = {}
    for target in plan.targets:
        if any(row in placed for row in target.sources) and (pieces := _into(target, placed, plan)):
            found[target.name] = pieces
    return found


def _into(target: Target, placed: Placed, plan: CopyPlan) -> list[Piece]:
    if target.fallback is not None:
        text = f"{target.name} is computed by transformers' own code, so an adapter cannot be merged into it"
        raise UnsupportedError(message(text, do="load the model, and merge the adapter with PEFT"))
    pieces = []
    for copy in target.copies:
        for piece in copy.pieces():
            row = target.sources[piece.source]
            pieces += chained(_near(placed.get(row, ()), piece), piece, prod(plan.sources.shapes[row]), target.name)
    return pieces


def _near(pieces: Sequence[Piece], read: Piece) -> list[Piece]:
    """Return the pieces whose range of elements meets the range that ``read`` reads."""
    first, last = read.source_offset, read.source_offset + reach(read.box.shape, read.box.source_strides)
    return [
        piece
        for piece in pieces
        if piece.target_offset <= last
        and first <= piece.target_offset + reach(piece.box.shape, piece.box.target_strides)
    ]


def chained(first: Sequence[Piece], second: Piece, numel: int, name: str) -> list[Piece]:
    """Return ``chain`` of these pieces through a tensor of ``numel`` elements, each with the source of the first.

    Raises:
        UnsupportedError: the pieces cannot be chained.
    """
    if not first:
        return []
    try:
        return chain(first, [second], numel)
    except NotAffine as error:
        raise UnsupportedError(
            message(f"the elements of an adapter have no regular places in {name}", found=error)
        ) from error


def blocks_of(pieces: Iterable[Piece], deltas: Sequence[Delta]) -> list[Block]:
    """Return pieces as rectangles of the matrices of their deltas."""
    return [block for piece in pieces for block in _blocks(piece, deltas[piece.source].shape)]


def _blocks(piece: Piece, shape: tuple[int, int, int]) -> Iterator[Block]:
    _, rows, columns = shape
    matrices, row_dims, column_dims = _split_dims(piece.box, rows, columns)
    matrix, within = divmod(piece.source_offset, rows * columns)
    row, column = divmod(within, columns)
    (row_dim, *more_rows), (column_dim, *more_columns) = _longest_first(row_dims), _longest_first(column_dims)
    loops = [*(dim for dim in matrices), *more_rows, *more_columns]
    kinds = [0] * len(matrices) + [1] * len(more_rows) + [2] * len(more_columns)
    for indices in product(*(range(count) for count, _, _ in loops)):
        at, offset = [matrix, row, column], piece.target_offset
        for kind, index, (_, step, stride) in zip(kinds, indices, loops, strict=True):
            at[kind] += index * step
            offset += index * stride
        block = Block(
            piece.source,
            at[0],
            *(at[1], row_dim[1], row_dim[0]),
            *(at[2], column_dim[1], column_dim[0]),
            *(offset, row_dim[2], column_dim[2]),
        )
        if block.row_slice.stop > rows or block.column_slice.stop > columns:
            raise _irregular(piece.box)
        yield block


_Dim = tuple[int, int, int]
"""A dimension: its size, and its steps in a delta's matrices, rows or columns, and in the tensor's elements."""


def _longest_first(dims: list[_Dim]) -> list[_Dim]:
    return sorted(dims, reverse=True) or [(1, 1, 0)]


def _split_dims(box: Box, rows: int, columns: int) -> tuple[list[_Dim], list[_Dim], list[_Dim]]:
    """Divide the dimensions of a box into those over matrices, rows and columns of a delta."""
    dims: tuple[list[_Dim], list[_Dim], list[_Dim]] = [], [], []
    pending = list(zip(*box, strict=True))
    while pending:
        count, step, stride = pending.pop()
        if count == 1:
            continue
        unit, kind, size = 1, 2, columns
        if step >= rows * columns:
            unit, kind, size = rows * columns, 0, count * step
        elif step >= columns:
            unit, kind, size = columns, 1, rows
        inside = size * unit // step  # steps before the next kind of dimension
        if step % unit or (count > inside and ((size * unit) % step or count % inside)):
            raise _irregular(box)
        if count > inside:
            pending.append((count // inside, size * unit, stride * inside))
            count = inside
        dims[kind].append((count, step // unit, stride))
    return dims


def _irregular(box: Box) -> UnsupportedError:
    return UnsupportedError(message("an adapter's matrices would be cut into parts of rows", found=box))
