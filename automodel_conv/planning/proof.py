"""The proof that a plan may run: every target element is written exactly once, every read stays inside its source."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from automodel_conv.errors import CoverageError, message
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.view import NotAffine, find_overlap


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
    pieces = [piece for copy in target.copies for piece in copy.pieces()]
    try:
        overlap = find_overlap(pieces, numel)
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
    written = sum(prod(piece.shape) for piece in pieces)
    if written != numel:
        raise CoverageError(
            message(
                f"{target.name} would be left partly unwritten",
                expected=f"{numel} elements, shape {list(target.shape)}",
                found=f"{written} elements from {len(target.sources)} sources",
            )
        )


def _prove_reads_inside(target: Target, sources: SourceTable) -> None:
    known = range(len(sources.names))
    if any(row not in known for row in target.sources):
        raise CoverageError(message(f"{target.name} reads sources that the plan does not have"))
    for copy in target.copies:
        if min(copy.source_strides, default=0) < 0:
            raise CoverageError(message(f"{target.name} would be read backwards"))
        reach = sum((size - 1) * stride for size, stride in zip(copy.shape, copy.source_strides, strict=True))
        for ordinal, offset in zip(copy.ordinals, copy.source_offsets, strict=True):
            if not 0 <= ordinal < len(target.sources):
                raise CoverageError(message(f"{target.name} reads sources that it does not have"))
            row = target.sources[ordinal]
            if not 0 <= offset <= offset + reach < prod(sources.shapes[row]):
                raise CoverageError(
                    message(
                        f"{target.name} would read outside {sources.names[row]}",
                        expected=f"elements below {prod(sources.shapes[row])}",
                        found=f"elements {offset} to {offset + reach}",
                    )
                )
