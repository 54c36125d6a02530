"""From checkpoint names and rules to assignments: which sources make which target, in which order.

Names are resolved once per template (the name with its numeric components taken out) and instantiated by arithmetic;
where a rule looks at the numbers themselves, the keys it could touch are resolved one by one, in upstream's order.
Nothing is raised here: what does not fit is collected, so that one error can tell it all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from automodel_conv.planning.rules import RuleSet, natural_key


class Assignment(NamedTuple):
    """The first target of a rule, and the source rows for each of the rule's source patterns, in stacking order."""

    target: str
    rule: int  # row of the converter; -1 for a tensor that is only renamed
    slots: dict[str, list[int]]


@dataclass(frozen=True)
class Resolution:
    assignments: list[Assignment]
    unexpected: list[str]  # target names that the model does not have
    duplicated: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    unclaimed: list[int] = field(default_factory=list)  # rows of the names behind ``unexpected``


class _Claim(NamedTuple):
    """Some sources that want to be (part of) a target."""

    rule: int
    pattern: str
    rows: list[int]


# A number no checkpoint uses, one per numeric component; what comes back in a renamed name tells where it went.
_SENTINEL = 9_700_000
_SENTINELS = re.compile(r"97000\d\d")
_MOST_NUMBERS = 100

_Template = tuple[str | None, ...]  # the components of a name, None for the numeric ones


def resolve(
    names: Sequence[str],
    rules: RuleSet,
    targets: Mapping[str, object] | None,
    hidden: Collection[int] = (),
) -> Resolution:
    """Assign every name to a target.

    Args:
        names: source names, in any order.
        hidden: rows of names that are passed over.
        targets: the names that exist, with anything but None as values; None accepts every name.
    """
    claims: dict[str, list[_Claim]] = {}
    one_by_one: list[int] = []
    unexpected: dict[str, None] = {}
    for template, (numbers, rows) in _templates(names, hidden).items():
        representative = _fill(template, [str(_SENTINEL + i) for i in range(template.count(None))])
        if template.count(None) > _MOST_NUMBERS or rules.looks_at_digits(representative):
            one_by_one += rows
            continue
        renamed, rule, pattern = rules.rename(representative)
        if _depends_on_length(names, rules, numbers, rows, (renamed, rule, pattern)):
            one_by_one += rows
            continue
        for target, members in _instances(renamed, numbers, rows):
            _claim(names, rules, targets, claims, unexpected, target, _Claim(rule, pattern, members))
    for row in sorted(one_by_one, key=lambda row: natural_key(names[row])):
        renamed, rule, pattern = rules.rename(names[row])
        _claim(names, rules, targets, claims, unexpected, renamed, _Claim(rule, pattern, [row]))
    assignments, duplicated = [], []
    for target, made in claims.items():
        assignment, losers = _settle(names, target, made)
        assignments.append(assignment)
        if losers:
            rows = [row for slot in assignment.slots.values() for row in slot]
            duplicated.append((target, tuple(names[row] for row in [*rows[:1], *losers])))
    claimed = {row for made in claims.values() for claim in made for row in claim.rows} if unexpected else set()
    unclaimed = [row for row in range(len(names)) if unexpected and row not in claimed and row not in hidden]
    return Resolution(assignments, list(unexpected), duplicated, unclaimed)


def _templates(
    names: Sequence[str], hidden: Collection[int]
) -> dict[_Template, tuple[list[tuple[str, ...]], list[int]]]:
    """Names grouped by template: ``("layers", None, "w1") -> ([("0",), ("1",)], [row, row])``."""
    templates: dict[_Template, tuple[list[tuple[str, ...]], list[int]]] = {}
    for row, name in enumerate(names):
        if row in hidden:
            continue
        parts = name.split(".")
        template = tuple([None if part.isdecimal() else part for part in parts])
        group = templates.get(template)
        if group is None:
            group = templates[template] = ([], [])
        group[0].append(tuple([part for part in parts if part.isdecimal()]))
        group[1].append(row)
    return templates


def _fill(template: _Template, numbers: Sequence[str]) -> str:
    remaining = iter(numbers)
    return ".".join([next(remaining) if part is None else part for part in template])


def _depends_on_length(
    names: Sequence[str],
    rules: RuleSet,
    numbers: list[tuple[str, ...]],
    rows: list[int],
    outcome: tuple[str, int, str],
) -> bool:
    """True if a real name is not renamed as its template's representative is.

    Numbers of the same lengths are renamed alike once no rule looks at their digits, so one name of each is asked.
    """
    if not numbers[0] or not len(rules):
        return False
    renamed, rule, pattern = outcome
    of_each_length = {tuple(map(len, n)): (n, row) for n, row in zip(numbers, rows, strict=True)}
    for n, row in of_each_length.values():
        expected = _SENTINELS.sub(lambda match, n=n: n[int(match.group()) - _SENTINEL], renamed)
        if rules.rename(names[row]) != (expected, rule, pattern if rule >= 0 else names[row]):
            return True
    return False


def _instances(renamed: str, numbers: list[tuple[str, ...]], rows: list[int]) -> list[tuple[str, list[int]]]:
    """The targets of one template with their rows, each in the natural order of the numbers that the target lost."""
    kept = [int(sentinel) - _SENTINEL for sentinel in _SENTINELS.findall(renamed)]
    texts = _SENTINELS.split(renamed)
    lost = [i for i in range(len(numbers[0])) if i not in kept]
    if not lost:
        return [
            (
                "".join([t for pair in zip(texts, [*(n[i] for i in kept), ""], strict=True) for t in pair]),
                [row],
            )
            for n, row in zip(numbers, rows, strict=True)
        ]
    groups: dict[tuple[str, ...] | str, list[tuple[int, ...]]] = {}
    key = itemgetter(*kept) if kept else lambda n: ()
    if len(lost) == 1:
        only = lost[0]
        for n, row in zip(numbers, rows, strict=True):
            groups.setdefault(key(n), []).append((int(n[only]), row))
    else:
        for n, row in zip(numbers, rows, strict=True):
            groups.setdefault(key(n), []).append((*[int(n[i]) for i in lost], row))
    made = []
    for values, members in groups.items():
        members.sort()
        filled = [values] if isinstance(values, str) else list(values)
        name = "".join([t for pair in zip(texts, [*filled, ""], strict=True) for t in pair])
        made.append((name, [member[-1] for member in members]))
    return made


def _claim(
    names: Sequence[str],
    rules: RuleSet,
    targets: Mapping[str, object] | None,
    claims: dict[str, list[_Claim]],
    unexpected: dict[str, None],
    renamed: str,
    claim: _Claim,
) -> None:
    if targets is None:
        claims.setdefault(renamed, []).append(claim)
        return
    target = rules.with_prefix(renamed, targets)
    if target in targets:
        claims.setdefault(target, []).append(claim)
        return
    left = []
    for row in claim.rows:  # a name that was right already and should not have been renamed
        name = names[row]
        if name in targets:
            claims.setdefault(rules.with_prefix(name, targets), []).append(_Claim(-1, name, [row]))
        else:
            left.append(row)
    if left:
        unexpected.update(dict.fromkeys(all_targets(rules, claim.rule, target)))


def all_targets(rules: RuleSet, rule: int, target: str) -> list[str]:
    """The names that one use of a rule makes, from the first of them."""
    if rule < 0:
        return [target]
    patterns = rules.patterns(rule)[1]
    return [target.replace(patterns[0], pattern) for pattern in patterns]


def _settle(names: Sequence[str], target: str, claims: list[_Claim]) -> tuple[Assignment, list[int]]:
    """One assignment from all claims on a target, and the rows that lost; the first name in natural order wins."""
    contested = len(claims) > 1 and (claims[0].rule < 0 or len({claim.rule for claim in claims}) > 1)
    if contested:
        claims = sorted(claims, key=lambda claim: min(natural_key(names[row]) for row in claim.rows))
    rule = claims[0].rule
    slots: dict[str, list[int]] = {}
    losers: list[int] = []
    for claim in claims:
        if claim.rule != rule or (rule < 0 and slots):
            losers += claim.rows
        elif rule < 0:  # a name that lost its number: the first stays
            slots[claim.pattern] = claim.rows[:1]
            losers += claim.rows[1:]
        elif claim.pattern in slots:
            slots[claim.pattern] = sorted(slots[claim.pattern] + claim.rows, key=lambda row: natural_key(names[row]))
        else:
            slots[claim.pattern] = claim.rows
    return Assignment(target, rule, slots), losers


def missing_parts(names: Sequence[str], assignment: Assignment, patterns: Sequence[str], size: int) -> list[str]:
    """Names of the parts that a merged target lacks: gaps in the one number that counts its parts, and whole patterns.

    Args:
        size: how many parts the target expects, at least; 0 if unknown.
    """
    parts = {pattern: [names[row].split(".") for row in rows] for pattern, rows in assignment.slots.items()}
    counted: dict[str, tuple[list[str], int, set[int]]] = {}
    for pattern, split in parts.items():
        position = _counting_position(split)
        if position is not None:
            counted[pattern] = (split[0], position, {int(part[position]) for part in split})
    expected = max([size, *(max(seen) + 1 for _, _, seen in counted.values())], default=0)
    missing = []
    for like, position, seen in counted.values():
        missing += [
            ".".join([*like[:position], str(i), *like[position + 1 :]]) for i in range(expected) if i not in seen
        ]
    missing += [f"(anything matching {pattern!r})" for pattern in patterns if pattern not in assignment.slots]
    return missing


def _counting_position(split: list[list[str]]) -> int | None:
    if len({len(parts) for parts in split}) != 1:
        return None
    if len(split) == 1:
        numeric = [i for i, part in enumerate(split[0]) if part.isdecimal()]
        return numeric[-1] if numeric else None
    differing = [i for i in range(len(split[0])) if len({parts[i] for parts in split}) > 1]
    if len(differing) == 1 and all(parts[differing[0]].isdecimal() for parts in split):
        return differing[0]
    return None
