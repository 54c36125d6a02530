"""Plans that read parts of sources, each part as a contiguous tensor of its own; pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.boxes import NotAffine, Piece, chain, reach
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region


class SourcePart(NamedTuple):
    """A region of a source that is read as a tensor of its own."""

    source: int
    """Row of the source."""
    region: Region


def plan_from_parts(plan: CopyPlan, parts: Sequence[SourcePart]) -> CopyPlan:
    """Return the plan that fills the same targets from parts of its sources; row k of its sources is ``parts[k]``.

    Args:
        plan: a plan without quantized sources and without targets that transformers' own code fills.
        parts: the parts. Those of one source share no element. A part that no target reads may be among them.

    Raises:
        UnsupportedError: strided copies cannot fill a target from such parts.
        CoverageError: the parts do not hold all elements that a target reads.
    """
    rows_of: dict[int, list[int]] = {}
    for row, part in enumerate(parts):
        rows_of.setdefault(part.source, []).append(row)
    cache: dict[tuple[object, ...], tuple[tuple[StridedCopy, ...], tuple[int, ...]]] = {}
    targets = []
    for target in plan.targets:
        regions = tuple(tuple(parts[row].region for row in rows_of.get(source, ())) for source in target.sources)
        key = id(target.copies), regions  # layers share their copies
        if key not in cache:
            copies = copies_from_regions(target, regions)
            used = tuple(sorted({ordinal for copy in copies for ordinal in copy.ordinals}))
            index = {ordinal: number for number, ordinal in enumerate(used)}
            cache[key] = (
                tuple(copy._replace(ordinals=tuple(index[ordinal] for ordinal in copy.ordinals)) for copy in copies),
                used,
            )
        copies, used = cache[key]
        rows = [row for source in target.sources for row in rows_of.get(source, ())]
        targets.append(target._replace(sources=tuple(rows[ordinal] for ordinal in used), copies=copies))
    sources = plan.sources
    table = SourceTable(
        [sources.names[part.source] for part in parts],
        [sources.dtypes[part.source] for part in parts],
        [part.region.local_shape for part in parts],
    )
    from_parts = CopyPlan(table, tuple(targets), plan.rules)
    from_parts.validate()
    return from_parts


def copies_from_regions(target: Target, regions: Sequence[Sequence[Region]]) -> Sequence[StridedCopy]:
    """Return the copies that fill a target from regions of its sources.

    Args:
        target: the target.
        regions: the regions of each of its sources. The copies number all regions, in this order. What no region holds
            is not copied.

    Raises:
        UnsupportedError: strided copies cannot fill the target from such regions.
    """
    if all(len(source_regions) == 1 and source_regions[0].is_whole for source_regions in regions):
        return target.copies
    first = [0]
    for source_regions in regions:
        first.append(first[-1] + len(source_regions))
    held = [[_Held.of(region) for region in source_regions] for source_regions in regions]
    pieces: list[Piece] = []
    for copy in target.copies:
        length = reach(copy.box.shape, copy.box.source_strides)
        for piece in copy.pieces():
            for number, part in enumerate(held[piece.source], first[piece.source]):
                if part.start <= piece.source_offset + length and piece.source_offset < part.stop:
                    pieces += _pieces_from_region(part, piece, number, target)
    return group_pieces(pieces)


class _Held(NamedTuple):
    """A region, with the copies from it to the whole tensor."""

    region: Region
    copies: list[Piece]
    start: int
    """First element of the whole tensor that it holds."""
    stop: int
    """The element after the last one that it holds; 0 if it is empty."""

    @classmethod
    def of(cls, region: Region) -> _Held:
        copies = [piece.inverse() for piece in region.pieces()]
        ends = (piece.target_offset + reach(piece.box.shape, piece.box.target_strides) for piece in copies)
        return cls(region, copies, min((piece.target_offset for piece in copies), default=0), max(ends, default=-1) + 1)


def _pieces_from_region(part: _Held, piece: Piece, ordinal: int, target: Target) -> list[Piece]:
    """Return the pieces that copy only those elements of ``piece`` that a region contains."""
    from_region = [copy._replace(source=ordinal) for copy in part.copies]
    try:
        return [chained.canonical() for chained in chain(from_region, [piece], prod(part.region.shape))]
    except NotAffine as error:
        text = f"{target.name} cannot be computed from a part of its source: {error}"
        raise UnsupportedError(message(text, found=f"{part.region}")) from None
