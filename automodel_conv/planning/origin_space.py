"""Pieces that read origins, which share one address space like the sources of ``values.py``.

Element n of the origin with number k is at ``k * SPAN + n``. A constant or a computation has one element.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from automodel_conv.planning.boxes import SPAN, Box, NotAffine, Piece
from automodel_conv.planning.loader_writes import View
from automodel_conv.planning.origins import (
    Number,
    Origin,
    Read,
    Unknown,
    cast,
    reinterpreted,
    rows_of,
    viewed_constant,
)

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes without meaning, by their bytes."""


class OriginSpace:
    """The address space of origins; it grows when a piece reads a new one."""

    def __init__(self) -> None:
        self._numbers: dict[Origin, int] = {}
        self._origins: list[Origin] = []

    def origin(self, piece: Piece) -> Origin:
        """Return the origin that a piece reads."""
        return self._origins[piece.source_offset // SPAN]

    def rows(self, pieces: Iterable[Piece]) -> frozenset[int]:
        """Return the rows of the sources that the elements of pieces come from."""
        return frozenset[int]().union(*(rows_of(self.origin(piece)) for piece in pieces))

    def cast(self, piece: Piece, viewed: torch.dtype, dtype: torch.dtype) -> Piece:
        """Return a piece whose elements are viewed as a dtype and then cast to another."""
        origin = self.origin(piece)
        has = origin.value if isinstance(origin, Read) else origin.dtype if isinstance(origin, Number) else viewed
        changed = cast(origin if has == viewed else reinterpreted(origin, viewed), dtype)
        return piece if changed == origin else self.moved_from(piece, changed)

    def moved_from(self, piece: Piece, origin: Origin) -> Piece:
        """Return a piece with another origin."""
        if isinstance(origin, Read):
            offset = piece.source_offset % SPAN
            return piece._replace(source_offset=self._number(origin) * SPAN + offset)
        box = piece.box._replace(source_strides=(0,) * len(piece.box.shape)).canonical()
        return piece._replace(box=box, source_offset=self._number(origin) * SPAN)

    def uniform(self, target: View, origin: Origin) -> Piece:
        """Return a piece that writes a view from an origin without positions."""
        box = Box(target.shape, (0,) * len(target.shape), target.strides).canonical()
        return Piece(0, box, self._number(origin) * SPAN, target.offset)

    def finer(self, piece: Piece, ratio: int) -> Piece:
        """Return a piece that moves the same bytes as ``ratio`` times as many elements."""
        origin = self.origin(piece)
        if isinstance(origin, Read):
            if origin.value == origin.stored:
                raw = _RAW[origin.stored.itemsize // ratio]
                return self.moved_from(finer_walk(piece, ratio).canonical(), Read(origin.row, raw, raw))
            origin = Unknown(f"views {origin.value}, cast from {origin.stored}, in parts", frozenset([origin.row]))
        elif isinstance(origin, Number):
            raw = _RAW[origin.dtype.itemsize // ratio]
            parts = set(origin.tensor.view(raw).tolist())
            origin = Number(parts.pop(), raw) if len(parts) == 1 else Unknown("views a constant in parts")
        return self.moved_from(finer_walk(piece, ratio), origin)

    def coarser(self, piece: Piece, ratio: int, dtype: torch.dtype) -> Piece:
        """Return a piece that moves ``ratio`` elements at once.

        Raises:
            NotAffine: some of them are apart.
        """
        origin, (shape, source_strides, target_strides) = self.origin(piece), piece.box
        dims = list(zip(shape, source_strides, target_strides, strict=True))
        moves = isinstance(origin, Read)
        if isinstance(origin, Read) and origin.value != origin.stored:
            raise NotAffine(f"views {origin.value}, cast from {origin.stored}, as {dtype}")
        inner = next((dim for dim in dims if dim[2] == 1 and dim[0] % ratio == 0 and (dim[1] == 1 or not moves)), None)
        if inner is None:
            raise NotAffine("parts of elements are apart")
        dims.remove(inner)
        offset = piece.source_offset % SPAN
        starts = [
            piece.target_offset,
            *(dim[2] for dim in dims),
            *([offset, *(dim[1] for dim in dims)] if moves else []),
        ]
        if any(start % ratio for start in starts):
            raise NotAffine("parts of elements are apart")
        outer = [(size, s // ratio, t // ratio) for size, s, t in dims]
        if inner[0] > ratio:
            outer.append((inner[0] // ratio, inner[1], 1))
        box = Box(*(tuple(column) for column in zip(*outer, strict=True))) if outer else Box((), (), ())
        if isinstance(origin, Read):
            origin = Read(origin.row, dtype, dtype)
        elif isinstance(origin, Number):
            origin = viewed_constant(origin.tensor.repeat(ratio), dtype)
        moved = Piece(0, box.canonical(), offset // ratio, piece.target_offset // ratio)
        return self.moved_from(moved, origin)

    def _number(self, origin: Origin) -> int:
        number = self._numbers.setdefault(origin, len(self._numbers))
        if number == len(self._origins):
            self._origins.append(origin)
        return number


def finer_walk(piece: Piece, ratio: int) -> Piece:
    """Return a piece in elements of which ``ratio`` make one."""
    if ratio == 1:
        return piece
    shape, source, target = piece.box
    box = Box((*shape, ratio), (*(s * ratio for s in source), 1), (*(t * ratio for t in target), 1))
    start = piece.source_offset // SPAN * SPAN + piece.source_offset % SPAN * ratio
    return Piece(piece.source, box, start, piece.target_offset * ratio)
