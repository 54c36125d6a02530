"""Regions of tensors, and targets that hold one region each; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from automodel_conv.errors import CoverageError, message
from automodel_conv.planning.boxes import Box, Piece, contiguous_strides
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces


class Region(NamedTuple):
    """Part of a tensor: the product of runs of indices in each dimension."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    runs: tuple[tuple[tuple[int, int], ...], ...]
    """For each dimension the runs ``(start, length)`` of indices, in the order in which the part holds them."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    @property
    def is_whole(self) -> bool:
        """Whether the part holds all indices, in their order."""
        return all(runs == (((0, size),) if size else ()) for size, runs in zip(self.shape, self.runs, strict=True))

    def pieces(self) -> list[Piece]:
        """Return the copies from the whole tensor to the part, both contiguous."""
        outer, inner = contiguous_strides(self.shape), contiguous_strides(self.local_shape)
        placed = [list(zip(runs, _starts(runs), strict=True)) for runs in self.runs]
        return [
            Piece(
                0,
                Box(tuple(length for (_, length), _ in box), outer, inner),
                sum(start * stride for ((start, _), _), stride in zip(box, outer, strict=True)),
                sum(start * stride for (_, start), stride in zip(box, inner, strict=True)),
            )
            for box in product(*placed)
        ]


def whole(shape: Sequence[int]) -> Region:
    """Return the region that is a whole tensor."""
    return box(shape, [0] * len(shape), shape)


def box(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> Region:
    """Return the region that is one rectangle of a tensor.

    Raises:
        CoverageError: the rectangle leaves the tensor.
    """
    if not len(shape) == len(offsets) == len(lengths) or any(
        not 0 <= offset <= offset + length <= size for size, offset, length in zip(shape, offsets, lengths, strict=True)
    ):
        found = f"offsets {list(offsets)}, lengths {list(lengths)}"
        raise CoverageError(message("a box that leaves its tensor", expected=f"within {list(shape)}", found=found))
    runs = tuple(((offset, length),) if length else () for offset, length in zip(offsets, lengths, strict=True))
    return Region(tuple(shape), runs)


class Part(NamedTuple):
    """A region of a target that is filled as a tensor of its own."""

    target: str
    """Name of the target."""
    name: str
    """Name of the part."""
    region: Region
    dtype: str | None = None
    """Dtype code that the part is cast to; None: the target's dtype."""


def parts_of(targets: Sequence[Target], parts: Iterable[Part]) -> list[Target]:
    """Return targets that are parts of ``targets``.

    Each is a contiguous tensor and has its whole target as source.

    Raises:
        CoverageError: a region belongs to a tensor of another shape.
    """
    rows = {target.name: row for row, target in enumerate(targets)}
    part_targets = []
    for part in parts:
        row = rows[part.target]
        target, region = targets[row], part.region
        if region.shape != target.shape:
            found = f"a region of {list(region.shape)}"
            raise CoverageError(message(f"{target.name} has another shape", expected=list(target.shape), found=found))
        dtype = part.dtype or target.dtype
        part_targets.append(Target(part.name, dtype, region.local_shape, -1, (row,), _copies(region)))
    return part_targets


@lru_cache(maxsize=4096)
def _copies(region: Region) -> tuple[StridedCopy, ...]:
    return group_pieces(piece.canonical() for piece in region.pieces())


def _starts(runs: Sequence[tuple[int, int]]) -> list[int]:
    starts, start = [], 0
    for _, length in runs:
        starts.append(start)
        start += length
    return starts
