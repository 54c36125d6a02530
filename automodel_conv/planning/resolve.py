"""From checkpoint names and rules to assignments: which sources make which target, in which order.

Names are resolved once per template (the name with its numeric components taken out) and instantiated by arithmetic;
where a rule looks at the numbers themselves, the keys it could touch are resolved one by one, in upstream's order.
Nothing is raised here: what does not fit is collected, so that one error can tell it all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from automodel_conv.planning.rules import Rules


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

# What stands for a numeric component in a template, and what ends a name where many are one text.
_NUMBER, _END = "\0", "\n"
_NUMBERS = re.compile(r"\.(\d+)(?=[.\n])")


class _Group(NamedTuple):
    """All names of one template."""

    numbers: list[list[str]]
    """Columns: of each numeric component, what each name has there."""
    rows: list[int]


def resolve(
    names: Sequence[str],
    rules: Rules,
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
            _claim(names, rules, targets, claims, unexpected, target, _Claim(rule, pattern, members))
    for row in sorted(one_by_one, key=lambda row: rules.natural_key(names[row])):
        renamed, rule, pattern = rules.rename(names[row])
        _claim(names, rules, targets, claims, unexpected, renamed, _Claim(rule, pattern, [row]))
    assignments, duplicated = [], []
    for target, made in claims.items():
        assignment, losers = _settle(names, rules, target, made)
        assignments.append(assignment)
        if losers:
            rows = [row for slot in assignment.slots.values() for row in slot]
            duplicated.append((target, tuple(names[row] for row in [*rows[:1], *losers])))
    claimed = {row for made in claims.values() for claim in made for row in claim.rows} if unexpected else set()
    unclaimed = [row for row in range(len(names)) if unexpected and row not in claimed and row not in hidden]
    return Resolution(assignments, list(unexpected), duplicated, unclaimed)


def _templates(names: Sequence[str], hidden: Collection[int]) -> tuple[dict[str, _Group], list[int]]:
    """Names grouped by template: ``".layers\\0.w1" -> _Group([["0", "1"]], [row, row])``.

    Also the rows of names that hold what a template marks numbers and ends with. All names are searched as one text,
    several times as fast as one after the other.
    """
    rows = [row for row in range(len(names)) if row not in hidden] if hidden else list(range(len(names)))
    text = "".join([f".{names[row]}{_END}" for row in rows])
    odd: list[int] = []
    if _NUMBER in text or text.count(_END) != len(rows):
        odd = [row for row in rows if _NUMBER in names[row] or _END in names[row]]
        rows = sorted(set(rows).difference(odd))
        text = "".join([f".{names[row]}{_END}" for row in rows])
    parts = _NUMBERS.split(text)
    texts, numbers = parts[::2], parts[1::2]
    groups: dict[str, tuple[int, list[int], list[int]]] = {}
    at = 0
    for row, template in zip(rows, _NUMBER.join(texts).split(_END), strict=False):
        group = groups.get(template)
        if group is None:
            group = groups[template] = (template.count(_NUMBER), [], [])
        group[1].append(at)
        group[2].append(row)
        at += group[0]
    return {
        template: _Group([[numbers[at + i] for at in places] for i in range(count)], members)
        for template, (count, places, members) in groups.items()
    }, odd


def _representative(template: str) -> str:
    """The name of a template whose numbers are sentinels."""
    first, *rest = template.split(_NUMBER)
    return (first + "".join(f".{_SENTINEL + i}{text}" for i, text in enumerate(rest)))[1:]


def _depends_on_length(
    names: Sequence[str],
    rules: Rules,
    numbers: list[list[str]],
    rows: list[int],
    outcome: tuple[str, int, str],
) -> bool:
    """True if a real name is not renamed as its template's representative is.

    Numbers of the same lengths are renamed alike once no rule looks at their digits, so one name of each is asked.
    """
    if not numbers or not len(rules):
        return False
    renamed, rule, pattern = outcome
    of_each_length = dict(
        zip(zip(*[map(len, column) for column in numbers], strict=True), range(len(rows)), strict=True)
    )
    for at in of_each_length.values():
        expected = _SENTINELS.sub(lambda match, at=at: numbers[int(match.group()) - _SENTINEL][at], renamed)
        name = names[rows[at]]
        if rules.rename(name) != (expected, rule, pattern if rule >= 0 else name):
            return True
    return False


def _instances(renamed: str, numbers: list[list[str]], rows: list[int]) -> list[tuple[str, list[int]]]:
    """The targets of one template with their rows, each in the natural order of the numbers that the target lost."""
    kept = [int(sentinel) - _SENTINEL for sentinel in _SENTINELS.findall(renamed)]
    texts = _SENTINELS.split(renamed)
    lost = [i for i in range(len(numbers)) if i not in kept]
    keys = zip(*[numbers[i] for i in kept], strict=True) if kept else [()] * len(rows)
    if not lost:
        return [(_filled(texts, key), [row]) for key, row in zip(keys, rows, strict=True)]
    groups: defaultdict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for key, member in zip(keys, zip(*[map(int, numbers[i]) for i in lost], rows, strict=True), strict=True):
        groups[key].append(member)
    return [(_filled(texts, key), [member[-1] for member in sorted(members)]) for key, members in groups.items()]


def _filled(texts: Sequence[str], numbers: Sequence[str]) -> str:
    """A name from the texts between its numbers."""
    return "".join([part for pair in zip(texts, [*numbers, ""], strict=True) for part in pair])


def _claim(
    names: Sequence[str],
    rules: Rules,
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


def all_targets(rules: Rules, rule: int, target: str) -> list[str]:
    """The names that one use of a rule makes, from the first of them."""
    if rule < 0:
        return [target]
    patterns = rules.patterns(rule)[1]
    return [target.replace(patterns[0], pattern) for pattern in patterns]


def _settle(names: Sequence[str], rules: Rules, target: str, claims: list[_Claim]) -> tuple[Assignment, list[int]]:
    """One assignment from all claims on a target, and the rows that lost; the first name in natural order wins."""
    contested = len(claims) > 1 and (claims[0].rule < 0 or len({claim.rule for claim in claims}) > 1)
    if contested:
        claims = sorted(claims, key=lambda claim: min(rules.natural_key(names[row]) for row in claim.rows))
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
            slots[claim.pattern] = sorted(
                slots[claim.pattern] + claim.rows, key=lambda row: rules.natural_key(names[row])
            )
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
