"""Naive oracles: every element moves by itself, in loops over coordinates and elements, without views or strides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from math import ceil, prod
from typing import Any, NamedTuple

from automodel_conv.planning.boxes import Piece
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan


def pairs(piece: Piece) -> list[tuple[int, int]]:
    """Return (source element, target element) for everything that a piece copies."""
    return [
        (
            piece.source_offset + _dot(index, piece.box.source_strides),
            piece.target_offset + _dot(index, piece.box.target_strides),
        )
        for index in itertools.product(*map(range, piece.box.shape))
    ]


def _dot(index: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * s for i, s in zip(index, strides, strict=True))


def written(pieces: Iterable[Piece]) -> dict[int, tuple[int, int]]:
    """Return target element -> (source, element), and check that each is written once."""
    target: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        for source_element, target_element in pairs(piece):
            assert target_element not in target, f"element {target_element} is written twice"
            target[target_element] = (piece.source, source_element)
    return target


def twice_written(pieces: Iterable[Piece]) -> dict[int, list[int]]:
    """Return the target elements with more than one writer -> the sources that write them."""
    writers: dict[int, list[int]] = {}
    for piece in pieces:
        for _, element in pairs(piece):
            writers.setdefault(element, []).append(piece.source)
    return {element: sources for element, sources in writers.items() if len(sources) > 1}


def execute(plan: CopyPlan, sources: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return all targets of a plan as flat lists, one element at a time."""
    results = {}
    for target in plan.targets:
        pieces = [piece for copy in target.copies for piece in copy.pieces()]
        elements = written(pieces)
        names = [plan.sources.names[row] for row in target.sources]
        values = {at: sources[names[ordinal]][element] for at, (ordinal, element) in elements.items()}
        for fill in target.fills:
            filled = dict.fromkeys(written([fill.piece(0)]), fill.value)
            assert not values.keys() & filled.keys(), target.name
            values |= filled
        assert sorted(values) == list(range(prod(target.shape))), target.name
        results[target.name] = [values[element] for element in sorted(values)]
    return results


def addressed(table: SourceTable) -> dict[str, list[tuple[str, int]]]:
    """Return source tensors in which every element is its own address."""
    return {
        name: [(name, i) for i in range(prod(shape))] for name, shape in zip(table.names, table.shapes, strict=True)
    }


class Cells(NamedTuple):
    """A tensor with elements of any kind, by coordinate."""

    shape: tuple[int, ...]
    at: dict[tuple[int, ...], Any]


def cells(shape: Sequence[int], start: int = 0) -> Cells:
    """Return elements numbered from ``start`` in row-major order."""
    coordinates = itertools.product(*map(range, shape))
    return Cells(tuple(shape), {c: start + i for i, c in enumerate(coordinates)})


def zeros(shape: Sequence[int]) -> Cells:
    return Cells(tuple(shape), dict.fromkeys(itertools.product(*map(range, shape)), 0))


def flat(tensor: Cells) -> list[Any]:
    return [tensor.at[c] for c in itertools.product(*map(range, tensor.shape))]


def reshaped(tensor: Cells, shape: Sequence[int]) -> Cells:
    values = flat(tensor)
    numbered = cells(shape)
    assert len(values) == len(numbered.at)
    return Cells(tuple(shape), {c: values[i] for c, i in numbered.at.items()})


def joined(parts: Sequence[Cells], dim: int) -> Cells:
    dim %= len(parts[0].shape)
    at, start = {}, 0
    for part in parts:
        for c, value in part.at.items():
            at[(*c[:dim], c[dim] + start, *c[dim + 1 :])] = value
        start += part.shape[dim]
    shape = parts[0].shape
    return Cells((*shape[:dim], start, *shape[dim + 1 :]), at)


def stacked(parts: Sequence[Cells], dim: int) -> Cells:
    shape = parts[0].shape
    dim %= len(shape) + 1
    at = {(*c[:dim], i, *c[dim:]): value for i, p in enumerate(parts) for c, value in p.at.items()}
    return Cells((*shape[:dim], len(parts), *shape[dim:]), at)


def cut(tensor: Cells, dim: int, sizes: Sequence[int]) -> list[Cells]:
    dim %= len(tensor.shape)
    parts, start = [], 0
    for size in sizes:
        at = {
            (*c[:dim], c[dim] - start, *c[dim + 1 :]): value
            for c, value in tensor.at.items()
            if start <= c[dim] < start + size
        }
        parts.append(Cells((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), at))
        start += size
    return parts


def chunked(tensor: Cells, count: int, dim: int) -> list[Cells]:
    size = tensor.shape[dim]
    if size == 0:
        return cut(tensor, dim, [0] * count)
    sizes = []
    while sum(sizes) < size:
        sizes.append(min(ceil(size / count), size - sum(sizes)))
    return cut(tensor, dim, sizes)


def unstacked(tensor: Cells, dim: int) -> list[Cells]:
    dim %= len(tensor.shape)
    shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
    return [reshaped(part, shape) for part in cut(tensor, dim, [1] * tensor.shape[dim])]


def transposed(tensor: Cells, dim0: int, dim1: int) -> Cells:
    def swap(items: Sequence[int]) -> tuple[int, ...]:
        items = list(items)
        items[dim0], items[dim1] = items[dim1], items[dim0]
        return tuple(items)

    return Cells(swap(tensor.shape), {swap(c): value for c, value in tensor.at.items()})


def separated(tensor: Cells, dim: int) -> Cells:
    """Reorder a0 b0 a1 b1 to a0 a1 b0 b1 along ``dim``."""
    dim %= len(tensor.shape)
    half = tensor.shape[dim] // 2
    at = {(*c[:dim], c[dim] // 2 + half * (c[dim] % 2), *c[dim + 1 :]): value for c, value in tensor.at.items()}
    return Cells(tensor.shape, at)


def alternated(tensor: Cells, dim: int) -> Cells:
    """Reorder a0 a1 b0 b1 to a0 b0 a1 b1 along ``dim``."""
    dim %= len(tensor.shape)
    half = tensor.shape[dim] // 2
    at = {(*c[:dim], 2 * (c[dim] % half) + c[dim] // half, *c[dim + 1 :]): value for c, value in tensor.at.items()}
    return Cells(tensor.shape, at)


def rope(tensor: Cells, heads: int, inverse: bool) -> Cells:
    """Reorder the rows of each head from pairs (x0 y0 x1 y1) to halves (x0 x1 y0 y1), or back."""
    turn = alternated if inverse else separated
    per_head = cut(tensor, 0, [tensor.shape[0] // heads] * heads)
    return joined([turn(head, 0) for head in per_head], 0)


def ernie_fused(lists: Sequence[Sequence[Cells]], groups: int, stack_dim: int, dim: int) -> list[Cells]:
    fused = []
    for g in range(groups):
        parts = []
        for tensors in lists:
            size = ceil(len(tensors) / groups)
            parts.append(stacked(tensors[g * size : (g + 1) * size], stack_dim))
        fused.append(joined(parts, dim))
    return fused


def ernie_split(fused: Sequence[Cells], groups: int, stack_dim: int, dim: int) -> list[list[Cells]]:
    return [
        [part for tensor in fused for part in unstacked(chunked(tensor, groups, dim)[g], stack_dim)]
        for g in range(groups)
    ]


class Mapped(NamedTuple):
    """The sources that transformers collects for a target: the winning rule (None: a renaming), names by pattern."""

    rule: int | None
    slots: dict[str, list[str]]
    losers: list[str]


def upstream_mapping(
    names: Iterable[str],
    rules: Sequence[Any],
    targets: Mapping[str, object] | None,
    prefix: str | None = None,
) -> tuple[dict[str, Mapped], set[str]]:
    """Return the assignments and unexpected names of ``convert_and_load_state_dict_in_model``, one key at a time.

    If two sources claim a target by different rules, the first in natural order wins.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    rules = deepcopy(list(rules))
    converters = [rule for rule in rules if hasattr(rule, "operations")]
    renamings = [rule for rule in rules if not hasattr(rule, "operations")]
    row_of = {pattern: row for row, rule in enumerate(converters) for pattern in rule.source_patterns}
    mapped: dict[str, Mapped] = {}
    unexpected: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        if targets is None:
            renamed, pattern = rename_source_key(name, renamings, converters)
        else:
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, targets)
            if renamed not in targets and name in targets:
                renamed, pattern = rename_source_key(name, [], [], prefix, targets)
        rule = None if pattern is None else row_of[pattern]
        if targets is not None and renamed not in targets:
            patterns = [renamed] if rule is None else converters[rule].target_patterns
            unexpected.update(renamed.replace(patterns[0], p) for p in patterns)
            continue
        taken = mapped.setdefault(renamed, Mapped(rule, {}, []))
        if taken.rule != rule or (rule is None and taken.slots):
            taken.losers.append(name)
        else:
            taken.slots.setdefault(pattern or name, []).append(name)
    return mapped, unexpected


def upstream_values(
    rules: Sequence[Any],
    tensors: Mapping[str, Any],
    model: Any,
    targets: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Return the results of transformers: its own mapping of names, then its own ``convert`` for each target."""
    mapped, _ = upstream_mapping(tensors, rules, targets)
    converters = [rule for rule in rules if hasattr(rule, "operations")]
    results = {}
    for target, (rule, slots, _) in mapped.items():
        if rule is None:
            results[target] = tensors[next(iter(slots))]
            continue
        converter = deepcopy(converters[rule])
        for pattern, names in slots.items():
            for name in names:
                converter.add_tensor(target, name, pattern, tensors[name])
        result = converter.convert(target, model=model, config=model.config)
        results |= {name: t[0] if isinstance(t, list) else t for name, t in result.items()}
    return results


def example(pattern: str, number: int) -> str:
    """Return a name that a regular expression matches, with ``number`` for its numbers and for ``.*``."""
    try:
        from re import _parser as parser
    except ImportError:  # Python 3.10
        import sre_parse as parser

    def walk(items: Any, text: str) -> str:
        for kind, value in items:
            kind = str(kind)
            if kind in ("LITERAL", "NOT_LITERAL"):
                text += chr(value) if kind == "LITERAL" else "x"
            elif kind == "ANY":
                text += "."
            elif kind == "IN":
                text += member(value)
            elif kind == "BRANCH":
                text = walk(value[1][number % len(value[1])], text)
            elif kind == "SUBPATTERN":
                text = walk(value[3], text)
            elif kind.endswith("REPEAT"):
                text = repeat(value, text)
            elif kind in ("GROUPREF_EXISTS", "ATOMIC_GROUP"):
                raise NotImplementedError(kind)
        return text

    def member(options: Any) -> str:
        kind, value = str(options[0][0]), options[0][1]
        if kind == "NEGATE":
            return "x"
        if kind == "CATEGORY":
            return str(number) if str(value).endswith("DIGIT") else "x"
        return chr(value if kind == "LITERAL" else value[0])

    def repeat(value: Any, text: str) -> str:
        least, most, inner = value
        if str(inner[0][0]) == "ANY":
            if not text:
                return f"x.{number}.y"
            return text + (f"{number}" if text.endswith(".") else f".{number}")
        if least == 0 and most == 1:
            return walk(inner, text) if number % 2 else text
        return walk(inner, text)

    return walk(parser.parse(pattern), "")


def registry() -> dict[str, list[Any]]:
    """Return all rules of the installed transformers, by model type or class name."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    return _build_checkpoint_conversion_mapping()
