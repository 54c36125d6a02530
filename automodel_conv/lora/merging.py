"""Plan the merge of adapters into what a plan writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from math import prod
from typing import NamedTuple

from torch import nn

from automodel_conv.compiling.options import AdapterArgument, LoadSettings, PlanSettings
from automodel_conv.compiling.planned import load_plan
from automodel_conv.errors import CoverageError, UnsupportedError, kind_of, listing, message
from automodel_conv.execution.factors import Factors
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.hub import with_repository
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.lora.adapter import Adapter, open_adapter
from automodel_conv.lora.base import Base, Loading
from automodel_conv.lora.config import LARGEST_FACTOR
from automodel_conv.lora.matching import Matches, match_adapters
from automodel_conv.planning.boxes import Piece, find_overlap
from automodel_conv.planning.deltas import Block, blocks_of, through
from automodel_conv.planning.plan import CopyPlan

_PLAN_OPTIONS = [field.name for field in fields(PlanSettings)]


class Merge(NamedTuple):
    """The deltas of adapters in the targets of a plan."""

    blocks: dict[str, list[Block]]
    """Blocks of each target that changes, by name. Those that replace elements come first."""
    factors: Factors
    """The matrices of the deltas."""


def open_adapters(adapter: AdapterArgument, settings: SourceSettings) -> tuple[Adapter, ...]:
    """Open one adapter, or several with weights.

    Args:
        adapter: path of an adapter, or pairs of a path and a weight.
        settings: how to reach the files of the base model; ``further`` of them is for the adapters.

    Raises:
        CheckpointError, NameProblems, UnsupportedError: see ``open_adapter``.
    """
    if isinstance(adapter, (str, os.PathLike)):
        return (open_adapter(adapter, settings=settings.further(adapter)),)
    adapters = list(adapter) if isinstance(adapter, (list, tuple)) else []
    for item in adapters or [adapter]:
        path, weight = item if isinstance(item, (list, tuple)) and len(item) == 2 else (None, None)
        is_number = isinstance(weight, (int, float)) and type(weight) is not bool and abs(weight) <= LARGEST_FACTOR
        if not isinstance(path, (str, os.PathLike)) or not is_number:
            expected = f"a path, or a list of pairs of a path and a weight of at most {LARGEST_FACTOR:g}"
            found = repr(item) if isinstance(item, (list, tuple)) else kind_of(item)
            raise UnsupportedError(message("not an adapter", expected=expected, found=found))
    return tuple(open_adapter(path, float(weight), settings.further(path)) for path, weight in adapters)


def merge_of_load(
    checkpoint: Checkpoint,
    plan: CopyPlan,
    written: CopyPlan,
    model: nn.Module | None,
    settings: LoadSettings,
) -> Merge | None:
    """Plan the merge of the adapters of a load into its targets; None if it has none.

    Args:
        checkpoint: the checkpoint.
        plan: plan of the whole model.
        written: plan of this rank's parts.
        model: the model, or None.
        settings: the options of the load.

    Raises:
        ConversionError: see ``open_adapters`` and ``plan_merge``.
    """
    if settings.adapter is None:
        return None

    def compile_loading() -> Loading:
        if model is None:
            raise UnsupportedError(message("rules or a plan are given, and no model", do="pass {model=}"))
        if settings.layout is None and settings.plan is None:
            return Loading(model, plan)
        own = replace(PlanSettings(**{name: getattr(settings, name) for name in _PLAN_OPTIONS}), layout=None)
        return Loading(model, load_plan(checkpoint, model, own)[0])

    base = Base(with_repository(checkpoint.path), plan.sources, compile_loading)
    return plan_merge(plan, open_adapters(settings.adapter, settings), base, written)


def plan_merge(plan: CopyPlan, adapters: Sequence[Adapter], base: Base, written: CopyPlan | None = None) -> Merge:
    """Plan the merge of adapters into the targets of a plan.

    Args:
        plan: a plan that writes whole tensors from the base model's checkpoint.
        adapters: the adapters, whose deltas add up.
        base: the base model.
        written: the part of the plan that this process writes; None: all of it.

    Raises:
        NameProblems: an adapter does not fit its base model.
        CoverageError: the plan does not write all of the tensors that an adapter changes.
        UnsupportedError: the tensors are quantized and not decoded, or two tensors of adapters replace one of them, or
            an adapter's places in them are irregular.
    """
    matches = match_adapters(adapters, base)
    _refuse_replaced_twice(matches, base)
    pieces = through(plan, matches.placed)
    _refuse_lost(pieces, matches, base)
    if written is not None:
        pieces = through(written, matches.placed)
    deltas = matches.deltas
    ordered = {
        name: sorted(blocks_of(group, deltas), key=lambda block: deltas[block.delta].b is not None)
        for name, group in pieces.items()
    }
    uses = [{piece.source for piece in group} for group in pieces.values()]
    return Merge(ordered, Factors([adapter.tensors for adapter in adapters], deltas, uses))


def _refuse_replaced_twice(matches: Matches, base: Base) -> None:
    """Raise UnsupportedError if two tensors of adapters replace the same elements, of which only one could stay."""
    twice = []
    for row, pieces in matches.placed.items():
        replacing = [piece for piece in pieces if matches.deltas[piece.source].b is None]
        if len(replacing) > 1 and find_overlap(replacing, prod(base.table.shapes[row])) is not None:
            modules = dict.fromkeys(matches.matches[piece.source].delta.module for piece in replacing)
            twice.append(f"{base.table.names[row]}: {', '.join(modules)}")
    if twice:
        text = "the adapter replaces tensors twice"
        do = (
            "merge one adapter after the other; if the names are those of a tied weight, merge with PEFT and untie them"
        )
        raise UnsupportedError(message(text, where=base.where, found="\n" + listing(twice), do=do))


def _refuse_lost(pieces: Mapping[str, Sequence[Piece]], matches: Matches, base: Base) -> None:
    """Raise CoverageError if pieces do not bring all elements of all deltas to the targets of a plan."""
    reached: Counter[int] = Counter()
    for piece in chain.from_iterable(pieces.values()):
        reached[piece.source] += piece.box.numel
    lost = [match.delta.module for i, match in enumerate(matches.matches) if reached[i] < match.delta.numel]
    if lost:
        text = f"{len(lost)} modules of the adapter would have no effect"
        raise CoverageError(message(text, where=base.where, found="\n" + listing(lost)))
