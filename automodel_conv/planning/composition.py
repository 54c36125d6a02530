"""The algebra of plans: inverting one, and chaining two so that no tensor is built in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from automodel_conv.errors import CoverageError, UnsupportedError, message
from automodel_conv.planning.boxes import NotAffine, Piece, chain
from automodel_conv.planning.casts import check_cast
from automodel_conv.planning.copies import Fill, SourceTable, StridedCopy, Target, by_source, group_pieces, over_sources


def table_of(targets: Sequence[Target]) -> SourceTable:
    """Return the table in which targets are the sources of a following plan."""
    return SourceTable([t.name for t in targets], [t.dtype for t in targets], [t.shape for t in targets])


def inverted(targets: Sequence[Target], sources: SourceTable) -> list[Target]:
    """Return targets that restore the sources of ``targets``, if a target reads them."""
    incoming: dict[int, list[tuple[int, Piece]]] = {row: [] for target in targets for row in target.sources}
    for row, target in enumerate(targets):
        for copy in target.copies:
            for piece in copy.pieces():
                incoming[target.sources[piece.source]].append((row, piece.inverse()))
    shared = _CopiesCache()
    restored = []
    for source in sorted(incoming):
        rows = sorted({row for row, _ in incoming[source]})
        ordinal = {row: i for i, row in enumerate(rows)}
        pieces = (piece.canonical()._replace(source=ordinal[row]) for row, piece in incoming[source])
        rule = targets[rows[0]].rule if rows else -1
        name, dtype, shape = sources.names[source], sources.dtypes[source], sources.shapes[source]
        restored.append(Target(name, dtype, shape, rule, tuple(rows), shared(group_pieces(pieces))))
    return restored


def chained(
    first: Mapping[str, Target],
    sources: SourceTable,
    second: Sequence[Target],
    between: SourceTable,
    rules: tuple[Sequence[str], Sequence[str]],
) -> tuple[list[Target], tuple[str, ...]]:
    """Return the targets ``second``, filled straight from the sources of ``first``, and the texts of their rules.

    Args:
        first: targets of the first plan by name.
        sources: sources of the first plan.
        second: targets of the second plan.
        between: sources of the second plan, each of which is a target in ``first``.
        rules: texts of the rules of the first and of the second plan.

    Raises:
        UnsupportedError: a target that transformers' own code fills would be changed further; a target would be cast
            twice; its copies cannot be chained; or codes would be cast.
        CoverageError: ``second`` reads a tensor that is not in ``first``.
    """
    shared = _CopiesCache()
    cache: dict[tuple[object, ...], tuple[tuple[StridedCopy, ...], tuple[int, ...], tuple[Fill, ...]]] = {}
    texts: dict[str, int] = {}
    targets = []
    for target in second:
        middle = [_find_source(first, between, row, target) for row in target.sources]
        if target.fallback is None and len(middle) == 1 and target.is_whole and _same(middle[0], target):
            targets.append(middle[0]._replace(rule=_joined_rule(middle, -1, rules, texts)))
            continue
        for before in middle:
            _check_chainable(before, sources, target)
        rows: dict[int, int] = {}
        ordinals = tuple(tuple(rows.setdefault(row, len(rows)) for row in before.sources) for before in middle)
        parts = ((id(before.copies), str(before.fills), before.shape) for before in middle)
        key = (id(target.copies), str(target.fills), ordinals, *parts)  # texts, because 0.0 equals -0.0
        if key not in cache:
            pieces = [
                piece._replace(source=ordinals[read.source][piece.source])
                for copy in target.copies
                for read in copy.pieces()
                for piece in _through(middle[read.source], read, target)
            ]
            used = tuple(sorted({piece.source for piece in pieces}))
            index = {ordinal: i for i, ordinal in enumerate(used)}
            copies = group_pieces(piece._replace(source=index[piece.source]) for piece in pieces)
            cache[key] = shared(copies), used, (*target.fills, *_fills(target, middle))
        copies, used, fills = cache[key]
        all_rows = list(rows)
        rule = _joined_rule(middle, target.rule, rules, texts)
        read_rows = tuple(all_rows[ordinal] for ordinal in used)
        targets.append(Target(target.name, target.dtype, target.shape, rule, read_rows, copies, fills=fills))
    return targets, tuple(texts)


def _fills(target: Target, middle: Sequence[Target]) -> Iterator[Fill]:
    """Yield the elements of a target that are constant where it reads ``middle``."""
    if not any(before.fills for before in middle):
        return
    for read in (read for copy in target.copies for read in copy.pieces()):
        before = middle[read.source]
        for fill in before.fills:
            for piece in _chained([fill.piece(0)], read, before, target):
                yield Fill.of_piece(piece, fill.value)


def _joined_rule(
    middle: Sequence[Target], rule: int, rules: tuple[Sequence[str], Sequence[str]], texts: dict[str, int]
) -> int:
    """Return the row of "first rule, then second rule" in ``texts``, or -1 if all sources are looked up by name."""
    steps = list(dict.fromkeys(rules[0][before.rule] for before in middle if before.rule >= 0))
    if rule >= 0:
        steps.append(rules[1][rule])
    return texts.setdefault(", then ".join(steps), len(texts)) if steps else -1


def _same(before: Target, target: Target) -> bool:
    return (before.name, before.dtype, before.shape) == (target.name, target.dtype, target.shape)


def _find_source(first: Mapping[str, Target], between: SourceTable, row: int, target: Target) -> Target:
    """Return the target in ``first`` that is the source ``row`` of ``target``."""
    name, dtype, shape = between.names[row], between.dtypes[row], between.shapes[row]
    before = first.get(name)
    if before is None or (before.dtype, before.shape) != (dtype, shape):
        raise CoverageError(
            message(
                f"{target.name} needs {name}, which the preceding plan does not produce in this form",
                expected=f"{dtype} {list(shape)}",
                found=None if before is None else f"{before.dtype} {list(before.shape)}",
            )
        )
    return before


def _check_chainable(before: Target, sources: SourceTable, target: Target) -> None:
    for checked in (before, target):
        if checked.fallback is not None:
            raise UnsupportedError(
                message(f"{checked.name} is filled by transformers' own code, so no plan can follow")
            )
    unquantized = [row for row in before.sources if row not in sources.decodes]  # decoding yields any dtype in one step
    casts = [sources.dtypes[row] for row in unquantized if sources.dtypes[row] != before.dtype]
    if casts and before.dtype != target.dtype:
        raise UnsupportedError(
            message(
                f"{target.name} would be cast twice",
                found=f"{casts[0]} -> {before.dtype} -> {target.dtype}",
                do="pass the dtype to only one of the two plans",
            )
        )
    for row in unquantized:
        check_cast(sources.names[row], sources.dtypes[row], target.name, target.dtype)


def _through(before: Target, read: Piece, target: Target) -> list[Piece]:
    """Return the pieces that read the sources of ``before`` where ``read`` reads ``before`` itself."""
    numel = prod(before.shape)
    try:
        walks = chain([piece for copy in before.copies for piece in over_sources(copy)], [read], numel)
        return [piece for walk in walks for piece in by_source(walk).pieces()]
    except NotAffine:  # the pieces of single sources may still have a common radix
        pass
    return _chained([piece for copy in before.copies for piece in copy.pieces()], read, before, target)


def _chained(pieces: Sequence[Piece], read: Piece, before: Target, target: Target) -> list[Piece]:
    """Return the pieces that read what ``pieces``, which write ``before``, read.

    Raises:
        UnsupportedError: there are none.
    """
    try:
        return chain(pieces, [read], prod(before.shape))
    except NotAffine as error:
        text = f"{target.name} cannot be filled straight from the sources of {before.name}: {error}"
        raise UnsupportedError(message(text)) from None


class _CopiesCache:
    """A cache with one object for equal copies, so that targets of equal geometry are proved and printed once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[StridedCopy, ...], tuple[StridedCopy, ...]] = {}

    def __call__(self, copies: tuple[StridedCopy, ...]) -> tuple[StridedCopy, ...]:
        return self._seen.setdefault(copies, copies)
