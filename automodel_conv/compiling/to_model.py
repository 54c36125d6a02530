"""Compile the plan from the tensors of a checkpoint to those of a model.

A conversion has up to four stages, each of them a plan: transpose quantized sources that are stored transposed, convert
experts from the source layout, apply the rules, convert experts to the wanted layout. The composed plan copies from the
sources straight to the final buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.expert_layouts import (
    check_layout,
    experts_of,
    gated_by,
    has_names_of,
    is_laid_out,
    not_laid_out,
    refuse_no_experts,
    relaid_specs,
    sizes_in,
)
from automodel_conv.compiling.stages import arranging_stages, composed
from automodel_conv.dtypes import dtype_code
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    PER_EXPERT,
    TRANSFORMERS,
    Layout,
    as_layout,
    get_layout,
)
from automodel_conv.planning.names import plain_table
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.relayout import relayout
from automodel_conv.planning.schemes import kv_cache_rows
from automodel_conv.planning.unmarked import refuse_other_layouts, refuse_unknown_layout
from automodel_conv.planning.wanted import AsStored, TargetSpec
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.models import model_targets, tied_names
from automodel_conv.upstream.per_expert_rules import per_expert_rules
from automodel_conv.upstream.registry import (
    is_pretrained_model,
    key_renamings,
    model_rules,
    without_ignored,
)
from automodel_conv.upstream.rules import RuleSet


def loading_plan(
    table: SourceTable,
    *,
    model: nn.Module | None = None,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    quantizer: Any = None,
    targets: Mapping[str, TargetSpec] | None = None,
    as_stored: AsStored | None = None,
    produce_all: bool = False,
) -> tuple[CopyPlan, Problems]:
    """Return the plan from checkpoint names to the names of a model or of rules, and the problems that it has.

    Args:
        table: the checkpoint's tensors.
        model: the model, or None.
        rules: transformers' rule objects; None: the model's own.
        layout: layout of the experts that the plan produces; None: the model's own.
        source_layout: layout of the grouped experts in ``table``. It is an error if no tensor is in that layout.
            "per_expert": the form in which the model type is published. None: the model's layout, which the shapes must
            confirm.
        key_mapping: ``{pattern: replacement}`` applied to names before the rules.
        dtype: dtype of the floating targets; None: each target's own.
        in_place: whether the model's own tensors are the destination, so that a ``layout`` that they do not have is an
            error.
        quantizer: transformers' quantizer of a model that keeps codes and scales. Its rules are added to the model's.
        targets: the targets to produce; None: those of the model's state dict.
        as_stored: see ``compile_targets``.
        produce_all: whether to produce every output of the rules. The model then only contributes its rules and the
            layout of its experts, and there may be no experts.

    Raises:
        UnsupportedError: the layout is unknown, or the model contradicts it.
    """
    rules = given_rules(rules)
    objects = model_rules(model, key_mapping, quantizer) if rules is None else [*key_renamings(key_mapping), *rules]
    has_targets = targets is not None
    if targets is None and model is not None and not produce_all:
        targets = model_targets(model, dtype)
    if model is not None or objects or layout is not None or source_layout is not None:
        table = plain_table(table, targets)
    objects += [] if rules is not None else per_expert_rules(model, objects, table.names)
    rule_set = RuleSet(objects, model)
    code = None if dtype is None else dtype_code(dtype)
    wanted = None if layout is None else get_layout(layout)
    incoming = None if source_layout in (None, PER_EXPERT) else get_layout(source_layout, PER_EXPERT)
    experts = experts_of(model, layout or (source_layout if incoming is not None else None))
    own = {path: as_layout(stated) for path, stated in experts.items()}
    gated = gated_by(experts, rule_set, table, incoming)

    def canonical(path: str) -> Layout:
        return own.get(path, TRANSFORMERS)

    destination: Mapping[str, TargetSpec] | None = None  # the model's tensors, if its experts are in the wanted layout
    if wanted is not None and targets is not None and is_laid_out(targets, {} if has_targets else own, wanted):
        destination = targets
        produced: dict[str, tuple[int, ...]] = {}
        if wanted.is_padded and incoming is not wanted:  # the sources have the sizes without padding
            read, _ = loading_plan(
                table,
                model=model,
                rules=rules,
                source_layout=source_layout,
                key_mapping=key_mapping,
                dtype=dtype,
                quantizer=quantizer,
                produce_all=True,
            )
            produced = {target.name: target.shape for target in read.targets}
        sizes = _sizes_to_fill(produced, canonical, targets, wanted)
        targets = relaid_specs(targets, wanted, canonical, gated, sizes)
    elif in_place and wanted is not None and layout is not None:
        raise not_laid_out(targets or (), wanted, layout)
    if targets is not None and not kv_cache_rows(targets):
        cache_rows = kv_cache_rows(table.names)
        table = replace(table, hidden=table.hidden.union(cache_rows)) if cache_rows else table
    stages = arranging_stages(table)
    if stages:
        table = table_of(stages[-1].targets)
    if incoming is not None and source_layout is not None and not has_names_of(targets, source_layout):
        if not produce_all:
            check_layout(source_layout, table, "source_layout")
        sizes = _read_sizes(table, incoming, wanted, canonical, targets, model)
        stages.append(relayout(table, lambda path: incoming, canonical, gated, sizes))
        table = table_of(stages[-1].targets)
    transposed = None if source_layout is None else source_layout == PER_EXPERT
    plan, problems = compile_targets(table, rule_set, targets, code, transposed=transposed, as_stored=as_stored)
    for stage in reversed(stages):
        problems.unclaimed = [source for row in problems.unclaimed for source in stage.targets[row].sources]
    stages.append(plan)
    if wanted is not None:
        if source_layout is None and targets is None and not produce_all:
            refuse_unknown_layout(plan, canonical, gated)
        stages.append(relayout(table_of(plan.targets), canonical, lambda path: wanted, gated))
    whole = composed(stages)
    if destination is not None:
        problems.mismatched += [
            (t.name, t.shape, destination[t.name].shape)
            for t in whole.targets
            if t.name in destination and destination[t.name].shape != t.shape
        ]
    tied = () if model is None else tuple(tied_names(model))
    problems.missing = without_tied(problems.missing, whole, tied)
    problems.missing, problems.unexpected = without_ignored(model, problems.missing, problems.unexpected)
    experts_wanted = {name for name in targets or () if ".experts." in f".{name}"}
    problems.lacks_all_experts = bool(experts_wanted) and experts_wanted.issubset(problems.missing)
    if source_layout is None and targets is not None and not has_targets:
        refuse_other_layouts(problems, plan, rule_set, bool(experts) or is_pretrained_model(model))
    # Other problems explain missing experts better than this check does.
    if layout is not None and table.names and not produce_all and not problems.failed:
        refuse_no_experts(targets or [target.name for target in plan.targets], layout, table)
    whole = replace(
        whole,
        missing=tuple(problems.missing),
        unexpected=tuple(problems.unexpected),
        mismatched=tuple(problems.mismatched),
        tied=tied,
    )
    return whole, problems


def _sizes_to_fill(
    produced: Mapping[str, tuple[int, ...]],
    canonical: Callable[[str], Layout],
    targets: Mapping[str, TargetSpec],
    wanted: Layout,
) -> Callable[[str], Mapping[str, int]]:
    """Return the sizes of the experts that fill ``targets``: of those that rules produce, else those with padding."""
    without_padding = sizes_in(produced, canonical)
    with_padding = sizes_in({name: spec.shape for name, spec in targets.items()}, lambda path: wanted)
    return lambda path: without_padding(path) or with_padding(path)


def _read_sizes(
    table: SourceTable,
    incoming: Layout,
    wanted: Layout | None,
    canonical: Callable[[str], Layout],
    targets: Mapping[str, TargetSpec] | None,
    model: nn.Module | None,
) -> Callable[[str], Mapping[str, int]]:
    """Return the sizes without padding of the experts in ``table``; see ``relayout``.

    Padding that the wanted layout has too is kept, and its size is that of the tensors.
    """
    if not incoming.is_padded:
        return lambda path: {}
    if incoming is wanted:
        return sizes_in(dict(zip(table.names, table.shapes, strict=True)), lambda path: incoming)
    if targets is None and model is not None:
        targets = model_targets(model)
    return sizes_in({name: spec.shape for name, spec in (targets or {}).items()}, canonical)


def shapes_to_make(
    model: nn.Module, state: Mapping[str, Tensor], layout: str | None, *, in_place: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a load produces for a model, by name.

    Args:
        model: the model.
        state: the model's state dict.
        layout: layout of the experts that the load produces; None: the model's own.
        in_place: see ``loading_plan``.

    Raises:
        UnsupportedError: see ``loading_plan``.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if layout is None:
        return shapes
    wanted = get_layout(layout)
    experts = experts_of(model, layout)
    own = {path: as_layout(stated) for path, stated in experts.items()}
    if is_laid_out(shapes, own, wanted):
        return shapes
    if in_place:
        raise not_laid_out(shapes, wanted, layout)

    def canonical(path: str) -> Layout:
        return own.get(path, TRANSFORMERS)

    def gated(path: str) -> bool:
        return experts[path].gated if path in experts else f"{path}.{canonical(path).first[0].name}" in shapes

    table = SourceTable(list(shapes), ["BF16"] * len(shapes), list(shapes.values()))  # all layouts allow this dtype
    return {target.name: target.shape for target in relayout(table, canonical, lambda path: wanted, gated).targets}


def without_tied(missing: Iterable[str], plan: CopyPlan, tied: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the missing names that are not tied to a target of the plan."""
    produced = {target.name for target in plan.targets}
    provided = {name for group in tied if produced.intersection(group) for name in group}
    return [name for name in missing if name not in provided]
