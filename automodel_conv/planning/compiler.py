"""From names, rules and shapes to a validated plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import FLOATING, dtype_code, promoted, torch_dtype
from automodel_conv.errors import Message, NameProblems, UnsupportedError, listing, message
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.casts import check_cast
from automodel_conv.planning.copies import Fallback, SourceTable, StridedCopy, Target
from automodel_conv.planning.lowering import copies_of, lower, needs_target_shapes
from automodel_conv.planning.operations import OPERATIONS, Context, NotLowerable, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.resolve import Assignment, all_targets, missing_parts, resolve
from automodel_conv.planning.rules import Rules
from automodel_conv.planning.square import square_matrices
from automodel_conv.planning.values import LoweringError, Value, leaf, leaves

AsStored = Callable[[str, str, str], bool]
"""Whether a source of a dtype keeps it on the way to a target: ``(source, dtype code, target)``."""


class TargetSpec(NamedTuple):
    """What a target must be."""

    dtype: str
    shape: tuple[int, ...]
    is_new: bool = False
    """No value is there yet: it takes the dtype that ``from_pretrained`` gives it, which is that of the sources after
    their cast, and they are cast to ``dtype`` of the first target of their rule."""


@dataclass
class Problems:
    """Everything that does not fit, collected over a whole plan."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    duplicated: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    incomplete: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    unclaimed: list[int] = field(default_factory=list)
    """Rows of the sources that no rule gives to a target."""
    without_place: list[str] = field(default_factory=list)
    """Those of ``unexpected`` that they would become."""

    def set_aside(self) -> frozenset[int]:
        """Take sources that no rule gives to a target for no problem; returns their rows."""
        forgiven = set(self.without_place)
        self.unexpected = [name for name in self.unexpected if name not in forgiven]
        return frozenset(self.unclaimed)

    def reasons(self) -> list[str]:
        """A line for each problem of a target that something provides."""
        return [
            *(f"parts are absent: {', '.join(parts[:3])}" for _, parts in self.incomplete),
            *(f"shape {list(found)} instead of {list(expected)}" for _, found, expected in self.mismatched),
            *(f"several sources claim it: {', '.join(sources[:3])}" for _, sources in self.duplicated),
            *(f"the model has no {name}" for name in self.unexpected),
            *(reason for _, reason in self.failed),
        ]

    def raise_unless_fit(self, where: str, strict: bool = True, unindexed: Sequence[tuple[str, str]] = ()) -> None:
        """Raise NameProblems with every problem in one text.

        Args:
            strict: otherwise only for what cannot be converted at all, as upstream does.
            unindexed: name and file of what lies in the checkpoint's files and is no part of it, which may be what is
                missing.
        """
        if not strict and not self.failed:
            return
        explained = {name for name, _ in self.incomplete}
        wrong = [item for item in self.mismatched if item[0] not in explained]
        failed = [item for item in self.failed if item[0] not in explained]
        parts = [
            ("missing: nothing in the checkpoint provides", self.missing),
            ("unexpected: no parameter takes", self.unexpected),
            (
                "incomplete: parts of a merged parameter are absent",
                [_named(n, p) for n, p in self.incomplete],
            ),
            ("wrong shape", [f"{n}: expected {list(e)}, found {list(f)}" for n, f, e in wrong]),
            (
                "not taken, as the index does not give them to these files",
                [f"{name} in {file}" for name, file in unindexed if self.missing or self.incomplete],
            ),
            ("provided twice", [_named(n, p) for n, p in self.duplicated]),
            ("cannot be converted", [f"{n}: {reason}" for n, reason in failed]),
        ]
        found = [f"  {title} ({len(items)}):\n{listing(items)}" for title, items in parts if items]
        if found:
            do = ["check that config and checkpoint belong together"]
            if not failed:
                do.append("{strict=False} loads what fits, as upstream does")
            raise NameProblems(
                Message("\n".join([f"checkpoint and model do not fit together: {where}", *found]), do),
                missing=self.missing,
                unexpected=self.unexpected,
                mismatched=self.mismatched,
                duplicated=self.duplicated,
                incomplete=self.incomplete,
            )


def _named(name: str, parts: Sequence[str]) -> str:
    shown = ", ".join(parts[:4]) + (f", ... {len(parts) - 4} more" if len(parts) > 4 else "")
    return f"{name}: {shown}"


def compile_targets(
    sources: SourceTable,
    rules: Rules,
    targets: Mapping[str, TargetSpec] | None,
    dtype: str | None = None,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
    transposed: bool | None = None,
    as_stored: AsStored | None = None,
) -> tuple[CopyPlan, Problems]:
    """The plan that makes ``targets`` from ``sources`` by ``rules``, and what did not fit and was left out of it.

    Args:
        targets: what the model has; None makes whatever the rules give, in the sources' dtypes.
        dtype: without targets, the dtype that floating tensors are cast to.
        parameters: shapes of the model's parameters, for operations that ask; the targets', unless given.
        transposed: whether a matrix of which no shape tells how it lies is transposed, where a rule transposes only
            what does not have the model's shape; None: it is an error.
        as_stored: sources that are not cast on their way to new targets.

    Raises:
        UnsupportedError: a square matrix of which nothing tells how it lies; see ``square_matrices``.
    """
    if parameters is None and targets is not None:
        parameters = {name: spec.shape for name, spec in targets.items()}
    parameters = parameters or {}
    resolution = resolve(sources.names, rules, targets, sources.hidden)
    if parameters or transposed is None:
        lies = square_matrices(resolution.assignments, rules, sources.shapes, parameters, transposed)
    else:  # without a model's shapes no matrix tells how it lies
        lies = {assignment.target: transposed for assignment in resolution.assignments}
    compiler = _Compiler(sources, rules, targets, dtype, parameters, lies, as_stored)
    made: dict[str, Target] = {}
    for assignment in resolution.assignments:
        for target in compiler.targets_of(assignment):
            made.setdefault(target.name, target)
    problems = compiler.problems
    problems.unclaimed = resolution.unclaimed
    problems.without_place = [name for name in resolution.unexpected if name not in problems.unexpected]
    problems.unexpected += resolution.unexpected
    problems.duplicated += resolution.duplicated
    if targets is not None:
        touched = compiler.touched | made.keys()
        problems.missing += [name for name in targets if name not in touched]
        made = {name: made[name] for name in targets if name in made}
    plan = CopyPlan(
        sources,
        tuple(made.values()),
        tuple(rules.describe(row) for row in range(len(rules.converters))),
        tuple(problems.missing),
        tuple(problems.unexpected),
        tuple(problems.mismatched),
    )
    plan.validate()
    return plan, problems


class Conversion(NamedTuple):
    """Source rows that one use of a rule takes, and all targets that it makes of them."""

    rows: tuple[int, ...]
    targets: tuple[Target, ...]


def whole_conversions(
    sources: SourceTable, rules: Rules, targets: Mapping[str, TargetSpec], coded: Container[int] = ()
) -> tuple[list[Conversion], dict[str, str]]:
    """The uses of rules that fit in every respect, and the targets of all others with the reason.

    What is left out shares no source and no target with what is returned, so that it can be converted apart from it.
    Tensors that are only renamed are in neither, unless their rows are in ``coded``.

    Raises:
        UnsupportedError: a square matrix of which nothing tells how it lies; see ``square_matrices``.
    """
    resolution = resolve(sources.names, rules, targets, sources.hidden)
    claimed = Counter(assignment.target for assignment in resolution.assignments)
    contested = {name for name, _ in resolution.duplicated}
    parameters = {name: spec.shape for name, spec in targets.items()}
    lies = square_matrices(resolution.assignments, rules, sources.shapes, parameters)
    compiler = _Compiler(sources, rules, targets, None, parameters, lies)
    conversions: list[tuple[str, Conversion]] = []
    left: dict[str, str] = {}
    for assignment in resolution.assignments:
        rows = tuple(row for slot in assignment.slots.values() for row in slot)
        if assignment.rule < 0 and not any(row in coded for row in rows):
            continue
        compiler.problems = Problems()
        made: list[Target] = []
        try:
            made = compiler.targets_of(assignment)
        except UnsupportedError as error:
            left[assignment.target] = error.reason()
        # Also of a rule that is left: what it may make is claimed.
        may_make = {*all_targets(rules, assignment.rule, assignment.target), *(target.name for target in made)}
        claimed.update(may_make - {assignment.target})
        if assignment.target in left:
            continue
        reasons = [target.fallback.reason for target in made if target.fallback is not None]
        reasons += compiler.problems.reasons()
        if reasons or not made or assignment.target in contested:
            left[assignment.target] = reasons[0] if reasons else "several sources claim it"
            continue
        conversions.append((assignment.target, Conversion(rows, tuple(made))))
    whole = []
    for first, conversion in conversions:
        if all(claimed[target.name] == 1 for target in conversion.targets):
            whole.append(conversion)
        else:
            left[first] = "several sources claim one of its targets"
    return whole, left


class _Output(NamedTuple):
    """One tensor that a rule makes: its key, shape and copies, and the ordinals of the sources they read."""

    key: str
    shape: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    reads: tuple[int, ...]


class _Made(NamedTuple):
    """What a rule makes of sources of given shapes, and the ordinals of sources that it drops."""

    outputs: tuple[_Output, ...]
    dropped: tuple[int, ...]


class _Compiler:
    """Lowers assignments to targets; equal rules over equal shapes are lowered once."""

    def __init__(
        self,
        sources: SourceTable,
        rules: Rules,
        targets: Mapping[str, TargetSpec] | None,
        dtype: str | None,
        parameters: Mapping[str, tuple[int, ...]],
        lies_transposed: Mapping[str, bool],
        as_stored: AsStored | None = None,
    ):
        self.sources = sources
        self.rules = rules
        self.targets = targets
        self.dtype = dtype
        self.parameters = parameters
        self.lies_transposed = lies_transposed  # by an assignment's target, where its shape does not tell
        self.as_stored = as_stored
        self.problems = Problems()
        self.touched: set[str] = set()  # targets that something provides, even if wrongly
        self._whole: dict[int, tuple[StridedCopy, ...]] = {}
        self._lowered: dict[object, _Made] = {}
        self._chains: dict[int, tuple[Operation, ...] | NotLowerable] = {}

    def targets_of(self, assignment: Assignment) -> list[Target]:
        if assignment.rule < 0:
            row = next(iter(assignment.slots.values()))[0]
            shape = self.sources.shapes[row]
            target = self._target(assignment, assignment.target, shape, (row,), self._whole_copy(prod(shape)))
            return [target] if target is not None else []
        return self._converted(assignment)

    def _whole_copy(self, numel: int) -> tuple[StridedCopy, ...]:
        if numel not in self._whole:
            self._whole[numel] = copies_of(leaf(0, (numel,)))
        return self._whole[numel]

    def _converted(self, assignment: Assignment) -> list[Target]:
        rows = tuple([row for slot in assignment.slots.values() for row in slot])
        try:
            made = self._lower(assignment)
        except (NotLowerable, NotAffine) as error:
            return self._fallback(assignment, rows, str(error))
        except LoweringError as error:
            self._blame(assignment, None, str(error))
            return []
        self._tell_unused(assignment, rows, made)
        targets = []
        names = self._names(assignment.target, [output.key for output in made.outputs])
        for output, name in zip(made.outputs, names, strict=True):
            all_read = len(output.reads) in (0, len(rows))  # none: empty tensors, which still tell a dtype
            sources = rows if all_read else tuple([rows[i] for i in output.reads])
            target = self._target(assignment, name, output.shape, sources, output.copies)
            if target is not None:
                targets.append(target)
        return targets

    def _tell_unused(self, assignment: Assignment, rows: tuple[int, ...], made: _Made) -> None:
        """File sources that the operations drop, and gaps in a merged list that no model's shape would show."""
        if made.dropped:
            kept = next((i for i in range(len(rows)) if i not in made.dropped), 0)
            names = [self.sources.names[rows[i]] for i in (kept, *made.dropped)]
            self.problems.duplicated.append((assignment.target, tuple(names)))
        if self.targets is None and self._merges(assignment):
            parts = missing_parts(self.sources.names, assignment, self.rules.patterns(assignment.rule)[0], 0)
            if parts:
                self.problems.incomplete.append((assignment.target, tuple(parts)))

    def _merges(self, assignment: Assignment) -> bool:
        return any(OPERATIONS[op.name].merges for op in self.rules.operations(assignment.rule))

    def _lower(self, assignment: Assignment) -> _Made:
        rule = assignment.rule
        if rule not in self._chains:
            try:
                self._chains[rule] = self.rules.operations(rule)
            except NotLowerable as error:
                self._chains[rule] = error
        chain = self._chains[rule]
        if isinstance(chain, NotLowerable):
            raise chain
        source_patterns, target_patterns = self.rules.patterns(rule)
        shapes = self.sources.shapes
        transposed = self.lies_transposed.get(assignment.target)
        wanted = self._target_shapes(assignment) if needs_target_shapes(chain, transposed) else ()
        key = (
            rule,
            wanted,
            transposed,
            *(
                (pattern, len(rows), *_distinct([shapes[row] for row in rows]))
                for pattern, rows in assignment.slots.items()
            ),
        )
        if key not in self._lowered:
            slots, ordinal = {}, 0
            for pattern, rows in assignment.slots.items():
                slots[pattern] = leaves(ordinal, [shapes[row] for row in rows])
                ordinal += len(rows)
            values = lower(chain, slots, Context(source_patterns, target_patterns, wanted, transposed))
            self._lowered[key] = _made(values, [shapes[row] for rows in assignment.slots.values() for row in rows])
        return self._lowered[key]

    def _target_shapes(self, assignment: Assignment) -> tuple[tuple[int, ...], ...]:
        names = all_targets(self.rules, assignment.rule, assignment.target)
        if any(name not in self.parameters for name in names):
            raise NotLowerable(f"the operation asks for the shapes of {', '.join(names)}, which only a model knows")
        return tuple(self.parameters[name] for name in names)

    def _names(self, first: str, keys: Sequence[str]) -> list[str]:
        """Full names from an operation's output keys, as upstream's ``WeightConverter.convert`` expands them."""
        full = first.replace("*.", "0.")
        key = next((key for key in keys if key in full), None)
        if key is None:
            names = list(keys)
        else:
            prefix, _, suffix = full.partition(key)
            names = [prefix + key + suffix for key in keys]
        return [self.rules.rename_part(name) for name in names] if self.rules.reverse else names

    def _target(
        self,
        assignment: Assignment,
        name: str,
        shape: tuple[int, ...],
        rows: tuple[int, ...],
        copies: tuple[StridedCopy, ...],
    ) -> Target | None:
        dtypes, rule = self.sources.dtypes, assignment.rule
        if self.targets is None:
            return Target(
                name,
                self._free_dtype(name, {dtypes[row] for row in rows}),
                shape,
                rule,
                rows,
                copies,
            )
        self.touched.add(name)
        spec = self.targets.get(name)
        if spec is None:
            self.problems.unexpected.append(name)
            return None
        if spec.shape != shape:
            self._blame(assignment if rule >= 0 else None, (name, shape, spec.shape), "")
            return None
        dtype = self._new_dtype(rows, assignment.target) if spec.is_new else spec.dtype
        for row in rows:
            if dtypes[row] != dtype:
                check_cast(self.sources.names[row], dtypes[row], name, dtype)
        return Target(name, dtype, shape, rule, rows, copies)

    def _new_dtype(self, rows: Iterable[int], first: str) -> str:
        """The dtype of what is put together from sources, by the first target of their rule."""
        if self.as_stored is None:
            return self.targets[first].dtype  # type: ignore[index]
        return promoted(self._given_dtype(row, first) for row in rows)

    def _given_dtype(self, row: int, first: str) -> str:
        """The dtype in which upstream gives a source to the operations of a rule, by the first target of the rule."""
        stored, wanted = self.sources.dtypes[row], self.targets[first].dtype  # type: ignore[index]
        if stored == wanted or self.as_stored is None or row in self.sources.decodes:
            return wanted
        return stored if self.as_stored(self.sources.names[row], stored, first) else wanted

    def _free_dtype(self, name: str, dtypes: set[str]) -> str:
        if self.dtype is not None and dtypes <= FLOATING:
            return self.dtype
        if len(dtypes) > 1:
            raise UnsupportedError(
                message(
                    f"the parts of {name} have different dtypes",
                    found=sorted(dtypes),
                    do=["pass {model=}", "pass {dtype=}"],
                )
            )
        return next(iter(dtypes), "F32")

    def _fallback(self, assignment: Assignment, rows: tuple[int, ...], reason: str) -> list[Target]:
        names = all_targets(self.rules, assignment.rule, assignment.target)
        if self.targets is None:
            self.problems.failed.append((assignment.target, f"{reason}; only a model knows the shape of the result"))
            return []
        dtypes = {row: self._given_dtype(row, assignment.target) for row in rows}
        cast = {row: dtype for row, dtype in dtypes.items() if dtype != self.sources.dtypes[row]}
        fallback = Fallback(
            reason,
            self.rules.upstream(
                assignment.rule, assignment.target, assignment.slots, {r: torch_dtype(d) for r, d in cast.items()}
            ),
            self.rules.on_host(assignment.rule),
        )
        self.touched.update(names)
        self.problems.unexpected += [name for name in names if name not in self.targets]
        specs = {name: self.targets[name] for name in names if name in self.targets}
        found = self._dtypes_made(fallback, rows) if any(spec.is_new for spec in specs.values()) else {}
        return [
            Target(
                name,
                found.get(name, self.targets[assignment.target].dtype) if spec.is_new else spec.dtype,
                spec.shape,
                assignment.rule,
                rows,
                (),
                fallback,
            )
            for name, spec in specs.items()
        ]

    def _dtypes_made(self, fallback: Fallback, rows: Iterable[int]) -> dict[str, str]:
        """The dtypes of what upstream's own code makes; empty where it cannot tell without values."""
        shapes, dtypes = self.sources.shapes, self.sources.dtypes
        try:
            with torch.no_grad():
                sources = {row: torch.empty(shapes[row], dtype=torch_dtype(dtypes[row]), device="meta") for row in rows}
                made = fallback.convert(sources)
        except Exception:  # whatever an operation raises that wants values; it says so again when it gets them
            return {}
        tensors = {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}
        return {name: code for name, tensor in tensors.items() if (code := dtype_code(tensor.dtype)) is not None}

    def _blame(
        self,
        assignment: Assignment | None,
        mismatch: tuple[str, tuple[int, ...], tuple[int, ...]] | None,
        reason: str,
    ) -> None:
        """File a target that cannot be made under the most telling heading."""
        if assignment is not None:
            self.touched.add(assignment.target)
            wanted = (self.targets or {}).get(assignment.target)
            expected = wanted.shape if wanted is not None else ()
            one_target = len(self.rules.patterns(assignment.rule)[1]) == 1
            size = expected[0] if expected and one_target and self._merges(assignment) else 0
            parts = missing_parts(self.sources.names, assignment, self.rules.patterns(assignment.rule)[0], size)
            if parts:
                self.problems.incomplete.append((assignment.target, tuple(parts)))
            if mismatch is None:
                self.problems.failed.append((assignment.target, reason))
        if mismatch is not None:
            self.problems.mismatched.append(mismatch)


def _distinct(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """One shape if all are equal, else all of them: enough to tell one lowering from another."""
    return shapes[:1] if shapes.count(shapes[0]) == len(shapes) else shapes


def _made(values: Mapping[str, Value], shapes: Sequence[tuple[int, ...]]) -> _Made:
    """The outputs of a rule for sources of these shapes, from the values that its operations leave."""
    outputs = []
    for key, value in values.items():
        copies = copies_of(value)
        reads = tuple(sorted({ordinal for copy in copies for ordinal in copy.ordinals}))
        place = {ordinal: i for i, ordinal in enumerate(reads)}
        copies = tuple(copy._replace(ordinals=tuple([place[o] for o in copy.ordinals])) for copy in copies)
        outputs.append(_Output(key, value.shape, copies, reads))
    given = {ordinal for ordinal, shape in enumerate(shapes) if 0 not in shape}
    return _Made(tuple(outputs), tuple(sorted(given.difference(*(output.reads for output in outputs)))))
