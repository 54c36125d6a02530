"""The rows of a plan's summary: the targets, source tensors and bytes of each rule; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from automodel_conv.planning.copies import Target

NAME_ONLY = "(name only)"
"""Text for targets whose source is only looked up by name."""


class RuleRow(NamedTuple):
    """The targets that one rule fills in the same way."""

    rule: str | None
    """Text of the rule; None if the sources are only looked up by name."""
    execution: str
    """How the targets are filled; see ``CopyPlan.execution_of``."""
    targets: int
    """Number of targets."""
    sources: int
    """Number of source tensors that they read; a tensor that two targets read counts twice."""
    nbytes: int
    """Bytes of the targets."""


def rows_by_rule(
    targets: Iterable[Target], rules: Sequence[str], execution_of: Callable[[Target], str]
) -> list[RuleRow]:
    """Return a row for each rule and way of execution, the one with most bytes first.

    Args:
        targets: the targets of a plan.
        rules: the texts of its rules.
        execution_of: returns how a target is filled; see ``CopyPlan.execution_of``.
    """
    counts: dict[tuple[int, str], list[int]] = {}
    for target in targets:
        count = counts.setdefault((target.rule, execution_of(target)), [0, 0, 0])
        count[0] += 1
        count[1] += len(target.sources)
        count[2] += target.nbytes
    rows = [RuleRow(None if rule < 0 else rules[rule], way, *count) for (rule, way), count in counts.items()]
    return sorted(rows, key=lambda row: -row.nbytes)
