"""Resolve checkpoint names by rules to assignments: which sources fill which target, in which order.

Names are resolved once per template, which is a name without its numeric components, and instantiated by arithmetic. If
a rule looks at the numbers themselves, the names that it could match are resolved one by one, in transformers' order.
This module raises no errors. It collects all problems, so that one error can report them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from automodel_conv.planning.rules import Rules


class Assignment(NamedTuple):
    """One use of a rule: its first target and its sources."""

    target: str
    """Name of the first target of the rule."""
    rule: int
    """Row of the converter; -1 for a tensor that is only renamed."""
    slots: dict[str, list[int]]
    """Source rows for each source pattern of the rule, in stacking order."""


@dataclass(frozen=True)
class Resolution:
    """The assignments of all names, and the names that have none."""

    assignments: list[Assignment]
    unexpected: list[str]
    """Target names that the model does not have."""
    duplicated: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Targets that several sources could fill, each with the names of those sources."""
    unclaimed: list[int] = field(default_factory=list)
    """Rows of the names that led to ``unexpected``."""


class _Candidate(NamedTuple):
    """Sources that a rule assigns to one pattern of a target."""

    rule: int
    pattern: str
    rows: list[int]


# Sentinels replace the numbers of a template; no checkpoint uses them. The sentinels of a renamed name, which count up
# from this one, show where each number went.
_SENTINEL = 9_700_000
_SENTINELS = re.compile(r"97000\d\d")
_MOST_NUMBERS = 100

# Separators: the first replaces a numeric component in a template, the second ends a name in a text of many names.
_NUMBER, _END = "\0", "\n"
_NUMBERS = re.compile(r"\.(\d+)(?=[.\n])")


class _Group(NamedTuple):
    """All names of one template."""

    numbers: list[list[str]]
    """A column for each numeric component, with the number of each name."""
    rows: list[int]
    """Rows of the names."""


def resolve(
    names: Sequence[str],
    rules: Rules,
    targets: Mapping[str, object] | None,
    hidden: Collection[int] = (),
) -> Resolution:
    """Assign every name to a target.

    Args:
        names: source names, in any order.
        rules: rules that rename and merge.
        targets: existing target names as keys, whose values are never None; None: every name exists.
        hidden: rows of names to skip.
    """
    candidates: dict[str, list[_Candidate]] = {}
    unexpected: dict[str, None] = {}
    templates, one_by_one = _templates(names, hidden)
    for template, (numbers, rows) in templates.items():
        representative = _representative(template)
        if len(numbers) > _MOST_NUMBERS or _SENTINELS.search(template) or rules.looks_at_digits(representative):
            one_by_one += rows
            continue
        renamed, rule, pattern = rules.rename(representative)
        if _depends_on_length(names, rules, numbers, rows, (renamed, rule, pattern)):
            one_by_one += rows
            continue
        for target, members in _instances(renamed, numbers, rows):
            candidate = _Candidate(rule, pattern, members)
            _add_candidate(names, rules, targets, candidates, unexpected, target, candidate)
    for row in sorted(one_by_one, key=lambda row: rules.natural_key(names[row])):
        renamed, rule, pattern = rules.rename(names[row])
        candidate = _Candidate(rule, pattern, [row])
        _add_candidate(names, rules, targets, candidates, unexpected, renamed, candidate)
    assignments, duplicated = [], []
    for target, rivals in candidates.items():
        assignment, losers = _choose(names, rules, target, rivals)
        assignments.append(assignment)
        if losers:
            rows = [row for slot in assignment.slots.values() for row in slot]
            duplicated.append((target, tuple(names[row] for row in [*rows[:1], *losers])))
    if not unexpected:
        return Resolution(assignments, [], duplicated)
    claimed = {row for rivals in candidates.values() for candidate in rivals for row in candidate.rows}
    unclaimed = [row for row in range(len(names)) if row not in claimed and row not in hidden]
    return Resolution(assignments, list(unexpected), duplicated, unclaimed)


def _templates(names: Sequence[str], hidden: Collection[int]) -> tuple[dict[str, _Group], list[int]]:
    """Group names by template: ``".layers\\0.w1" -> _Group([["0", "1"]], [row, row])``.

    Also return the rows of names that contain one of the two separators. All names are searched as one text, which is
    several times as fast as one search for each name.
    """
    rows = [row for row in range(len(names)) if row not in hidden] if hidden else list(range(len(names)))
    text = "".join([f".{names[row]}{_END}" for row in rows])
    marked: list[int] = []
    if _NUMBER in text or text.count(_END) != len(rows):
        marked = [row for row in rows if _NUMBER in names[row] or _END in names[row]]
        rows = sorted(set(rows).difference(marked))
        text = "".join([f".{names[row]}{_END}" for row in rows])
    parts = _NUMBERS.split(text)
    texts, numbers = parts[::2], parts[1::2]
    groups: dict[str, tuple[int, list[int], list[int]]] = {}
    first = 0  # index of the first number of the name
    for row, template in zip(rows, _NUMBER.join(texts).split(_END), strict=False):
        group = groups.get(template)
        if group is None:
            group = groups[template] = (template.count(_NUMBER), [], [])
        group[1].append(first)
        group[2].append(row)
        first += group[0]
    return {
        template: _Group([[numbers[first + i] for first in firsts] for i in range(count)], members)
        for template, (count, firsts, members) in groups.items()
    }, marked


def _representative(template: str) -> str:
    """Return the name of a template that has sentinels as numbers."""
    first, *rest = template.split(_NUMBER)
    return (first + "".join(f".{_SENTINEL + i}{text}" for i, text in enumerate(rest)))[1:]


def _depends_on_length(
    names: Sequence[str],
    rules: Rules,
    numbers: list[list[str]],
    rows: list[int],
    outcome: tuple[str, int, str],
) -> bool:
    """Return whether a real name is not renamed in the same way as the representative of its template.

    No rule looks at the digits here, so numbers of the same lengths are renamed in the same way. One name for each
    combination of lengths is checked.
    """
    if not numbers or not len(rules):
        return False
    renamed, rule, pattern = outcome
    index_by_lengths = dict(
        zip(zip(*[map(len, column) for column in numbers], strict=True), range(len(rows)), strict=True)
    )
    for index in index_by_lengths.values():
        expected = _SENTINELS.sub(lambda match, index=index: numbers[int(match.group()) - _SENTINEL][index], renamed)
        name = names[rows[index]]
        if rules.rename(name) != (expected, rule, pattern if rule >= 0 else name):
            return True
    return False


def _instances(renamed: str, numbers: list[list[str]], rows: list[int]) -> list[tuple[str, list[int]]]:
    """Return the targets of one template, each with its rows in natural order of the numbers that the rule removed."""
    kept = [int(sentinel) - _SENTINEL for sentinel in _SENTINELS.findall(renamed)]
    texts = _SENTINELS.split(renamed)
    lost = [i for i in range(len(numbers)) if i not in kept]
    keys = zip(*[numbers[i] for i in kept], strict=True) if kept else [()] * len(rows)
    if not lost:
        return [(_fill_in(texts, key), [row]) for key, row in zip(keys, rows, strict=True)]
    groups: defaultdict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for key, member in zip(keys, zip(*[map(int, numbers[i]) for i in lost], rows, strict=True), strict=True):
        groups[key].append(member)
    return [(_fill_in(texts, key), [member[-1] for member in sorted(members)]) for key, members in groups.items()]


def _fill_in(texts: Sequence[str], numbers: Sequence[str]) -> str:
    """Return a name from its numbers and the texts between them."""
    return "".join([part for pair in zip(texts, [*numbers, ""], strict=True) for part in pair])


def _add_candidate(
    names: Sequence[str],
    rules: Rules,
    targets: Mapping[str, object] | None,
    candidates: dict[str, list[_Candidate]],
    unexpected: dict[str, None],
    renamed: str,
    candidate: _Candidate,
) -> None:
    """Add a candidate for the target ``renamed``, or its targets to ``unexpected`` if the model does not have it."""
    if targets is None:
        candidates.setdefault(renamed, []).append(candidate)
        return
    target = rules.with_prefix(renamed, targets)
    if target in targets:
        candidates.setdefault(target, []).append(candidate)
        return
    is_unexpected = False
    for row in candidate.rows:
        name = names[row]
        if name in targets:  # the name was right already and should not have been renamed
            candidates.setdefault(rules.with_prefix(name, targets), []).append(_Candidate(-1, name, [row]))
        else:
            is_unexpected = True
    if is_unexpected:
        unexpected.update(dict.fromkeys(all_targets(rules, candidate.rule, target)))


def all_targets(rules: Rules, rule: int, target: str) -> list[str]:
    """Return the names of all targets of one use of a rule, given the first."""
    if rule < 0:
        return [target]
    patterns = rules.patterns(rule)[1]
    return [target.replace(patterns[0], pattern) for pattern in patterns]


def _choose(names: Sequence[str], rules: Rules, target: str, rivals: list[_Candidate]) -> tuple[Assignment, list[int]]:
    """Return the assignment of a target and the rejected rows; the candidate that is first in natural order wins."""
    is_contested = len(rivals) > 1 and (rivals[0].rule < 0 or len({rival.rule for rival in rivals}) > 1)
    if is_contested:
        rivals = sorted(rivals, key=lambda rival: min(rules.natural_key(names[row]) for row in rival.rows))
    rule = rivals[0].rule
    slots: dict[str, list[int]] = {}
    losers: list[int] = []
    for candidate_rule, pattern, rows in rivals:
        if candidate_rule != rule or (rule < 0 and slots):
            losers += rows
        elif rule < 0:  # names that lost their number: the first one stays
            slots[pattern] = rows[:1]
            losers += rows[1:]
        elif pattern in slots:
            slots[pattern] = sorted(slots[pattern] + rows, key=lambda row: rules.natural_key(names[row]))
        else:
            slots[pattern] = rows
    return Assignment(target, rule, slots), losers


def missing_parts(names: Sequence[str], assignment: Assignment, patterns: Sequence[str], size: int) -> list[str]:
    """Return the names of the parts that a merged target lacks.

    Missing parts are gaps in the one number that counts the parts, and patterns without any source.

    Args:
        names: source names.
        assignment: sources of the target.
        patterns: source patterns of the rule.
        size: least number of parts that the target expects; 0 if unknown.
    """
    parts = {pattern: [names[row].split(".") for row in rows] for pattern, rows in assignment.slots.items()}
    counted: dict[str, tuple[list[str], int, set[int]]] = {}
    for pattern, split in parts.items():
        position = _counting_position(split)
        if position is not None:
            counted[pattern] = (split[0], position, {int(part[position]) for part in split})
    expected = max([size, *(max(seen) + 1 for _, _, seen in counted.values())], default=0)
    missing = []
    for example, position, seen in counted.values():
        missing += [
            ".".join([*example[:position], str(i), *example[position + 1 :]]) for i in range(expected) if i not in seen
        ]
    missing += [f"(anything matching {pattern!r})" for pattern in patterns if pattern not in assignment.slots]
    return missing


def _counting_position(split: list[list[str]]) -> int | None:
    """Return the position of the number that counts the parts with these split names, or None."""
    if len({len(parts) for parts in split}) != 1:
        return None
    if len(split) == 1:
        numeric = [i for i, part in enumerate(split[0]) if part.isdecimal()]
        return numeric[-1] if numeric else None
    differing = [i for i in range(len(split[0])) if len({parts[i] for parts in split}) > 1]
    if len(differing) == 1 and all(parts[differing[0]].isdecimal() for parts in split):
        return differing[0]
    return None
