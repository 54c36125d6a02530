"""The text of a rule on several lines: each source, the target, and the operations; pure."""

from __future__ import annotations

import re

# The space between two operations, as in "MergeModulelist(dim=0), Concatenate(dim=1)".
_BETWEEN = re.compile(r"(?<=\),) ")


def rule_lines(text: str, width: int) -> list[str]:
    """Divide the text of a rule into lines that are at most ``width`` wide where its names permit.

    A text that fits is one line. Otherwise each step of a composed rule is one line, or has a line for each source, for
    its target and for its operations, or for each of them. No name and no operation is left out.

    Example:
        >>> rule = "e.*.gate + e.*.up -> gate_up: MergeModulelist(dim=0), Concatenate(dim=1)"
        >>> print(*rule_lines(rule, 50), sep="\\n")
        e.*.gate
          + e.*.up
          -> gate_up:
             MergeModulelist(dim=0), Concatenate(dim=1)
    """
    if len(text) <= width:
        return [text]
    first, *others = text.split(", then ")
    steps = [first, *(f"then {step}" for step in others)]
    return [line for step in steps for line in _step_lines(step, width)]


def _step_lines(step: str, width: int) -> list[str]:
    if len(step) <= width:
        return [step]
    names, _, operations = step.partition(": ")
    sources, _, targets = names.partition(" -> ")
    first, *others = sources.split(" + ")
    lines = [first, *(f"  + {source}" for source in others)]
    lines += [f"  -> {targets}{':' if operations else ''}"] if targets else []
    fits = len(operations) + 5 <= width
    return lines + [f"     {line}" for line in ([operations] if fits else _BETWEEN.split(operations)) if line]
