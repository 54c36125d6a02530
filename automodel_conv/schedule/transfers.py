"""Moves of elements to a rank in a refit, cut into units of bounded size; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from math import prod
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain
from automodel_conv.planning.copies import StridedCopy
from automodel_conv.planning.plan import CopyPlan


class Move(NamedTuple):
    """A copy of elements of one part of a source to one target; it is sent as one contiguous run."""

    part: int
    """Row of the part among the sources of the plan."""
    target: int
    """Row of the target."""
    piece: Piece
    """The copy, with a canonical box, so the run is in the order of the target; ``piece.source`` has no meaning."""
    itemsize: int
    """Bytes of an element of the target."""
    nbytes: int
    """Bytes that are sent."""


class Repeat(NamedTuple):
    """A copy from one target to another, which takes the same elements of a part."""

    target: int
    """Row of the target that is written."""
    first: int
    """Row of the target that is read."""
    piece: Piece


class Transfers(NamedTuple):
    """The copies that fill the targets of a plan."""

    moves: list[Move]
    """Copies from parts, in the order of the targets and of their elements."""
    repeats: list[Repeat]
    """Copies that follow on the receiver."""


def transfers_of(plan: CopyPlan) -> Transfers:
    """Return the copies of a plan that reads parts of sources.

    Elements that are copied to several places, such as those of tied weights or of experts with several copies on one
    rank, are moved once.
    """
    moves: list[Move] = []
    repeats: list[Repeat] = []
    seen: dict[tuple[object, ...], Move] = {}
    reads: dict[int, list[tuple[Piece, Box]]] = {}
    for row, target in enumerate(plan.targets):
        size = itemsize(target.dtype)
        if id(target.copies) not in reads:  # layers share their copies
            reads[id(target.copies)] = _in_order(target.copies)
        for piece, read in reads[id(target.copies)]:
            part = target.sources[piece.source]
            move = Move(part, row, piece, size, piece.box.numel * size)
            first = seen.setdefault((part, target.dtype, piece.source_offset, read), move)
            again = None if first is move else _again(first, move, prod(plan.sources.shapes[part]))
            if again is None:
                moves.append(move)
            else:
                repeats += again
    return Transfers(moves, repeats)


def _in_order(copies: Sequence[StridedCopy]) -> list[tuple[Piece, Box]]:
    """Return the pieces of copies in the order of the target, each with what it reads, whatever it writes."""
    pieces = sorted((piece for copy in copies for piece in copy.pieces()), key=lambda piece: piece.target_offset)
    return [
        (piece.canonical(), Box(piece.box.shape, piece.box.source_strides, piece.box.source_strides).canonical())
        for piece in pieces
    ]


def _again(first: Move, move: Move, numel: int) -> list[Repeat] | None:
    """Return the copies that do what ``move`` does after ``first``; None if they are no strided copies."""
    try:
        pieces = chain([first.piece.inverse()], [move.piece], numel)
    except NotAffine:
        return None
    return [Repeat(move.target, first.target, piece.canonical()) for piece in pieces]


def units_of(moves: Iterable[Move], most_bytes: int) -> list[list[Move]]:
    """Divide moves into units of at most ``most_bytes``, or of one element if that is more.

    They stay in the order of the targets. The parts that fill a target take turns, so that all ranks that hold one send
    at the same time.
    """
    # No move is larger than a quarter of a unit, so at least three quarters of each unit are filled.
    small = (part for move in moves for part in _cut(move, max(most_bytes // 4, move.itemsize)))
    units: list[list[Move]] = []
    room = 0
    for _, of_target in groupby(small, lambda move: move.target):
        for move in _in_turns(of_target):
            if move.nbytes > room:
                units.append([])
                room = most_bytes
            units[-1].append(move)
            room -= move.nbytes
    return units


def _in_turns(moves: Iterable[Move]) -> Iterator[Move]:
    """Yield the moves of one target, one from each part after the other."""
    by_part: dict[int, list[Move]] = {}
    for move in moves:
        by_part.setdefault(move.part, []).append(move)
    for turn in zip_longest(*by_part.values()):
        yield from (move for move in turn if move is not None)


def _cut(move: Move, most_bytes: int) -> Iterator[Move]:
    """Yield a move in parts of at most ``most_bytes``, cut along the outermost dimensions of the target."""
    if move.nbytes <= most_bytes:
        yield move
        return
    _, (shape, source_strides, target_strides), source, target = move.piece
    rows = max(1, most_bytes * shape[0] // move.nbytes)
    for start in range(0, shape[0], rows):
        box = Box((min(rows, shape[0] - start), *shape[1:]), source_strides, target_strides).canonical()
        piece = Piece(0, box, source + start * source_strides[0], target + start * target_strides[0])
        yield from _cut(move._replace(piece=piece, nbytes=box.numel * move.itemsize), most_bytes)


def by_owner(unit: Iterable[Move], owners: Sequence[int]) -> dict[int, list[Move]]:
    """Return the moves of a unit by the rank that sends them.

    Args:
        unit: the moves.
        owners: the rank that sends each part.
    """
    owned: dict[int, list[Move]] = {}
    for move in unit:
        owned.setdefault(owners[move.part], []).append(move)
    return owned


class Placed(NamedTuple):
    """A move in a message."""

    move: Move
    offset_bytes: int


def message_of(moves: Iterable[Move]) -> tuple[list[Placed], int]:
    """Return the places of moves in one message without gaps, and its size in bytes.

    Large elements come first, so that each move is aligned to its elements.
    """
    placed, offset = [], 0
    for move in sorted(moves, key=lambda move: -move.itemsize):
        placed.append(Placed(move, offset))
        offset += move.nbytes
    return placed, offset
