"""What plans are made of: strided copies in columns, the targets they fill, the sources they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import nbytes
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.boxes import Box, Piece, run_of


class StridedCopy(NamedTuple):
    """Equal copies at different places: for each column k and every index i < box.shape,

    ``target[target_offsets[k] + i . target_strides] = source[ordinals[k]][source_offsets[k] + i . source_strides]``

    All strides and offsets are in elements of contiguous tensors; ``ordinals`` index the target's ``sources``.
    """

    box: Box
    ordinals: tuple[int, ...]
    source_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]

    def pieces(self) -> list[Piece]:
        """The copies one by one."""
        return [
            Piece(ordinal, self.box, source, target)
            for ordinal, source, target in zip(self.ordinals, self.source_offsets, self.target_offsets, strict=True)
        ]


SPAN = 1 << 64
"""From the first element of one source to that of the next, where all sources lie in one long row; none is as long.

There a walk over sources is a dimension like any other, so that one piece can read thousands of them.
"""


def over_sources(copy: StridedCopy) -> list[Piece]:
    """The pieces of a copy, which read the row of all sources: one for columns that are evenly spaced."""
    columns = sorted(zip(copy.ordinals, copy.target_offsets, copy.source_offsets, strict=True))
    runs: list[list[int]] = []  # of columns: source, place in it, place in the target; how many, how far apart each
    ordinal = written = read = skip = apart = count = 0
    for column_ordinal, column_written, column_read in columns:
        skips, moves = column_ordinal - ordinal, column_written - written
        goes_on = (skips == skip and moves == apart) if count > 1 else (count and skips > 0 and moves > 0)
        ordinal, written = column_ordinal, column_written
        if goes_on and column_read == read:
            skip, apart, count = skips, moves, count + 1
            runs[-1][3:] = count, skip, apart
        else:
            read, skip, apart, count = column_read, 0, 0, 1
            runs.append([ordinal, read, written, 1, 0, 0])
    box = copy.box
    return [
        Piece(
            0,
            Box((count, *box.shape), (skip * SPAN, *box.source_strides), (apart, *box.target_strides)),
            ordinal * SPAN + read,
            written,
        )
        for ordinal, read, written, count, skip, apart in runs
    ]


def by_source(piece: Piece) -> StridedCopy:
    """A piece that reads the row of all sources, as a copy with a column for each source."""
    first, read = divmod(piece.source_offset, SPAN)
    sources, targets = [first], [piece.target_offset]
    inner = []
    for dim in zip(*piece.box, strict=True):
        count, step, apart = dim
        if step < SPAN:
            inner.append(dim)
        else:
            skip = step // SPAN
            sources = [source + i * skip for source in sources for i in range(count)]
            targets = [target + i * apart for target in targets for i in range(count)]
    shape, source_strides, target_strides = tuple(zip(*inner, strict=True)) or ((), (), ())
    box = Box(shape, source_strides, target_strides).canonical()
    return StridedCopy(box, tuple(sources), (read,) * len(sources), tuple(targets))


def group_copies(copies: Sequence[StridedCopy]) -> tuple[StridedCopy, ...]:
    """As ``group_pieces`` of the pieces of all copies, with ``Piece`` objects only if a source is in two columns.

    No two columns write from the same place.
    """
    sources = [source for copy in copies for source in copy.ordinals]
    if len(set(sources)) < len(sources):
        return group_pieces([piece for copy in copies for piece in copy.pieces()])
    alike: dict[Box, list[tuple[int, int, int]]] = {}
    for copy in copies:
        columns = zip(copy.target_offsets, copy.ordinals, copy.source_offsets, strict=True)
        alike.setdefault(copy.box, []).extend(columns)
    grouped = []
    for box, columns_of_box in alike.items():
        if columns_of_box:
            targets, ordinals, reads = zip(*sorted(columns_of_box), strict=True)
            grouped.append(StridedCopy(box, ordinals, reads, targets))
    return tuple(sorted(grouped, key=lambda copy: copy.target_offsets[0]))


def group_pieces(pieces: Iterable[Piece]) -> tuple[StridedCopy, ...]:
    """Pieces of equal boxes as columns, ordered by where they write; runs that follow each other become one."""
    groups: dict[Box, list[Piece]] = {}
    for piece in _joined(sorted(pieces, key=lambda p: p.target_offset)):
        groups.setdefault(piece.box, []).append(piece)
    return tuple(
        StridedCopy(
            box,
            tuple(p.source for p in group),
            tuple(p.source_offset for p in group),
            tuple(p.target_offset for p in group),
        )
        for box, group in groups.items()
    )


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Runs that continue each other in source and target, as one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].source == piece.source and joined[-1].box.is_run and piece.box.is_run:
            before, numel = joined[-1], joined[-1].box.numel
            ends = before.source_offset + numel, before.target_offset + numel
            if ends == (piece.source_offset, piece.target_offset):
                joined[-1] = before._replace(box=run_of(numel + piece.box.numel))
                continue
        joined.append(piece)
    return joined


class Fallback(NamedTuple):
    """Operations that could not be lowered, to be run by upstream's own ``convert`` on whole sources.

    One fallback may make several targets; they all carry the same object.
    """

    reason: str
    convert: Callable[[Mapping[int, Any]], dict[str, Any]]  # source row -> tensor, to target name -> tensor
    on_host: bool = False  # wherever the targets are; else where they are


class Target(NamedTuple):
    """One tensor to be made: its copies read ``sources`` (rows of the plan's source table)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: int  # row of the plan's rules; -1 where a name is only looked up
    sources: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    fallback: Fallback | None = None

    @property
    def is_whole(self) -> bool:
        """True if one copy moves everything in one run, so that a target of its source's size equals it."""
        return len(self.copies) <= 1 and all(c.box.is_run and len(c.ordinals) == 1 for c in self.copies)

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, prod(self.shape))


CODE_BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "int4": 4}
"""The formats of codes, and how many bits a code has; see ``quantization.py``."""

ZEROS_IN_I32 = 8
"""Zero points in an I32, of rows that follow each other, the first in the lowest bits."""


class Decode(NamedTuple):
    """How the elements of a quantized source come out of its codes; see ``quantization.py``.

    The codes are stored under the source's own row, two to a byte where they have 4 bits, the even column in the low
    half. The other parts are rows of the same table, which no target takes by their names.
    """

    format: str
    """Of a code, one of ``CODE_BITS``."""
    matrix: tuple[int, int]
    """Rows and columns of the source's last two dimensions, as stored."""
    block: tuple[int, int]
    """Rows and columns that share a scale, the last ones of a matrix perhaps fewer."""
    scales: int
    zero_points: int | None = None
    global_scale: int | None = None
    divides: bool = False
    """The scale is divided by the global one, not multiplied."""
    stored_transposed: bool = False
    """The last two dimensions are meant in the other order than they are stored in."""
    like_upstream: bool = False
    """Round as transformers does, not once."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return CODE_BITS[self.format]

    @property
    def kind(self) -> tuple[object, ...]:
        """All fields except the rows; sources of equal kinds decode alike."""
        return self.format, self.matrix, self.block, self.divides, self.stored_transposed, self.like_upstream

    @property
    def parts(self) -> tuple[int, ...]:
        """The rows beside the source's own."""
        return tuple(row for row in (self.scales, self.zero_points, self.global_scale) if row is not None)


@dataclass(frozen=True)
class SourceTable:
    """What a checkpoint or a state dict offers, in columns: names, dtype codes, shapes.

    A row in ``decodes`` is a quantized tensor under the name, shape and dtype of what it stands for; it becomes any
    floating dtype in one step. Rows in ``hidden`` are parts of others and have no name that a target could take.
    """

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    decodes: Mapping[int, Decode] = field(default_factory=dict)
    hidden: frozenset[int] = frozenset()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> SourceTable:
        """Return the table of a checkpoint, with its tensors as they are stored."""
        return cls(checkpoint.names, checkpoint.dtypes, checkpoint.shapes)

    def nbytes(self, row: int, numel: int | None = None) -> int:
        """Bytes that a source, or so many of its elements, are stored in; of a quantized one those of its codes."""
        numel = prod(self.shapes[row]) if numel is None else numel
        if row in self.decodes:
            return -(-numel * self.decodes[row].bits // 8)
        return nbytes(self.dtypes[row], numel)
