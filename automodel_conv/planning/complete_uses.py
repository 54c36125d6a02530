"""Select the rule uses that fit completely, for a load that does not touch any other tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.compiler import Compiler
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.resolve import all_targets, resolve
from automodel_conv.planning.rules import Rules
from automodel_conv.planning.square import square_matrices
from automodel_conv.planning.wanted import TargetSpec


class RuleUse(NamedTuple):
    """One use of a rule: the source rows that it consumes and the targets that it produces."""

    rows: tuple[int, ...]
    targets: tuple[Target, ...]


def whole_conversions(
    sources: SourceTable, rules: Rules, targets: Mapping[str, TargetSpec], coded: Container[int] = ()
) -> tuple[list[RuleUse], dict[str, str]]:
    """Return the rule uses that fit completely, and the reason for each target that does not.

    The two results share no source and no target, so they can be converted separately. Tensors that are only renamed
    are in neither result, unless their rows are in ``coded``.

    Args:
        coded: rows that hold codes.

    Raises:
        UnsupportedError: the orientation of a square matrix is unknown; see ``square_matrices``.
    """
    resolution = resolve(sources.names, rules, targets, sources.hidden)
    claimed = Counter(assignment.target for assignment in resolution.assignments)
    contested = {name for name, _ in resolution.duplicated}
    parameters = {name: spec.shape for name, spec in targets.items()}
    transposed = square_matrices(resolution.assignments, rules, sources.shapes, parameters)
    compiler = Compiler(sources, rules, targets, None, parameters, transposed)
    conversions: list[tuple[str, RuleUse]] = []
    reasons: dict[str, str] = {}
    for assignment in resolution.assignments:
        rows = tuple(row for slot in assignment.slots.values() for row in slot)
        if assignment.rule < 0 and not any(row in coded for row in rows):
            continue
        compiler.problems = Problems()
        produced: list[Target] = []
        try:
            produced = compiler.targets_of(assignment)
        except UnsupportedError as error:
            reasons[assignment.target] = error.reason()
        # A rule use that does not fit still claims the targets that it might produce.
        possible = {*all_targets(rules, assignment.rule, assignment.target), *(target.name for target in produced)}
        claimed.update(possible - {assignment.target})
        if assignment.target in reasons:
            continue
        obstacles = [target.fallback.reason for target in produced if target.fallback is not None]
        obstacles += compiler.problems.reasons()
        if obstacles or not produced or assignment.target in contested:
            reasons[assignment.target] = obstacles[0] if obstacles else "several sources claim it"
            continue
        conversions.append((assignment.target, RuleUse(rows, tuple(produced))))
    complete = []
    for first_target, use in conversions:
        if all(claimed[target.name] == 1 for target in use.targets):
            complete.append(use)
        else:
            reasons[first_target] = "several sources claim one of its targets"
    return complete, reasons
