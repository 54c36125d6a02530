"""Compile names, rules and shapes to a validated plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from automodel_conv.dtypes import FLOATING, dtype_code, promoted, torch_dtype
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.casts import check_cast
from automodel_conv.planning.code_names import parts_of_codes
from automodel_conv.planning.copies import Fallback, Fill, SourceTable, StridedCopy, Target, zero_rows
from automodel_conv.planning.operations import OPERATIONS, NotLowerable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.resolve import Assignment, all_targets, missing_parts, resolve
from automodel_conv.planning.rule_outputs import Lowered, RuleOutputs
from automodel_conv.planning.rules import Rules
from automodel_conv.planning.square import square_matrices
from automodel_conv.planning.values import LoweringError
from automodel_conv.planning.wanted import AsStored, TargetSpec


def compile_targets(
    sources: SourceTable,
    rules: Rules,
    targets: Mapping[str, TargetSpec] | None,
    dtype: str | None = None,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
    transposed: bool | None = None,
    as_stored: AsStored | None = None,
) -> tuple[CopyPlan, Problems]:
    """Return the plan that fills ``targets`` from ``sources`` by ``rules``, and the problems that it leaves out.

    Args:
        sources: tensors of a checkpoint.
        rules: rules of the model or the caller.
        targets: tensors of the model; None: every output of the rules becomes a target, in the dtype of its sources.
        dtype: dtype code that floating tensors, except scales of codes, are cast to if ``targets`` is None.
        parameters: shapes of the model's parameters, for operations that read them; None: those of ``targets``.
        transposed: whether to transpose a square matrix whose orientation no shape determines. It concerns rules that
            transpose only tensors without the model's shape. None: such a matrix is an error.
        as_stored: decides which sources keep their dtype on the way to new targets.

    Raises:
        UnsupportedError: the orientation of a square matrix is undetermined; see ``square_matrices``.
    """
    if parameters is None and targets is not None:
        parameters = {name: spec.shape for name, spec in targets.items()}
    parameters = parameters or {}
    resolution = resolve(sources.names, rules, targets, sources.hidden)
    if parameters or transposed is None:
        transposed_by_target = square_matrices(resolution.assignments, rules, sources.shapes, parameters, transposed)
    else:  # without the shapes of a model, no shape determines the orientation
        transposed_by_target = {assignment.target: transposed for assignment in resolution.assignments}
    compiler = Compiler(sources, rules, targets, dtype, parameters, transposed_by_target, as_stored)
    filled: dict[str, Target] = {}
    for assignment in resolution.assignments:
        for target in compiler.targets_of(assignment):
            filled.setdefault(target.name, target)
    problems = compiler.problems
    problems.unclaimed = resolution.unclaimed
    problems.without_place = [name for name in resolution.unexpected if name not in problems.unexpected]
    problems.unexpected += resolution.unexpected
    problems.duplicated += resolution.duplicated
    if targets is not None:
        touched = compiler.touched | filled.keys()
        problems.missing += [name for name in targets if name not in touched]
        filled = {name: filled[name] for name in targets if name in filled}
    plan = CopyPlan(
        sources,
        tuple(filled.values()),
        tuple(rules.describe(row) for row in range(len(rules.converters))),
        tuple(problems.missing),
        tuple(problems.unexpected),
        tuple(problems.mismatched),
    )
    plan.validate()
    return plan, problems


class Compiler:
    """Compiles assignments to targets, and collects problems."""

    def __init__(
        self,
        sources: SourceTable,
        rules: Rules,
        targets: Mapping[str, TargetSpec] | None,
        dtype: str | None,
        parameters: Mapping[str, tuple[int, ...]],
        transposed_by_target: Mapping[str, bool],
        as_stored: AsStored | None = None,
    ):
        self.sources = sources
        self.rules = rules
        self.targets = targets
        self.dtype = dtype
        self._kept = parts_of_codes(sources) if dtype is not None else frozenset()
        self.as_stored = as_stored
        self.problems = Problems()
        self.touched: set[str] = set()  # targets that a source provides, even if it does not fit
        self._outputs = RuleOutputs(sources, rules, parameters, transposed_by_target)

    def targets_of(self, assignment: Assignment) -> list[Target]:
        """Return the targets of an assignment; record those that cannot be filled in ``problems``."""
        if assignment.rule < 0:
            row = next(iter(assignment.slots.values()))[0]
            shape = self.sources.shapes[row]
            target = self._target(assignment, assignment.target, shape, (row,), self._outputs.whole(prod(shape)))
            return [target] if target is not None else []
        return self._convert(assignment)

    def _convert(self, assignment: Assignment) -> list[Target]:
        rows = tuple([row for slot in assignment.slots.values() for row in slot])
        try:
            lowered = self._outputs.lower_rule(assignment)
        except (NotLowerable, NotAffine) as error:
            return self._fallback_targets(assignment, rows, str(error))
        except LoweringError as error:
            self._record_failure(assignment, None, str(error))
            return []
        self._record_unused(assignment, rows, lowered)
        targets = []
        names = self._full_names(assignment.target, [output.key for output in lowered.outputs])
        for output, name in zip(lowered.outputs, names, strict=True):
            all_read = len(output.reads) in (0, len(rows))  # none: the sources are empty, but determine the dtype
            sources = rows if all_read else tuple([rows[i] for i in output.reads])
            fills = zero_rows(output.shape, output.zero_rows)
            target = self._target(assignment, name, output.shape, sources, output.copies, fills)
            if target is not None:
                targets.append(target)
        return targets

    def _record_unused(self, assignment: Assignment, rows: tuple[int, ...], lowered: Lowered) -> None:
        """Record sources that the operations drop, and gaps in a merged list that no model's shape would reveal."""
        if lowered.dropped:
            kept = next((i for i in range(len(rows)) if i not in lowered.dropped), 0)
            names = [self.sources.names[rows[i]] for i in (kept, *lowered.dropped)]
            self.problems.duplicated.append((assignment.target, tuple(names)))
        if self.targets is None and self._merges(assignment):
            parts = missing_parts(self.sources.names, assignment, self.rules.patterns(assignment.rule)[0], 0)
            if parts:
                self.problems.incomplete.append((assignment.target, tuple(parts)))

    def _merges(self, assignment: Assignment) -> bool:
        """Return whether an operation of the assignment's rule merges a list, in which a part may be absent."""
        return any(OPERATIONS[op.name].merges for op in self.rules.operations(assignment.rule))

    def _full_names(self, first: str, keys: Sequence[str]) -> list[str]:
        """Return the full names for an operation's output keys, as transformers' ``WeightConverter.convert`` does."""
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
        fills: tuple[Fill, ...] = (),
    ) -> Target | None:
        dtypes, rule = self.sources.dtypes, assignment.rule
        if self.targets is None:
            return Target(name, self._free_dtype(name, rows), shape, rule, rows, copies, fills=fills)
        self.touched.add(name)
        spec = self.targets.get(name)
        if spec is None:
            self.problems.unexpected.append(name)
            return None
        if spec.shape != shape:
            self._record_failure(assignment if rule >= 0 else None, (name, shape, spec.shape), "")
            return None
        dtype = self._new_dtype(rows, assignment.target) if spec.is_new else spec.dtype
        for row in rows:
            if dtypes[row] != dtype:
                check_cast(self.sources.names[row], dtypes[row], name, dtype)
        return Target(name, dtype, shape, rule, rows, copies, fills=fills)

    def _new_dtype(self, rows: Iterable[int], first: str) -> str:
        """Return the dtype of a tensor that a rule builds from sources, given the rule's first target."""
        if self.as_stored is None:
            return self.targets[first].dtype  # type: ignore[index]
        return promoted(self._given_dtype(row, first) for row in rows)

    def _given_dtype(self, row: int, first: str) -> str:
        """Return the dtype in which transformers passes a source to the operations of a rule with this first target."""
        stored, wanted = self.sources.dtypes[row], self.targets[first].dtype  # type: ignore[index]
        if stored == wanted or self.as_stored is None or row in self.sources.decodes:
            return wanted
        return stored if self.as_stored(self.sources.names[row], stored, first) else wanted

    def _free_dtype(self, name: str, rows: tuple[int, ...]) -> str:
        """Return the dtype of a target that no model specifies."""
        dtypes = {self.sources.dtypes[row] for row in rows}
        if self.dtype is not None and dtypes <= FLOATING and self._kept.isdisjoint(self.sources.names[r] for r in rows):
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

    def _fallback_targets(self, assignment: Assignment, rows: tuple[int, ...], reason: str) -> list[Target]:
        names = all_targets(self.rules, assignment.rule, assignment.target)
        if self.targets is None:
            self.problems.failed.append((assignment.target, f"{reason}; only a model has the shape of the result"))
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
        output_dtypes = self._output_dtypes(fallback, rows) if any(spec.is_new for spec in specs.values()) else {}
        return [
            Target(
                name,
                output_dtypes.get(name, self.targets[assignment.target].dtype) if spec.is_new else spec.dtype,
                spec.shape,
                assignment.rule,
                rows,
                (),
                fallback,
            )
            for name, spec in specs.items()
        ]

    def _output_dtypes(self, fallback: Fallback, rows: Iterable[int]) -> dict[str, str]:
        """Return the dtypes that a fallback produces by target name, empty if it cannot run without values."""
        shapes, dtypes = self.sources.shapes, self.sources.dtypes
        try:
            with torch.no_grad():
                sources = {row: torch.empty(shapes[row], dtype=torch_dtype(dtypes[row]), device="meta") for row in rows}
                outputs = fallback.convert(sources)
        except Exception:  # an operation may need values and raise anything; with values it reports its errors itself
            return {}
        tensors = {name: tensor for name, tensor in outputs.items() if isinstance(tensor, Tensor)}
        return {name: code for name, tensor in tensors.items() if (code := dtype_code(tensor.dtype)) is not None}

    def _record_failure(
        self,
        assignment: Assignment | None,
        mismatch: tuple[str, tuple[int, ...], tuple[int, ...]] | None,
        reason: str,
    ) -> None:
        """Record a target that cannot be filled under the most informative kind of problem."""
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
