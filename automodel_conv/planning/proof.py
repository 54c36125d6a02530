"""The proof that a plan may run: every target element is written exactly once, every read stays inside its source."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from automodel_conv.errors import CoverageError, message
from automodel_conv.planning.boxes import NotAffine, Overlap, find_overlap, reach
from automodel_conv.planning.copies import SourceTable, Target, over_sources


def prove(targets: Sequence[Target], sources: SourceTable) -> None:
    """Check all targets that are made by copies; those that share copies are proved once.

    Raises:
        CoverageError: names the target, the element and the two sources, or how many elements nobody writes.
    """
    names = {target.name for target in targets}
    if len(names) != len(targets):
        twice = next(t.name for t in targets if t.name not in names or names.discard(t.name))
        raise CoverageError(message(f"two targets are named {twice}"))
    proved: set[tuple[int, int]] = set()
    for target in targets:
        if target.fallback is not None:
            continue
        _prove_reads_inside(target, sources)
        numel = prod(target.shape)
        key = (id(target.copies), numel)
        if key not in proved:
            _prove_written_once(target, numel, sources)
            proved.add(key)


def _prove_written_once(target: Target, numel: int, sources: SourceTable) -> None:
    try:
        overlap = _overlap(target, numel)
    except NotAffine as error:
        raise CoverageError(message(f"the copies of {target.name} cannot be proved: {error}")) from None
    if overlap is not None:
        names = " and ".join(sources.names[target.sources[i]] for i in overlap.sources)
        raise CoverageError(
            message(
                f"element {overlap.element} of {target.name} would be written twice",
                found=names,
            )
        )
    written = sum(copy.box.numel * len(copy.ordinals) for copy in target.copies)
    if written != numel:
        raise CoverageError(
            message(
                f"{target.name} would be left partly unwritten",
                expected=f"{numel} elements, shape {list(target.shape)}",
                found=f"{written} elements from {len(target.sources)} sources",
            )
        )


def _overlap(target: Target, numel: int) -> Overlap | None:
    """As ``find_overlap`` of all pieces of a target, which are looked at one by one only where that is needed."""
    try:
        if find_overlap([piece for copy in target.copies for piece in over_sources(copy)], numel) is None:
            return None
    except NotAffine:  # which all pieces by themselves may not be
        pass
    return find_overlap([piece for copy in target.copies for piece in copy.pieces()], numel)


def _prove_reads_inside(target: Target, sources: SourceTable) -> None:
    if target.sources and not 0 <= min(target.sources) <= max(target.sources) < len(sources.names):
        raise CoverageError(message(f"{target.name} reads sources that the plan does not have"))
    shapes = [sources.shapes[row] for row in target.sources]
    alike = len(shapes) > 1 and shapes.count(shapes[0]) == len(shapes)
    for copy in target.copies:
        if min(copy.box.source_strides, default=0) < 0:
            raise CoverageError(message(f"{target.name} would be read backwards"))
        if not copy.ordinals:
            continue
        if not 0 <= min(copy.ordinals) <= max(copy.ordinals) < len(shapes):
            raise CoverageError(message(f"{target.name} reads sources that it does not have"))
        reached = reach(copy.box.shape, copy.box.source_strides)
        if alike and 0 <= min(copy.source_offsets) and max(copy.source_offsets) + reached < prod(shapes[0]):
            continue
        for ordinal, offset in zip(copy.ordinals, copy.source_offsets, strict=True):
            if not 0 <= offset <= offset + reached < prod(shapes[ordinal]):
                raise CoverageError(
                    message(
                        f"{target.name} would read outside {sources.names[target.sources[ordinal]]}",
                        expected=f"elements below {prod(shapes[ordinal])}",
                        found=f"elements {offset} to {offset + reached}",
                    )
                )
