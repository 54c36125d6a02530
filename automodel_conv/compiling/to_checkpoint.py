"""Compile the plan from the tensors of a model back to those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from automodel_conv.compiling.expert_layouts import check_layout, experts_of, gated_by, sizes_in
from automodel_conv.compiling.marks import layout_to_read
from automodel_conv.compiling.stages import arranging_stages, composed
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.errors import CoverageError, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import TRANSFORMERS, Layout, as_layout, get_layout
from automodel_conv.planning.names import plain_table
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.relayout import relayout
from automodel_conv.planning.unmarked import refuse_contradictions, refuse_grouped
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.models import model_targets
from automodel_conv.upstream.registry import saving_order, saving_rules
from automodel_conv.upstream.rules import RuleSet


def saving_plan(
    table: SourceTable,
    *,
    model: nn.Module | None = None,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    reference: Checkpoint | None = None,
    checked: bool = False,
) -> CopyPlan:
    """Return the plan from a model's names back to the checkpoint's names.

    Args:
        table: the tensors of the model.
        model: the model, or None.
        rules: transformers' rule objects; None: the model's own.
        layout: layout of the experts in ``table``; None: the model's own.
        reference: a checkpoint whose names and tensor boundaries the plan restores. Without one, all rules are reversed
            and the targets are in the order in which transformers writes them.
        checked: whether the experts, if any, are known to be in that layout.

    Raises:
        NameProblems: the tensors do not fit the reference.
        UnsupportedError: the experts are not in the layout of the model or of the rules, and no ``layout`` is given; or
            the rules split such experts but do not match their names.
    """
    rules = given_rules(rules)
    if model is not None or rules or layout is not None or reference is not None:
        table = plain_table(table, None if model is None else model.state_dict())
    if reference is not None:
        return _inverse_of_loading(table, reference, model, rules, layout)
    rule_set = RuleSet(saving_rules(model, rules), model, reverse=True)
    experts = experts_of(model, layout)
    own = {path: as_layout(stated) for path, stated in experts.items()}
    stages = arranging_stages(table)
    if stages:
        table = table_of(stages[-1].targets)
    if layout is not None:
        given = get_layout(layout)
        if not checked:
            check_layout(layout, table, "layout")
        gated = gated_by(experts, rule_set, table, given)
        has = model_targets(model) if model is not None and given.is_padded else {}

        def canonical(path: str) -> Layout:
            return own.get(path, TRANSFORMERS)

        sizes = sizes_in({name: spec.shape for name, spec in has.items()}, canonical)
        stages.append(relayout(table, lambda path: given, canonical, gated, sizes))
        table = table_of(stages[-1].targets)
    elif not checked:
        has = {} if model is None else {name: spec.shape for name, spec in model_targets(model).items()}
        refuse_contradictions(table, has, rule_set)
    shapes = dict(zip(table.names, table.shapes, strict=True))
    plan, problems = compile_targets(table, rule_set, None, parameters=shapes)
    problems.raise_unless_fit("going back to the checkpoint's names")
    refuse_grouped(plan, rule_set)
    return in_saving_order(composed([*stages, plan]), model)


def in_saving_order(plan: CopyPlan, model: nn.Module | None) -> CopyPlan:
    """Return the plan with its targets in the order of ``save_pretrained``, which determines the file of each."""
    key_of = saving_order(model)
    keys: Sequence[Any] = range(len(plan.sources.names)) if key_of is None else [*map(key_of, plan.sources.names)]
    targets = sorted(plan.targets, key=lambda target: min(keys[row] for row in target.sources))
    return replace(plan, targets=tuple(targets))


def _inverse_of_loading(
    table: SourceTable,
    reference: Checkpoint,
    model: nn.Module | None,
    rules: Sequence[Any] | None,
    layout: str | None,
) -> CopyPlan:
    """Return the inverse of the plan that would load the reference into these tensors."""
    has = {n: TargetSpec(d, s) for n, d, s in zip(table.names, table.dtypes, table.shapes, strict=True)}
    dtypes = set(table.dtypes)
    plain = replace(
        SourceTable.from_checkpoint(reference), dtypes=[_floating_like(d, dtypes) for d in reference.dtypes]
    )
    stored_names, plain = plain.names, plain_table(plain, has)
    stored_as = dict(zip(plain.names, stored_names, strict=True))
    source_layout = layout_to_read(reference, None, keeps_names=model is None and not rules and layout is None)
    forward, problems = loading_plan(
        plain, model=model, rules=rules, layout=layout, source_layout=source_layout, targets=has
    )
    problems.unexpected.clear()  # names of the reference that the state dict lacks
    do = ["pass {rules=} too, to split grouped experts of a state dict"] if model is None and not rules else []
    problems.raise_unless_fit("the reference checkpoint and the tensors to revert", do=do)
    try:
        back = forward.inverse()
    except CoverageError as error:
        text = "the reference has values that these tensors lack, such as padding"
        do = "leave {reference=} out: the rules restore the published form"
        raise CoverageError(message(text, found=str(error).partition("\n")[0], do=do)) from error
    rows = {name: row for row, name in enumerate(table.names)}
    renumbered = [rows[name] for name in back.sources.names]
    targets = tuple(
        t._replace(
            name=stored_as[t.name],
            sources=tuple(renumbered[i] for i in t.sources),
            dtype=back.sources.dtypes[t.sources[0]] if t.sources else t.dtype,
        )
        for t in back.targets
    )
    return CopyPlan(table, targets, back.rules)


def _floating_like(dtype: str, present: set[str]) -> str:
    """Return a dtype that passes the cast checks.

    The inverse keeps the dtypes of the tensors, not the reference's.
    """
    return dtype if dtype in present else "F32" if dtype.startswith("F8") else dtype
