"""Select the uses of rules that fit in every respect, for a load that leaves all other tensors alone."""

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
    """Source rows that one use of a rule takes, and all targets that it makes of them."""

    rows: tuple[int, ...]
    targets: tuple[Target, ...]


def whole_conversions(
    sources: SourceTable, rules: Rules, targets: Mapping[str, TargetSpec], coded: Container[int] = ()
) -> tuple[list[RuleUse], dict[str, str]]:
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
    compiler = Compiler(sources, rules, targets, None, parameters, lies)
    conversions: list[tuple[str, RuleUse]] = []
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
        conversions.append((assignment.target, RuleUse(rows, tuple(made))))
    whole = []
    for first, conversion in conversions:
        if all(claimed[target.name] == 1 for target in conversion.targets):
            whole.append(conversion)
        else:
            left[first] = "several sources claim one of its targets"
    return whole, left
