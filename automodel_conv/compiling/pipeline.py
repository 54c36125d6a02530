"""The whole way from what a caller said (model, rules, layouts, dtype) to one plan.

A conversion has up to three stages, each a plan of its own: the layout the experts come in, the rules, the layout they
shall have. Their composition goes from the sources straight to the final buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.marks import layout_to_read
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.compiler import AsStored, Problems, TargetSpec, compile_targets
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    LAYOUTS,
    PER_EXPERT,
    TRANSFORMERS,
    ExpertLayout,
    Layout,
    any_experts,
    as_layout,
    get_layout,
    has_no_gate,
    holds_experts,
    told_by_name,
)
from automodel_conv.planning.names import plain_table
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import as_meant
from automodel_conv.planning.relayout import relayout
from automodel_conv.planning.schemes import rows_of_kv_caches
from automodel_conv.planning.unmarked import refuse_contradictions, refuse_grouped, refuse_other_layouts, refuse_untold
from automodel_conv.upstream.models import expert_layouts, model_targets, tied_names
from automodel_conv.upstream.registry import (
    is_pretrained_model,
    key_renamings,
    model_rules,
    saving_order,
    saving_rules,
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
    unbound: bool = False,
) -> tuple[CopyPlan, Problems]:
    """The plan from checkpoint names to the model's (or the rules') names, and what did not fit.

    Args:
        source_layout: how grouped experts among the sources lie, and what is not in that layout is an error;
            "per_expert": as the type is published; None: as the model has them, which their shapes must bear out.
        in_place: the model's own tensors are the destination, so a ``layout`` they do not have is an error.
        quantizer: transformers' own, of a model that keeps codes and scales: its rules go with the model's.
        targets: what to make, if not the model's state dict.
        as_stored: see ``compile_targets``.
        unbound: make whatever the rules give; of the model only its rules count, and how its experts lie. There may
            be no experts.

    Raises:
        UnsupportedError: an unknown layout, or one that the model contradicts.
    """
    objects = model_rules(model, key_mapping, quantizer) if rules is None else [*key_renamings(key_mapping), *rules]
    rule_set = RuleSet(objects, model)
    given = targets is not None
    if targets is None and model is not None and not unbound:
        targets = model_targets(model, dtype)
    if model is not None or objects or layout is not None or source_layout is not None:
        table = plain_table(table, targets)
    code = None if dtype is None else dtype_code(dtype)
    wanted = None if layout is None else get_layout(layout)
    incoming = None if source_layout in (None, PER_EXPERT) else get_layout(source_layout, PER_EXPERT)
    experts = _experts_of(model, layout or (source_layout if incoming is not None else None))
    own = {path: as_layout(said) for path, said in experts.items()}
    gated = _gated_by(experts, rule_set, table, incoming)

    def canonical(path: str) -> Layout:
        return own.get(path, TRANSFORMERS)

    destination: Mapping[str, TargetSpec] | None = None  # what the model has, where that is in the wanted layout
    if wanted is not None and targets is not None and _is_laid_out(targets, {} if given else own, wanted):
        destination = targets
        targets = _relaid(targets, wanted, canonical, gated)
    elif in_place and wanted is not None and layout is not None:
        raise _not_laid_out(targets or (), wanted, layout)
    if targets is not None and not rows_of_kv_caches(targets):
        of_caches = rows_of_kv_caches(table.names)
        table = replace(table, hidden=table.hidden.union(of_caches)) if of_caches else table
    stages = _meant(table)
    if stages:
        table = table_of(stages[-1].targets)
    if incoming is not None and source_layout is not None and not _has_names_of(targets, source_layout):
        if not unbound:
            _check_layout(source_layout, table, "source_layout")
        stages.append(relayout(table, lambda path: incoming, canonical, gated))
        table = table_of(stages[-1].targets)
    transposed = None if source_layout is None else source_layout == PER_EXPERT
    plan, problems = compile_targets(table, rule_set, targets, code, transposed=transposed, as_stored=as_stored)
    for stage in reversed(stages):
        problems.unclaimed = [source for row in problems.unclaimed for source in stage.targets[row].sources]
    stages.append(plan)
    if wanted is not None:
        if source_layout is None and targets is None and not unbound:
            refuse_untold(plan, canonical, gated)
        stages.append(relayout(table_of(plan.targets), canonical, lambda path: wanted, gated))
    whole = _composed(stages)
    if destination is not None:
        problems.mismatched += [
            (t.name, t.shape, destination[t.name].shape)
            for t in whole.targets
            if t.name in destination and destination[t.name].shape != t.shape
        ]
    tied = () if model is None else tuple(tied_names(model))
    problems.missing = without_tied(problems.missing, whole, tied)
    problems.missing, problems.unexpected = without_ignored(model, problems.missing, problems.unexpected)
    if source_layout is None and targets is not None and not given:
        refuse_other_layouts(problems, plan, rule_set, bool(experts) or is_pretrained_model(model))
    if layout is not None and table.names and not unbound and not problems.failed:  # which tell why there are none
        _refuse_no_experts(targets or [target.name for target in plan.targets], layout, table)
    whole = replace(
        whole,
        missing=tuple(problems.missing),
        unexpected=tuple(problems.unexpected),
        mismatched=tuple(problems.mismatched),
        tied=tied,
    )
    return whole, problems


def shapes_to_make(
    model: nn.Module, state: Mapping[str, Tensor], layout: str | None, *, in_place: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that a load makes for a model, its experts in a ``layout``.

    Args:
        state: the model's state dict.
        in_place: see ``loading_plan``.

    Raises:
        UnsupportedError: see ``loading_plan``.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if layout is None:
        return shapes
    wanted = get_layout(layout)
    experts = _experts_of(model, layout)
    own = {path: as_layout(said) for path, said in experts.items()}
    if _is_laid_out(shapes, own, wanted):
        return shapes
    if in_place:
        raise _not_laid_out(shapes, wanted, layout)

    def canonical(path: str) -> Layout:
        return own.get(path, TRANSFORMERS)

    def gated(path: str) -> bool:
        return experts[path].gated if path in experts else f"{path}.{canonical(path).first[0].name}" in shapes

    table = SourceTable(list(shapes), ["F32"] * len(shapes), list(shapes.values()))
    return {target.name: target.shape for target in relayout(table, canonical, lambda path: wanted, gated).targets}


def without_tied(missing: Iterable[str], plan: CopyPlan, tied: Iterable[tuple[str, ...]]) -> list[str]:
    """Missing names less those that are tied to a name that is made."""
    made = {target.name for target in plan.targets}
    provided = {name for group in tied if made.intersection(group) for name in group}
    return [name for name in missing if name not in provided]


def saving_plan(
    table: SourceTable,
    *,
    model: nn.Module | None = None,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    reference: Checkpoint | None = None,
    checked: bool = False,
) -> CopyPlan:
    """The plan from model names back to the checkpoint's names.

    Args:
        table: the tensors of the model, in ``layout`` (None: the model's own).
        reference: a checkpoint whose names and boundaries to restore; otherwise all rules are reversed, and the targets
            are in the order in which upstream writes them.
        checked: it is known that the experts, if there are any, are in that layout.

    Raises:
        NameProblems: the tensors do not fit the reference.
        UnsupportedError: experts that are not in the layout of the model, or of the rules, and no ``layout``; or that
            rules are for, under names that these do not meet.
    """
    rules = None if rules is None else list(rules)
    if model is not None or rules or layout is not None or reference is not None:
        table = plain_table(table, None if model is None else model.state_dict())
    if reference is not None:
        return _inverse_of_loading(table, reference, model, rules, layout)
    rule_set = RuleSet(saving_rules(model, rules), model, reverse=True)
    experts = _experts_of(model, layout)
    own = {path: as_layout(said) for path, said in experts.items()}
    stages = _meant(table)
    if stages:
        table = table_of(stages[-1].targets)
    if layout is not None:
        given = get_layout(layout)
        if not checked:
            _check_layout(layout, table, "layout")
        gated = _gated_by(experts, rule_set, table, given)
        stages.append(
            relayout(
                table,
                lambda path: given,
                lambda path: own.get(path, TRANSFORMERS),
                gated,
            )
        )
        table = table_of(stages[-1].targets)
    elif not checked:
        has = {} if model is None else {name: spec.shape for name, spec in model_targets(model).items()}
        refuse_contradictions(table, has, rule_set)
    shapes = dict(zip(table.names, table.shapes, strict=True))
    plan, problems = compile_targets(table, rule_set, None, parameters=shapes)
    problems.raise_unless_fit("going back to the checkpoint's names")
    refuse_grouped(plan, rule_set)
    return _in_saving_order(_composed([*stages, plan]), model)


def _meant(table: SourceTable) -> list[CopyPlan]:
    """The stage that is needed where quantized sources are stored transposed."""
    return [as_meant(table)] if any(decode.swapped for decode in table.decodes.values()) else []


def _composed(stages: Sequence[CopyPlan]) -> CopyPlan:
    whole = stages[0]
    for stage in stages[1:]:
        whole = whole.then(stage)
    return whole


def _in_saving_order(plan: CopyPlan, model: nn.Module | None) -> CopyPlan:
    """The plan with its targets in the order in which ``save_pretrained`` writes them, which files are divided by."""
    by_name = saving_order(model)
    rank: Sequence[Any] = range(len(plan.sources.names)) if by_name is None else [*map(by_name, plan.sources.names)]
    targets = sorted(plan.targets, key=lambda target: min(rank[row] for row in target.sources))
    return replace(plan, targets=tuple(targets))


def without_casts(plan: CopyPlan) -> CopyPlan:
    """The plan without casts, but where the sources of one target differ, or upstream's own code makes it."""
    targets = []
    for target in plan.targets:
        dtypes = {plan.sources.dtypes[row] for row in target.sources}
        casts = target.fallback is None and len(dtypes) == 1
        targets.append(target._replace(dtype=dtypes.pop()) if casts else target)
    return CopyPlan(plan.sources, tuple(targets), plan.rules)


def _inverse_of_loading(
    table: SourceTable,
    reference: Checkpoint,
    model: nn.Module | None,
    rules: Sequence[Any] | None,
    layout: str | None,
) -> CopyPlan:
    has = {n: TargetSpec(d, s) for n, d, s in zip(table.names, table.dtypes, table.shapes, strict=True)}
    dtypes = set(table.dtypes)
    plain = replace(SourceTable.of(reference), dtypes=[_floating_like(d, dtypes) for d in reference.dtypes])
    stored, plain = plain.names, plain_table(plain, has)
    stored_as = dict(zip(plain.names, stored, strict=True))
    source_layout = layout_to_read(reference, None, keeps_names=model is None and not rules and layout is None)
    forward, problems = loading_plan(
        plain, model=model, rules=rules, layout=layout, source_layout=source_layout, targets=has
    )
    problems.unexpected.clear()  # names of the reference that this state dict leaves out
    problems.raise_unless_fit("the reference checkpoint and the tensors to revert")
    back = forward.inverse()
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
    """A dtype that casting checks let pass: the inverse keeps the dtypes of the tensors, not the reference's."""
    return dtype if dtype in present else "F32" if dtype.startswith("F8") else dtype


def _experts_of(model: nn.Module | None, layout: str | None) -> dict[str, ExpertLayout]:
    """How the experts modules of a model lie, as far as they say it.

    Raises:
        UnsupportedError: a layout is asked of a transformers model whose experts do not say how they lie.
    """
    said = {} if model is None else expert_layouts(model)
    silent = [path for path, own in said.items() if own is None]
    if layout is not None and silent and is_pretrained_model(model):
        raise UnsupportedError(
            message(
                f"the layout {layout!r} cannot be reached from these experts, which do not say how they lie",
                where=f"{silent[0]} of {type(model).__name__}",
                do="leave {layout} out to take the experts as the model has them",
            )
        )
    return {path: own for path, own in said.items() if own is not None}


def _check_layout(name: str, table: SourceTable, argument: str) -> None:
    """Raise UnsupportedError if none of the tensors, of which there are some, can be in the layout of that name."""
    layout = LAYOUTS[name]
    if table.names and not any(holds_experts(tensor, layout) for tensor in table.names):
        raise UnsupportedError(
            message(
                f"no tensor is in the layout {name!r}",
                expected="names that end in " + " or ".join(f"experts.{weight}" for weight in layout.expected()),
                found=", ".join(table.names[:3]) + ", ...",
                do=[
                    f"leave {{{argument}}} out if no experts are grouped",
                    "{rules=} groups tensors of single experts",
                ],
            )
        )


def _refuse_no_experts(made: Iterable[str], layout: str, table: SourceTable) -> None:
    """Raise UnsupportedError if nothing that is made can be in a layout, which then would change nothing."""
    if not any(map(any_experts, made)):
        raise UnsupportedError(
            message(
                f"no tensor is in the layout {layout!r} or can be laid out so",
                expected="grouped experts, or a model or rules that group them",
                found=", ".join(table.names[:3]) + ", ...",
                do="leave {layout} out for a model without experts",
            )
        )


def _has_names_of(targets: Mapping[str, TargetSpec] | None, layout: str) -> bool:
    """Whether the experts of a model have names that no other layout has, as those of NeMo's own models."""
    return any(told_by_name(name) == layout for name in targets or ())


def _gated_by(
    experts: Mapping[str, ExpertLayout], rules: RuleSet, table: SourceTable, layout: Layout | None
) -> Callable[[str], bool]:
    """Whether an experts module has a gate: as the model says, else by whether the rules speak of ``experts.up_proj``.

    Else the two weights of the module tell it, where they come in a ``layout``: up has as many rows as down has
    columns. Without any of these, experts are taken to have a gate.
    """
    patterns = [p for row in range(len(rules.converters)) for side in rules.patterns(row) for p in side]
    ungated = any(pattern.endswith("experts.up_proj") for pattern in patterns)
    shapes = {} if layout is None else dict(zip(table.names, table.shapes, strict=True))

    def gated(path: str) -> bool:
        if path in experts:
            return experts[path].gated
        return not ungated and not (layout is not None and has_no_gate(path, layout, shapes))

    return gated


def _is_laid_out(targets: Iterable[str], own: Mapping[str, Layout], wanted: Layout) -> bool:
    """True if all experts among ``targets`` are in the wanted layout, as far as names and the modules tell."""
    names = [name for name in targets if any_experts(name)]
    return all(
        holds_experts(name, wanted) and own.get(name.rpartition(".")[0], wanted).axes == wanted.axes for name in names
    )


def _not_laid_out(targets: Iterable[str], wanted: Layout, called: str) -> UnsupportedError:
    """The error for a model that is to be filled in a layout that its experts are not in."""
    return UnsupportedError(
        message(
            f"the model's experts are not in the layout {called!r}",
            expected="tensors named " + ", ".join(wanted.expected()),
            found=sorted({name.rpartition(".")[2] for name in targets if any_experts(name)}),
            do="leave {layout} out to load in the model's own layout",
        )
    )


def _relaid(
    targets: Mapping[str, TargetSpec],
    wanted: Layout,
    canonical: Callable[[str], Layout],
    gated: Callable[[str], bool],
) -> dict[str, TargetSpec]:
    table = SourceTable(
        list(targets),
        [spec.dtype for spec in targets.values()],
        [spec.shape for spec in targets.values()],
    )
    plan = relayout(table, lambda path: wanted, canonical, gated)
    specs = list(targets.values())
    return {
        target.name: TargetSpec(target.dtype, target.shape, all(specs[row].is_new for row in target.sources))
        for target in plan.targets
    }
