"""The proof that a plan is valid.

Copies or constants fill every element exactly once, and reads stay in their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from automodel_conv.errors import CoverageError, message
from automodel_conv.planning.boxes import NotAffine, Overlap, find_overlap, reach
from automodel_conv.planning.copies import SourceTable, Target, over_sources


def prove(targets: Sequence[Target], sources: SourceTable) -> None:
    """Prove all targets that copies fill.

    Targets that share copies are proved once.

    Raises:
        CoverageError: a target element is not written exactly once, or a read leaves its source. The message names the
            target, and the element and its two sources or the number of written elements.
    """
    names = {target.name for target in targets}
    if len(names) != len(targets):
        repeated = next(t.name for t in targets if t.name not in names or names.discard(t.name))
        raise CoverageError(message(f"two targets are named {repeated}"))
    proved: set[tuple[object, ...]] = set()
    for target in targets:
        if target.fallback is not None:
            continue
        _prove_reads_inside(target, sources)
        numel = prod(target.shape)
        key = (id(target.copies), target.fills, numel)
        if key not in proved:
            _prove_written_once(target, numel, sources)
            proved.add(key)


def _prove_written_once(target: Target, numel: int, sources: SourceTable) -> None:
    try:
        overlap = _overlap(target, numel)
    except NotAffine as error:
        raise CoverageError(message(f"the copies of {target.name} cannot be proved: {error}")) from None
    if overlap is not None:
        writers = [sources.names[row] for row in target.sources] + [f"the constant {f.value}" for f in target.fills]
        names = " and ".join(writers[i] for i in overlap.sources)
        raise CoverageError(
            message(
                f"element {overlap.element} of {target.name} would be written twice",
                found=names,
            )
        )
    written = sum(copy.box.numel * len(copy.ordinals) for copy in target.copies)
    written += sum(fill.numel for fill in target.fills)
    if written != numel:
        raise CoverageError(
            message(
                f"{target.name} would be left partly unwritten",
                expected=f"{numel} elements, shape {list(target.shape)}",
                found=f"{written} elements from {len(target.sources)} sources",
            )
        )


def _overlap(target: Target, numel: int) -> Overlap | None:
    """Return ``find_overlap`` of all pieces of a target; expand the copies to single pieces only if necessary."""
    fills = [fill.piece(source) for source, fill in enumerate(target.fills, len(target.sources))]
    try:
        if find_overlap([*(piece for copy in target.copies for piece in over_sources(copy)), *fills], numel) is None:
            return None
    except NotAffine:  # the pieces of single sources may still have a common radix
        pass
    return find_overlap([*(piece for copy in target.copies for piece in copy.pieces()), *fills], numel)


def _prove_reads_inside(target: Target, sources: SourceTable) -> None:
    if target.sources and not 0 <= min(target.sources) <= max(target.sources) < len(sources.names):
        raise CoverageError(message(f"{target.name} reads sources that the plan does not have"))
    shapes = [sources.shapes[row] for row in target.sources]
    is_uniform = len(shapes) > 1 and shapes.count(shapes[0]) == len(shapes)
    for copy in target.copies:
        if min(copy.box.source_strides, default=0) < 0:
            raise CoverageError(message(f"{target.name} would be read backwards"))
        if not copy.ordinals:
            continue
        if not 0 <= min(copy.ordinals) <= max(copy.ordinals) < len(shapes):
            raise CoverageError(message(f"{target.name} reads sources that it does not have"))
        distance = reach(copy.box.shape, copy.box.source_strides)
        if is_uniform and 0 <= min(copy.source_offsets) and max(copy.source_offsets) + distance < prod(shapes[0]):
            continue
        for ordinal, offset in zip(copy.ordinals, copy.source_offsets, strict=True):
            if not 0 <= offset <= offset + distance < prod(shapes[ordinal]):
                raise CoverageError(
                    message(
                        f"{target.name} would read outside {sources.names[target.sources[ordinal]]}",
                        expected=f"elements below {prod(shapes[ordinal])}",
                        found=f"elements {offset} to {offset + distance}",
                    )
                )
