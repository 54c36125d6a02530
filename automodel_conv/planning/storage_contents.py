"""The contents of a storage: pieces that can be found by the elements that they write."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from automodel_conv.planning.boxes import Piece, reach


@dataclass
class _Alike:
    """Pieces about as long as each other, in the order of their first elements."""

    pieces: list[Piece] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """First element of each piece."""
    lasts: list[int] = field(default_factory=list)
    """Last element of each piece."""


@dataclass
class StorageContents:
    """The contents of a storage: pieces with canonical boxes, none of which meet."""

    itemsize: int
    """Bytes of an element, in which offsets and strides are counted."""
    numel: int
    _by_bits: dict[int, _Alike] = field(default_factory=dict)
    """Pieces by the number of bits of the distance from their first to their last element.

    So the search for short pieces near an element does not begin as far before it as a long piece may.
    """

    @property
    def pieces(self) -> list[Piece]:
        """All pieces, in no order."""
        return [piece for alike in self._by_bits.values() for piece in alike.pieces]

    def near(self, first: int, last: int) -> list[Piece]:
        """Return the pieces that may write elements ``first`` to ``last``, in the order of their first elements."""
        found: list[Piece] = []
        for bits, alike in self._by_bits.items():
            low, high = bisect_left(alike.starts, first - (1 << bits)), bisect_right(alike.starts, last)
            ends = zip(alike.pieces[low:high], alike.lasts[low:high], strict=True)
            found += [piece for piece, end in ends if end >= first]
        return sorted(found, key=lambda piece: piece.target_offset)

    def replace(self, old: Iterable[Piece], new: Iterable[Piece]) -> None:
        """Remove pieces, and add others."""
        for piece in old:
            alike, _ = self._alike(piece)
            at = alike.pieces.index(piece, bisect_left(alike.starts, piece.target_offset))
            del alike.pieces[at], alike.starts[at], alike.lasts[at]
        for piece in new:
            alike, length = self._alike(piece)
            start = piece.target_offset
            at = bisect_right(alike.starts, start)
            alike.pieces.insert(at, piece)
            alike.starts.insert(at, start)
            alike.lasts.insert(at, start + length)

    def _alike(self, piece: Piece) -> tuple[_Alike, int]:
        """Return the pieces about as long as a piece, and its length."""
        length = reach(piece.box.shape, piece.box.target_strides)
        return self._by_bits.setdefault(length.bit_length(), _Alike()), length
