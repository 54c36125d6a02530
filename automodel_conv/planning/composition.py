"""The algebra of plans: turning one around, and chaining two so that nothing is made in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from automodel_conv.errors import CoverageError, UnsupportedError, message
from automodel_conv.planning.boxes import NotAffine, Piece, chain
from automodel_conv.planning.casts import check_cast
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target, by_source, group_pieces, over_sources


def table_of(targets: Sequence[Target]) -> SourceTable:
    """Targets as the sources of a plan to follow."""
    return SourceTable([t.name for t in targets], [t.dtype for t in targets], [t.shape for t in targets])


def inverted(targets: Sequence[Target], sources: SourceTable) -> list[Target]:
    """Targets that make the sources of ``targets`` from them; only sources that take part come back."""
    incoming: dict[int, list[tuple[int, Piece]]] = {row: [] for target in targets for row in target.sources}
    for row, target in enumerate(targets):
        for copy in target.copies:
            for piece in copy.pieces():
                incoming[target.sources[piece.source]].append((row, piece.inverse()))
    shared = _Shared()
    made = []
    for source in sorted(incoming):
        rows = sorted({row for row, _ in incoming[source]})
        ordinal = {row: i for i, row in enumerate(rows)}
        pieces = (piece.canonical()._replace(source=ordinal[row]) for row, piece in incoming[source])
        rule = targets[rows[0]].rule if rows else -1
        name, dtype, shape = sources.names[source], sources.dtypes[source], sources.shapes[source]
        made.append(Target(name, dtype, shape, rule, tuple(rows), shared(group_pieces(pieces))))
    return made


def chained(
    first: Mapping[str, Target],
    sources: SourceTable,
    second: Sequence[Target],
    between: SourceTable,
    rules: tuple[Sequence[str], Sequence[str]],
) -> tuple[list[Target], tuple[str, ...]]:
    """The targets ``second``, made straight from what ``first`` reads, and the rules they are made by.

    Args:
        first: by name, made from ``sources``.
        second: made from ``between``, all of which ``first`` must make.
        rules: the texts that the rules of ``first`` and ``second`` are rows of.

    Raises:
        UnsupportedError: a target is upstream's work where it would be taken apart, would be cast twice, or its copies
            cannot be chained; or codes would be cast.
        CoverageError: ``second`` reads something that ``first`` does not make.
    """
    shared = _Shared()
    seen: dict[tuple[object, ...], tuple[tuple[StridedCopy, ...], tuple[int, ...]]] = {}
    texts: dict[str, int] = {}
    made = []
    for target in second:
        middle = [_made_before(first, between, row, target) for row in target.sources]
        if target.fallback is None and len(middle) == 1 and target.is_whole and _same(middle[0], target):
            made.append(middle[0]._replace(rule=_joined_rule(middle, -1, rules, texts)))
            continue
        for before in middle:
            _check_chainable(before, sources, target)
        rows: dict[int, int] = {}
        places = tuple(tuple(rows.setdefault(row, len(rows)) for row in before.sources) for before in middle)
        key = (id(target.copies), places, *((id(before.copies), before.shape) for before in middle))
        if key not in seen:
            pieces = [
                piece._replace(source=places[read.source][piece.source])
                for copy in target.copies
                for read in copy.pieces()
                for piece in _through(middle[read.source], read, target)
            ]
            used = tuple(sorted({piece.source for piece in pieces}))
            place = {ordinal: i for i, ordinal in enumerate(used)}
            copies = group_pieces(piece._replace(source=place[piece.source]) for piece in pieces)
            seen[key] = shared(copies), used
        copies, used = seen[key]
        all_rows = list(rows)
        rule = _joined_rule(middle, target.rule, rules, texts)
        read_rows = tuple(all_rows[ordinal] for ordinal in used)
        made.append(Target(target.name, target.dtype, target.shape, rule, read_rows, copies))
    return made, tuple(texts)


def _joined_rule(
    middle: Sequence[Target], rule: int, rules: tuple[Sequence[str], Sequence[str]], texts: dict[str, int]
) -> int:
    """The row of "first rule, then second rule" in ``texts``; -1 where names are only looked up."""
    steps = list(dict.fromkeys(rules[0][before.rule] for before in middle if before.rule >= 0))
    if rule >= 0:
        steps.append(rules[1][rule])
    return texts.setdefault(", then ".join(steps), len(texts)) if steps else -1


def _same(made: Target, target: Target) -> bool:
    return (made.name, made.dtype, made.shape) == (target.name, target.dtype, target.shape)


def _made_before(first: Mapping[str, Target], between: SourceTable, row: int, target: Target) -> Target:
    name, dtype, shape = between.names[row], between.dtypes[row], between.shapes[row]
    made = first.get(name)
    if made is None or (made.dtype, made.shape) != (dtype, shape):
        raise CoverageError(
            message(
                f"{target.name} needs {name}, which the plan before does not make like that",
                expected=f"{dtype} {list(shape)}",
                found=None if made is None else f"{made.dtype} {list(made.shape)}",
            )
        )
    return made


def _check_chainable(made: Target, sources: SourceTable, target: Target) -> None:
    for thing in (made, target):
        if thing.fallback is not None:
            raise UnsupportedError(message(f"{thing.name} is made by upstream's own code, so plans end there"))
    numbers = [row for row in made.sources if row not in sources.decodes]  # what is decoded takes any dtype at once
    casts = [sources.dtypes[row] for row in numbers if sources.dtypes[row] != made.dtype]
    if casts and made.dtype != target.dtype:
        raise UnsupportedError(
            message(
                f"{target.name} would be cast twice on the way",
                found=f"{casts[0]} -> {made.dtype} -> {target.dtype}",
                do="give the dtype to one of the two plans only",
            )
        )
    for row in numbers:
        check_cast(sources.names[row], sources.dtypes[row], target.name, target.dtype)


def _through(made: Target, read: Piece, target: Target) -> list[Piece]:
    numel = prod(made.shape)
    try:
        walks = chain([piece for copy in made.copies for piece in over_sources(copy)], [read], numel)
        return [piece for walk in walks for piece in by_source(walk).pieces()]
    except NotAffine:  # which all pieces by themselves may not be
        pass
    try:
        return chain([piece for copy in made.copies for piece in copy.pieces()], [read], numel)
    except NotAffine as error:
        text = f"{target.name} cannot be made straight from the sources of {made.name}: {error}"
        raise UnsupportedError(message(text)) from None


class _Shared:
    """Makes equal copies one object, so that targets of equal geometry are proved and printed once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[StridedCopy, ...], tuple[StridedCopy, ...]] = {}

    def __call__(self, copies: tuple[StridedCopy, ...]) -> tuple[StridedCopy, ...]:
        return self._seen.setdefault(copies, copies)
