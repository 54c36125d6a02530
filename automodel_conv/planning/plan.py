"""The plan of a conversion: which strided copies fill which target, as integers and strings.

A plan is made from names, dtypes and shapes alone, validated before any tensor data moves, and says everything the
executors need. Copies of equal geometry are kept as one ``StridedCopy`` with columns of offsets, and targets made by
the same rule from sources of the same shapes share their copies, so a plan for 45,000 tensors stays small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import BITS, nbytes
from automodel_conv.errors import CoverageError, UnsupportedError, message
from automodel_conv.planning.view import NotAffine, Piece, canonical, chain, find_overlap


class StridedCopy(NamedTuple):
    """Equal copies at different places: for each column k and every index i < shape,

    ``target[target_offsets[k] + i . target_strides] = source[ordinals[k]][source_offsets[k] + i . source_strides]``

    All strides and offsets are in elements of contiguous tensors; ``ordinals`` index the target's ``sources``.
    """

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    ordinals: tuple[int, ...]
    source_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """True if both sides are one run of elements, so that bytes can be moved without a look at them."""
        return self.source_strides == self.target_strides and self.source_strides in ((), (1,))

    def pieces(self) -> list[Piece]:
        return [
            Piece(ordinal, self.shape, self.source_strides, source, self.target_strides, target)
            for ordinal, source, target in zip(self.ordinals, self.source_offsets, self.target_offsets, strict=True)
        ]


def group_pieces(pieces: Iterable[Piece]) -> tuple[StridedCopy, ...]:
    """Pieces of equal geometry as columns, ordered by where they write."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: p.target_offset):
        groups.setdefault((piece.shape, piece.source_strides, piece.target_strides), []).append(piece)
    return tuple(
        StridedCopy(
            shape,
            source_strides,
            target_strides,
            tuple(p.source for p in group),
            tuple(p.source_offset for p in group),
            tuple(p.target_offset for p in group),
        )
        for (shape, source_strides, target_strides), group in groups.items()
    )


class Fallback(NamedTuple):
    """Operations that could not be lowered, to be run by upstream's own ``convert`` on whole sources.

    One fallback may make several targets; they all carry the same object.
    """

    reason: str
    convert: Callable[[Mapping[int, Any]], dict[str, Any]]  # source row -> tensor, to target name -> tensor


class Target(NamedTuple):
    """One tensor to be made: its copies read ``sources`` (rows of the plan's source table)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: int  # row of the plan's rules; -1 where a name is only looked up
    sources: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    fallback: Fallback | None = None

    @property
    def is_whole(self) -> bool:
        """True if one copy moves everything in one run, so that a target of its source's size equals it."""
        return len(self.copies) <= 1 and all(c.is_contiguous and len(c.ordinals) == 1 for c in self.copies)

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, prod(self.shape))


@dataclass(frozen=True)
class SourceTable:
    """What a checkpoint or a state dict offers, in columns: names, dtype codes, shapes."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]

    def nbytes(self, row: int) -> int:
        return nbytes(self.dtypes[row], prod(self.shapes[row]))


@dataclass(frozen=True)
class CopyPlan:
    """A validated conversion. ``missing``, ``unexpected`` and ``mismatched`` are what a non-strict plan left out."""

    sources: SourceTable
    targets: tuple[Target, ...]
    rules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    # --- looking at it ----------------------------------------------------------------------------------------------

    def target(self, name: str) -> Target:
        """The target of that name.

        Raises:
            KeyError: no such target; the message suggests names with the same ending.
        """
        row = self._rows.get(name)
        if row is None:
            ending = name.rsplit(".", 2)[-1]
            near = [t.name for t in self.targets if t.name.endswith(ending)][:5]
            raise KeyError(f"no target {name!r} in this plan; targets with that ending: {near}")
        return self.targets[row]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {target.name: row for row, target in enumerate(self.targets)}

    @cached_property
    def used_sources(self) -> frozenset[int]:
        return frozenset(row for target in self.targets for row in target.sources)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the targets that upstream's own code will make."""
        return tuple(target.name for target in self.targets if target.fallback is not None)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of the sources that take part, each counted once."""
        return sum(map(self.sources.nbytes, self.used_sources))

    @cached_property
    def bytes_written(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def execution_of(self, target: Target) -> str:
        """How a target is made: ``read`` (bytes land in place), ``cast``, ``strided`` or both, ``upstream``."""
        if target.fallback is not None:
            return "upstream"
        ways = []
        if not all(copy.is_contiguous for copy in target.copies):
            ways.append("strided")
        if any(self.sources.dtypes[row] != target.dtype for row in target.sources):
            ways.append("cast")
        return ", ".join(ways) or "read"

    def summary(self) -> str:
        """A table by rule: targets, source tensors, bytes and how each is executed."""
        rows: dict[tuple[int, str], list[int]] = {}
        for target in self.targets:
            row = rows.setdefault((target.rule, self.execution_of(target)), [0, 0, 0])
            row[0] += 1
            row[1] += len(target.sources)
            row[2] += target.nbytes
        lines = [f"{'targets':>8} {'sources':>8} {'GB':>9}  {'execution':<14} rule"]
        for (rule, way), (targets, sources, size) in sorted(rows.items(), key=lambda item: -item[1][2]):
            text = self.rules[rule] if rule >= 0 else "(name only)"
            lines.append(f"{targets:>8} {sources:>8} {size / 1e9:>9.3f}  {way:<14} {text}")
        lines.append(
            f"{len(self.targets):>8} {len(self.used_sources):>8} {self.bytes_written / 1e9:>9.3f}  "
            f"reads {self.bytes_read / 1e9:.3f} GB, {len(self.fallbacks)} targets by upstream's own code"
        )
        return "\n".join(lines)

    def explain(self, name: str) -> str:
        """Every source of one target with the region it fills.

        Raises:
            KeyError: no such target.
        """
        target = self.target(name)
        lines = [
            f"{target.name}  {target.dtype} {list(target.shape)}  {target.nbytes} bytes  ({self.execution_of(target)})",
            f"  rule: {self.rules[target.rule] if target.rule >= 0 else '(name only)'}",
        ]
        if target.fallback is not None:
            lines.append(f"  by upstream's own code, because {target.fallback.reason}")
            lines += [f"  {self._source_text(row)}" for row in target.sources]
        pieces = [piece for copy in target.copies for piece in copy.pieces()]
        for piece in sorted(pieces, key=lambda p: p.target_offset):
            read = _walk(piece.source_offset, piece.shape, piece.source_strides)
            written = _walk(piece.target_offset, piece.shape, piece.target_strides)
            lines.append(f"  {self._source_text(target.sources[piece.source])}{read} -> {written}")
        return "\n".join(lines)

    def _source_text(self, row: int) -> str:
        return f"{self.sources.names[row]} {self.sources.dtypes[row]} {list(self.sources.shapes[row])}"

    # --- checking it ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Prove that every element of every target is written exactly once and every read stays inside its source.

        Targets that share copies are proved once, so this costs microseconds a layer.

        Raises:
            CoverageError: names the target, the element and the two sources, or how many elements nobody writes.
        """
        if len(self._rows) != len(self.targets):
            twice = next(t.name for row, t in enumerate(self.targets) if self._rows[t.name] != row)
            raise CoverageError(message(f"two targets are named {twice}"))
        proved: set[tuple[int, int]] = set()
        for target in self.targets:
            if target.fallback is not None:
                continue
            self._prove_reads_inside(target)
            numel = prod(target.shape)
            key = (id(target.copies), numel)
            if key not in proved:
                self._prove_written_once(target, numel)
                proved.add(key)

    def _prove_written_once(self, target: Target, numel: int) -> None:
        pieces = [piece for copy in target.copies for piece in copy.pieces()]
        try:
            overlap = find_overlap(pieces, numel)
        except NotAffine as error:
            raise CoverageError(message(f"the copies of {target.name} cannot be proved: {error}")) from None
        if overlap is not None:
            names = " and ".join(self.sources.names[target.sources[i]] for i in overlap.sources)
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

    def _prove_reads_inside(self, target: Target) -> None:
        known = range(len(self.sources.names))
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
                if not 0 <= offset <= offset + reach < prod(self.sources.shapes[row]):
                    raise CoverageError(
                        message(
                            f"{target.name} would read outside {self.sources.names[row]}",
                            expected=f"elements below {prod(self.sources.shapes[row])}",
                            found=f"elements {offset} to {offset + reach}",
                        )
                    )

    # --- algebra ----------------------------------------------------------------------------------------------------

    def inverse(self) -> CopyPlan:
        """The plan that makes this plan's sources from its targets, casting back where this one casts.

        Only sources that take part come back.

        Raises:
            UnsupportedError: a target is made by upstream's own code.
            CoverageError: part of a source is not in any target, so it cannot be brought back.
        """
        if self.fallbacks:
            raise UnsupportedError(
                message(
                    f"this plan cannot be inverted: {len(self.fallbacks)} targets are made by upstream's own code",
                    found=", ".join(self.fallbacks[:5]),
                )
            )
        incoming: dict[int, list[tuple[int, Piece]]] = {row: [] for row in sorted(self.used_sources)}
        for row, target in enumerate(self.targets):
            for copy in target.copies:
                for piece in copy.pieces():
                    incoming[target.sources[piece.source]].append((row, _swapped(piece)))
        targets = []
        shared = _Shared()
        for source, pieces in incoming.items():
            rows = sorted({row for row, _ in pieces})
            ordinal = {row: i for i, row in enumerate(rows)}
            copies = shared(group_pieces(canonical(piece._replace(source=ordinal[row])) for row, piece in pieces))
            name, dtype, shape = (
                self.sources.names[source],
                self.sources.dtypes[source],
                self.sources.shapes[source],
            )
            rule = self.targets[rows[0]].rule if rows else -1
            targets.append(Target(name, dtype, shape, rule, tuple(rows), copies))
        table = SourceTable(
            [t.name for t in self.targets],
            [t.dtype for t in self.targets],
            [t.shape for t in self.targets],
        )
        rules = tuple(f"inverse of {rule}" for rule in self.rules)
        plan = CopyPlan(table, tuple(targets), rules)
        plan.validate()
        return plan

    def then(self, following: CopyPlan) -> CopyPlan:
        """One plan that goes from this plan's sources straight to ``following``'s targets.

        Raises:
            UnsupportedError: a target of this plan that the following reads is made by upstream's own code, or the
                two sets of copies cannot be chained.
            CoverageError: ``following`` reads something this plan does not make.
        """
        targets = []
        shared = _Shared()
        chained: dict[tuple[object, ...], tuple[StridedCopy, ...]] = {}
        for target in following.targets:
            passed = self._passed_through(following, target)
            if passed is not None:
                targets.append(passed)
                continue
            middle = [self._middle(following, row, target) for row in target.sources]
            targets.append(self._through(target, middle, shared, chained))
        plan = CopyPlan(
            self.sources,
            tuple(targets),
            (*self.rules, *following.rules),
            (*self.missing, *following.missing),
            (*self.unexpected, *following.unexpected),
            (*self.mismatched, *following.mismatched),
        )
        plan.validate()
        return plan

    def _passed_through(self, following: CopyPlan, target: Target) -> Target | None:
        """What this plan makes, if ``following`` leaves it as it is; such a target may even be upstream's work."""
        if len(target.sources) != 1 or target.name not in self._rows or target.fallback is not None:
            return None
        made = self.targets[self._rows[target.name]]
        name = following.sources.names[target.sources[0]]
        same = (name, target.dtype, target.shape) == (made.name, made.dtype, made.shape)
        return made if same and target.is_whole else None

    def _middle(self, following: CopyPlan, row: int, target: Target) -> Target:
        read = following.sources
        name, shape, dtype = read.names[row], read.shapes[row], read.dtypes[row]
        made = self._rows.get(name)
        if made is None or (self.targets[made].dtype, self.targets[made].shape) != (dtype, shape):
            raise CoverageError(
                message(
                    f"{target.name} needs {name}, which the plan before does not make like that",
                    expected=f"{dtype} {list(shape)}",
                    found=None if made is None else f"{self.targets[made].dtype} {list(self.targets[made].shape)}",
                )
            )
        if target.fallback is not None or self.targets[made].fallback is not None:
            raise UnsupportedError(message(f"{name} is made by upstream's own code, so plans cannot be chained there"))
        if any(self.sources.dtypes[s] != dtype for s in self.targets[made].sources) and dtype != target.dtype:
            raise UnsupportedError(
                message(
                    f"{target.name} would be cast twice on the way",
                    found=f"{self.sources.dtypes[self.targets[made].sources[0]]} -> {dtype} -> {target.dtype}",
                    do="give the dtype to one of the two plans only",
                )
            )
        return self.targets[made]

    def _through(
        self,
        target: Target,
        middle: list[Target],
        shared: _Shared,
        chained: dict[tuple[object, ...], tuple[StridedCopy, ...]],
    ) -> Target:
        starts, sources = [], []
        for made in middle:
            starts.append(len(sources))
            sources += made.sources
        key = (id(target.copies), *((id(m.copies), len(m.sources), m.shape) for m in middle))
        if key not in chained:
            pieces: list[Piece] = []
            for copy in target.copies:
                for piece in copy.pieces():
                    made = middle[piece.source]
                    first = [p for c in made.copies for p in c.pieces()]
                    for p in _chained(first, piece, made, target):
                        pieces.append(p._replace(source=p.source + starts[piece.source]))
            chained[key] = shared(group_pieces(pieces))
        rule = middle[0].rule if middle else -1
        if rule < 0 and target.rule >= 0:
            rule = target.rule + len(self.rules)
        return Target(target.name, target.dtype, target.shape, rule, tuple(sources), chained[key])

    # --- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The whole plan as JSON; ``from_json`` gives an equal plan back.

        Raises:
            UnsupportedError: a target is made by upstream's own code, which is a live object.
        """
        if self.fallbacks:
            raise UnsupportedError(message("a plan with targets made by upstream's own code has no JSON form"))
        table: dict[int, int] = {}
        copies: list[tuple[StridedCopy, ...]] = []
        for target in self.targets:
            if id(target.copies) not in table:
                table[id(target.copies)] = len(copies)
                copies.append(target.copies)
        return json.dumps(
            {
                "version": 1,
                "sources": [
                    list(self.sources.names),
                    list(self.sources.dtypes),
                    list(self.sources.shapes),
                ],
                "copies": copies,
                "targets": [[*target[:5], table[id(target.copies)]] for target in self.targets],
                "rules": self.rules,
                "missing": self.missing,
                "unexpected": self.unexpected,
                "mismatched": self.mismatched,
            }
        )

    @staticmethod
    def from_json(text: str) -> CopyPlan:
        """A plan from ``to_json``; validated again, since a file may have been edited.

        Raises:
            UnsupportedError: not a plan of this version.
            CoverageError: the plan does not write every element once.
        """
        try:
            data = _tuples(json.loads(text))
        except json.JSONDecodeError:
            data = None
        if not isinstance(data, dict) or data.get("version") != 1:
            raise UnsupportedError(message("not a plan in JSON form", expected="version 1"))
        copies = [tuple(StridedCopy(*copy) for copy in group) for group in data["copies"]]
        targets = tuple(
            Target(name, dtype, shape, rule, sources, copies[group])
            for name, dtype, shape, rule, sources, group in data["targets"]
        )
        names, dtypes, shapes = data["sources"]
        unknown = {*dtypes, *(target.dtype for target in targets)} - BITS.keys()
        if unknown:
            raise UnsupportedError(message("a plan with unknown dtypes", found=sorted(unknown)))
        plan = CopyPlan(
            SourceTable(list(names), list(dtypes), list(shapes)),
            targets,
            data["rules"],
            data["missing"],
            data["unexpected"],
            data["mismatched"],
        )
        plan.validate()
        return plan


class _Shared:
    """Makes equal copies one object, so that targets of equal geometry are proved and printed once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[StridedCopy, ...], tuple[StridedCopy, ...]] = {}

    def __call__(self, copies: tuple[StridedCopy, ...]) -> tuple[StridedCopy, ...]:
        return self._seen.setdefault(copies, copies)


def _swapped(piece: Piece) -> Piece:
    return Piece(
        piece.source,
        piece.shape,
        piece.target_strides,
        piece.target_offset,
        piece.source_strides,
        piece.source_offset,
    )


def _chained(first: list[Piece], piece: Piece, made: Target, target: Target) -> list[Piece]:
    try:
        return chain(first, [piece], prod(made.shape))
    except NotAffine as error:
        raise UnsupportedError(
            message(f"{target.name} cannot be made straight from the sources of {made.name}: {error}")
        ) from None


def _walk(offset: int, shape: Sequence[int], strides: Sequence[int]) -> str:
    steps = " ".join(f"{size}x{stride}" for size, stride in zip(shape, strides, strict=True))
    return f"[{offset}{' + ' if steps else ''}{steps}]"


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
