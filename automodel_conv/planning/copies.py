"""The parts of a plan: strided copies in columns, the targets that they fill, and the sources that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import itemsize, nbytes
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.arrangement import PLAIN, Arrangement
from automodel_conv.planning.boxes import SPAN, Box, Piece, run_of

_LONGEST_NAME = 100


class StridedCopy(NamedTuple):
    """Copies of equal geometry at different offsets, one for each column.

    For each column k and every index i < box.shape:

    ``target[target_offsets[k] + i . target_strides] = source[ordinals[k]][source_offsets[k] + i . source_strides]``

    All strides and offsets are in elements of contiguous tensors; ``ordinals`` index the target's ``sources``.
    """

    box: Box
    ordinals: tuple[int, ...]
    source_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]

    def pieces(self) -> list[Piece]:
        """Return the copies one by one."""
        return [
            Piece(ordinal, self.box, source, target)
            for ordinal, source, target in zip(self.ordinals, self.source_offsets, self.target_offsets, strict=True)
        ]


def over_sources(copy: StridedCopy) -> list[Piece]:
    """Return the pieces of a copy that read the address space of all sources, one for evenly spaced columns."""
    columns = sorted(zip(copy.ordinals, copy.target_offsets, copy.source_offsets, strict=True))
    # A run of evenly spaced columns: first ordinal, source offset, first target offset, count, and both steps.
    runs: list[list[int]] = []
    ordinal = written = read = ordinal_step = target_step = count = 0
    for column_ordinal, column_written, column_read in columns:
        skip, move = column_ordinal - ordinal, column_written - written
        continues = (skip == ordinal_step and move == target_step) if count > 1 else (count and skip > 0 and move > 0)
        ordinal, written = column_ordinal, column_written
        if continues and column_read == read:
            ordinal_step, target_step, count = skip, move, count + 1
            runs[-1][3:] = count, ordinal_step, target_step
        else:
            read, ordinal_step, target_step, count = column_read, 0, 0, 1
            runs.append([ordinal, read, written, 1, 0, 0])
    box = copy.box
    return [
        Piece(
            0,
            Box((count, *box.shape), (ordinal_step * SPAN, *box.source_strides), (target_step, *box.target_strides)),
            ordinal * SPAN + read,
            written,
        )
        for ordinal, read, written, count, ordinal_step, target_step in runs
    ]


def by_source(piece: Piece) -> StridedCopy:
    """Return a piece that reads the address space of all sources as a copy with a column for each source."""
    first, read = divmod(piece.source_offset, SPAN)
    sources, targets = [first], [piece.target_offset]
    inner = []
    for dim in zip(*piece.box, strict=True):
        count, source_step, target_step = dim
        if source_step < SPAN:
            inner.append(dim)
        else:
            sources = [source + i * (source_step // SPAN) for source in sources for i in range(count)]
            targets = [target + i * target_step for target in targets for i in range(count)]
    shape, source_strides, target_strides = tuple(zip(*inner, strict=True)) or ((), (), ())
    box = Box(shape, source_strides, target_strides).canonical()
    return StridedCopy(box, tuple(sources), (read,) * len(sources), tuple(targets))


def group_copies(copies: Sequence[StridedCopy]) -> tuple[StridedCopy, ...]:
    """Return the same copies as ``group_pieces`` of all their pieces.

    ``Piece`` objects are built only if a source is in two columns. No two columns may write at the same offset.
    """
    sources = [source for copy in copies for source in copy.ordinals]
    if len(set(sources)) < len(sources):
        return group_pieces([piece for copy in copies for piece in copy.pieces()])
    columns_of: dict[Box, list[tuple[int, int, int]]] = {}
    for copy in copies:
        columns = zip(copy.target_offsets, copy.ordinals, copy.source_offsets, strict=True)
        columns_of.setdefault(copy.box, []).extend(columns)
    grouped = []
    for box, columns in columns_of.items():
        if columns:
            targets, ordinals, reads = zip(*sorted(columns), strict=True)
            grouped.append(StridedCopy(box, ordinals, reads, targets))
    return tuple(sorted(grouped, key=lambda copy: copy.target_offsets[0]))


def group_pieces(pieces: Iterable[Piece]) -> tuple[StridedCopy, ...]:
    """Group pieces of equal boxes as columns, ordered by target offset; runs that continue each other become one."""
    groups: dict[Box, list[Piece]] = {}
    for piece in _join_runs(sorted(pieces, key=lambda p: p.target_offset)):
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


def _join_runs(pieces: Sequence[Piece]) -> list[Piece]:
    """Join runs that continue each other in source and target."""
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
    """Operations that could not be lowered, and that transformers' own ``convert`` runs on whole sources.

    One fallback may fill several targets, which all hold the same object.
    """

    reason: str
    """The reason why the operations could not be lowered."""
    convert: Callable[[Mapping[int, Any]], dict[str, Any]]
    """Function from ``{source row: tensor}`` to ``{target name: tensor}``."""
    on_host: bool = False
    """Whether it runs on the CPU wherever the targets are; otherwise it runs on their device."""


class Fill(NamedTuple):
    """Elements of a target that have one value, which is in no source.

    ``target[offset + i . strides] = value`` for all i < shape, in elements of the contiguous target.
    """

    value: float
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def json_value(self) -> float | str:
        """The value as JSON has it: infinities and NaN are texts."""
        return self.value if isfinite(self.value) else str(self.value)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def piece(self, source: int) -> Piece:
        """Return a copy of one element of a source to all elements."""
        return Piece(source, Box(self.shape, (0,) * len(self.shape), self.strides), 0, self.offset)

    @classmethod
    def of_piece(cls, piece: Piece, value: float) -> Fill:
        """Return what a copy of one element with this value writes."""
        box = piece.box.canonical()
        return cls(value, box.shape, box.target_strides, piece.target_offset)


def zero_rows(shape: Sequence[int], rows: int) -> tuple[Fill, ...]:
    """Return the fills of the last rows (indices of the first dimension) of a tensor with zeros."""
    numel = rows * prod(shape[1:])
    return (Fill(0, (numel,), (1,), prod(shape) - numel),) if numel else ()


class Target(NamedTuple):
    """One tensor to fill, and the copies that fill it."""

    name: str
    dtype: str
    """Dtype code, such as ``"BF16"``."""
    shape: tuple[int, ...]
    rule: int
    """Row of the plan's rules; -1 if the source is only looked up by name."""
    sources: tuple[int, ...]
    """Rows of the plan's source table."""
    copies: tuple[StridedCopy, ...]
    fallback: Fallback | None = None
    """Code of transformers that fills the target instead of copies."""
    fills: tuple[Fill, ...] = ()
    """Elements that no copy fills, because they have a value that is in no source."""

    def __repr__(self) -> str:
        """Return one line without the offsets, which may be thousands."""
        way = f"{len(self.sources)} sources" if self.fallback is None else "transformers' own code"
        return f"<Target {_shortened(self.name)}: {self.dtype} {list(self.shape)} from {way}>"

    @property
    def is_whole(self) -> bool:
        """Whether one copy moves everything in one run, so that a target of its source's size equals the source."""
        is_run = len(self.copies) <= 1 and all(c.box.is_run and len(c.ordinals) == 1 for c in self.copies)
        return is_run and not self.fills

    @property
    def copied_numel(self) -> int:
        """Number of elements that copies fill."""
        return prod(self.shape) - sum(fill.numel for fill in self.fills)

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, prod(self.shape))


def _shortened(name: str) -> str:
    return f"...{name[-_LONGEST_NAME:]}" if len(name) > _LONGEST_NAME else name


CODE_BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "int4": 4, "int8": 8}
"""Bits per code in each format of codes; see ``quantization.py``."""

ZEROS_IN_I32 = 8
"""Number of zero points in an I32, the first in the lowest bits."""


class ZeroPacking(NamedTuple):
    """How zero points are stored in a matrix of I32."""

    by_columns: bool = False
    """Whether the zero points of an element belong to consecutive columns of the grid, not to consecutive rows."""
    added: int = 0
    """Number that is added to an element, modulo ``2 ** 32``, before its zero points are read."""

    def rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the first row that holds zero points of rows ``first`` to ``last`` of the grid, and the row after."""
        return (first, last) if self.by_columns else (first // ZEROS_IN_I32, -(-last // ZEROS_IN_I32))

    def skipped(self, first: int) -> int:
        """Return the number of rows of the grid before row ``first`` that share its row of zero points."""
        return 0 if self.by_columns else first % ZEROS_IN_I32

    def columns(self, grid_columns: int) -> int:
        """Return the number of columns that hold the zero points of a grid."""
        return -(-grid_columns // ZEROS_IN_I32) if self.by_columns else grid_columns


class Decode(NamedTuple):
    """How to compute the values of a quantized source from its codes; see ``quantization.py``.

    The codes are stored in the source's own row of the table. Codes of 4 bits are stored two to a byte, the even column
    in the low half. The other parts are rows of the same table that no target reads by name.
    """

    format: str
    """Format of a code, a key of ``CODE_BITS``."""
    matrix: tuple[int, int]
    """Rows and columns of the source's last two dimensions, as stored.

    If all matrices of a stack share one scale, they count as one matrix.
    """
    block: tuple[int, int]
    """Rows and columns that share a scale. The last blocks of a matrix may be smaller."""
    scales: int
    """Row of the scales."""
    zero_points: int | None = None
    """Row of the zero points, if there are any."""
    global_scale: int | None = None
    """Row of the global scale, if there is one: one F32, or one for each matrix of a stack."""
    divides: bool = False
    """Whether the scale is divided by the global scale instead of multiplied."""
    arrangement: Arrangement = PLAIN
    """How the matrix is viewed as the weight."""
    like_upstream: bool = False
    """Whether values are rounded as transformers rounds them instead of once."""
    zero_packing: ZeroPacking = ZeroPacking()
    """How the zero points are stored, if there are any."""
    scale_word: tuple[int, ...] = ()
    """Sizes of the axes within a word of scales; codes are stored in the reverse order of these axes.

    Empty if scales are stored in the order of the codes.
    """
    global_divisor: int | None = None
    """Row of a tensor like the global scale, which divides it, if there is one.

    Both are rounded to the dtype of the values first, and the quotient to float32.
    """

    @property
    def bits(self) -> int:
        """Bits per code."""
        return CODE_BITS[self.format]

    @property
    def kind(self) -> tuple[object, ...]:
        """All fields except the rows; sources of equal kinds are decoded the same way."""
        code = self.format, self.matrix, self.block, self.arrangement
        return *code, self.divides, self.like_upstream, self.zero_packing, self.scale_word

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of the other parts."""
        return tuple(row for row in self.part_rows if row is not None)

    @property
    def part_rows(self) -> tuple[int | None, ...]:
        """Row of each other part: scales, zero points, global scale and its divisor; None for those it lacks."""
        return self.scales, self.zero_points, self.global_scale, self.global_divisor

    def with_part_rows(self, rows: Sequence[int | None]) -> Decode:
        """Return the same decoding with its parts in other rows, in the order of ``part_rows``."""
        scales, zero_points, global_scale, global_divisor = rows
        return self._replace(
            scales=scales, zero_points=zero_points, global_scale=global_scale, global_divisor=global_divisor
        )


class Places(NamedTuple):
    """The places of the tensors of a checkpoint in its files, in columns."""

    files: tuple[str, ...]
    """Paths or URLs of the files."""
    file_ids: Sequence[int]
    """Index of each tensor's file in ``files``."""
    offsets: Sequence[int]
    """Offset in bytes of each tensor's data from the start of its file."""

    def __repr__(self) -> str:
        return f"<Places: {len(self.offsets)} tensors in {len(self.files)} files>"


@dataclass(frozen=True, repr=False)
class SourceTable:
    """The tensors of a checkpoint or a state dict, in columns: names, dtype codes, shapes."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    decodes: Mapping[int, Decode] = field(default_factory=dict)
    """Quantized tensors by row. Their names, dtypes and shapes are those of the values.

    Decoding produces any floating dtype in one step.
    """
    hidden: frozenset[int] = frozenset()
    """Rows that no target reads by name, such as the parts of quantized tensors."""
    stored: Mapping[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Dtype and shape in the checkpoint of sources whose bytes are read as another dtype, by row."""
    places: Places | None = field(default=None, compare=False, repr=False)
    """Places of the tensors in files, to show them; None if they are in no files. Plans do not depend on them."""

    def __repr__(self) -> str:
        return f"<SourceTable: {len(self.names)} tensors, {len(self.decodes)} of them quantized>"

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> SourceTable:
        """Return the table of a checkpoint, with its tensors as they are stored."""
        places = Places(checkpoint.files, checkpoint.file_ids, checkpoint.offsets)
        return cls(checkpoint.names, checkpoint.dtypes, checkpoint.shapes, places=places)

    def read_as(self, codes: Mapping[int, str]) -> SourceTable:
        """Return this table with the bytes of some sources, by row, read as other dtypes.

        The last dimension then has as many elements as its bytes make; a scalar becomes a dimension. If its bytes make
        no whole number of elements, all dimensions become one.
        """
        dtypes, shapes, stored = list(self.dtypes), list(self.shapes), {}
        for row, code in codes.items():
            if code != dtypes[row]:
                stored[row] = dtypes[row], shapes[row]
                has, reads = itemsize(dtypes[row]), itemsize(code)
                *outer, inner = shapes[row] or (1,)
                is_whole = inner * has % reads == 0
                shapes[row] = (*outer, inner * has // reads) if is_whole else (prod(shapes[row]) * has // reads,)
                dtypes[row] = code
        return replace(self, dtypes=dtypes, shapes=shapes, stored=stored) if stored else self

    def nbytes(self, row: int, numel: int | None = None) -> int:
        """Return the number of bytes that store a source, or ``numel`` of its elements.

        The bytes of a quantized source are those of its codes.

        Args:
            row: row of the source.
            numel: number of elements; None: all.
        """
        numel = prod(self.shapes[row]) if numel is None else numel
        if row in self.decodes:
            return -(-numel * self.decodes[row].bits // 8)
        return nbytes(self.dtypes[row], numel)
