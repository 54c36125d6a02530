"""Summarize what an adapter changes in its base model, from headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.lora.adapter import open_adapter
from automodel_conv.lora.base import Base, base_of
from automodel_conv.lora.forms import PER_EXPERT, TRANSFORMERS
from automodel_conv.lora.matching import find_matches

_DEFAULTS = SourceSettings()


@dataclass(frozen=True)
class AdapterRow:
    """Modules of an adapter whose names differ only in the numbers of layers and experts.

    Attributes:
        name: name of the weights that they change, with "*" for these numbers; the name in the adapter if the base
            model has no such weights.
        layers: numbers of the layers.
        experts: numbers of the experts, the same in each of these layers; empty if the weights belong to no expert.
        base_layers: number of layers that have such weights in the base model.
        base_experts: number of experts that have such weights in one of its layers.
        rank: rank of the matrices; None if the adapter replaces the weights.
        scale: factor of their products; None if the adapter replaces the weights.
        problem: why the modules would have no effect; None if they have one.
    """

    name: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    base_layers: int
    base_experts: int
    rank: int | None
    scale: float | None
    problem: str | None


@dataclass(frozen=True)
class AdapterSummary:
    """Summary of what an adapter changes in its base model.

    Attributes:
        path: path of the adapter.
        base: path of the checkpoint of the base model.
        form: the form that the file of the adapter states, or else the one that its names show.
        modules: number of its modules.
        problems: each module that would have no effect, and why.
        why_no_model: why the names of the model are not known, only those of the checkpoint; None if they are known or
            the adapter needs none of them.
        rows: a row for all modules whose names differ only in the numbers of layers and experts.
    """

    path: str
    base: str
    form: str
    modules: int
    problems: tuple[str, ...]
    why_no_model: str | None
    rows: tuple[AdapterRow, ...]


class _Entry(NamedTuple):
    """A module of an adapter."""

    name: str
    stack: int
    """Number of matrices that it changes; 0 if they are no stack."""
    rank: int | None
    scale: float | None
    problem: str | None


def inspect_adapter(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str], settings: SourceSettings = _DEFAULTS
) -> AdapterSummary:
    """Summarize what an adapter changes in its base model.

    Only headers and configs are read.

    Args:
        adapter: path, URL or repository of the adapter.
        base: the checkpoint of the base model, see ``open_checkpoint``.
        settings: how to reach the adapter and the base; revision and subfolder are the adapter's.

    Raises:
        CheckpointError: the adapter or the base is missing or broken.
        NameProblems: a module has only one of its two matrices.
        UnsupportedError: the adapter has a variant of LoRA that is not supported.
    """
    opened = open_adapter(adapter, settings=settings.shared(adapter))
    model = base_of(open_checkpoint(base, **settings.further(base).source()), dequantize=True)
    matches, problems = find_matches([opened], model)
    entries = []
    for match in matches.matches:
        delta = match.delta
        stack = delta.shape[0] if delta.shape[0] > 1 else 0
        rank, scale = (None, None) if delta.b is None else (delta.rank, delta.scale)
        entries.append(_Entry(match.name, stack, rank, scale, None))
    unknown = [(name, "not in the base") for name in problems.unknown]
    misfits = [(name, "of another shape") for name, _ in problems.misfits]
    for name, problem in (*unknown, *misfits):
        is_whole = name in opened.whole
        rank, scale = (None, None) if is_whole else (opened.config.rank(name), opened.config.scale(name))
        entries.append(_Entry(name, 0, rank, scale, problem))
    has_stacks = any(entry.stack for entry in entries)
    return AdapterSummary(
        path=opened.path,
        base=model.where,
        form=opened.form or (TRANSFORMERS if has_stacks else PER_EXPERT),
        modules=len(entries),
        problems=(
            *(f"{name}: {problem}" for name, problem in unknown),
            *(f"{name}: {found}" for name, found in problems.misfits),
        ),
        why_no_model=model.why_no_model,
        rows=tuple(_rows(entries, _names(entries, model))),
    )


def _names(entries: Iterable[_Entry], base: Base) -> set[str]:
    """Return the names of the checkpoint, and those of the model if the adapter uses them."""
    names = set(base.rows)
    return names if all(entry.name in names for entry in entries if not entry.problem) else names | set(base.targets)


def _rows(entries: Iterable[_Entry], names: Iterable[str]) -> Iterator[AdapterRow]:
    """Yield the rows of entries, given the names in the base model."""
    in_base: dict[str, dict[int, set[int]]] = {}
    for name in names:
        pattern, layer, expert = _numbered(name)
        in_base.setdefault(pattern, {}).setdefault(layer, set()).add(expert)
    groups: dict[tuple[str, int, int | None, float | None, str | None], dict[int, set[int]]] = {}
    for entry in entries:
        pattern, layer, expert = _numbered(entry.name)
        experts = range(entry.stack) if entry.stack else [expert]
        groups.setdefault((pattern, *entry[1:]), {}).setdefault(layer, set()).update(experts)
    for (pattern, stack, rank, scale, problem), experts_by_layer in sorted(groups.items(), key=lambda item: item[0][0]):
        layers_by_experts: dict[tuple[int, ...], list[int]] = {}
        for layer, experts in sorted(experts_by_layer.items()):
            layers_by_experts.setdefault(_present(experts), []).append(layer)
        known = in_base.get(pattern, {})
        for experts, layers in layers_by_experts.items():
            yield AdapterRow(
                name=pattern,
                layers=_present(layers),
                experts=experts,
                base_layers=len(_present(known)),
                base_experts=stack or max((len(_present(found)) for found in known.values()), default=0),
                rank=rank,
                scale=scale,
                problem=problem,
            )


_NO_NUMBER = -1


def _present(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(number for number in numbers if number != _NO_NUMBER))


def _numbered(name: str) -> tuple[str, int, int]:
    """Return a name with "*" for the numbers of its layer and its expert, and these numbers.

    The first number of a name is that of the layer, the last of several that of the expert.
    """
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdecimal()]
    numbers = [_NO_NUMBER, _NO_NUMBER]
    for kind, place in zip((0, 1), dict.fromkeys([*places[:1], *places[-1:]]), strict=False):
        numbers[kind], parts[place] = int(parts[place]), "*"
    layer, expert = numbers
    return ".".join(parts), layer, expert
