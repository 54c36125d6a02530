"""The layout of the experts of a model, and errors where it contradicts the layout that a caller asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    LAYOUTS,
    ExpertLayout,
    Layout,
    any_experts,
    has_no_gate,
    holds_experts,
    layout_from_name,
)
from automodel_conv.planning.relayout import relayout
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.models import expert_layouts
from automodel_conv.upstream.registry import is_pretrained_model
from automodel_conv.upstream.rules import RuleSet


def experts_of(model: nn.Module | None, layout: str | None) -> dict[str, ExpertLayout]:
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


def check_layout(name: str, table: SourceTable, argument: str) -> None:
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


def refuse_no_experts(made: Iterable[str], layout: str, table: SourceTable) -> None:
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


def has_names_of(targets: Mapping[str, TargetSpec] | None, layout: str) -> bool:
    """Whether the experts of a model have names that no other layout has, as those of NeMo's own models."""
    return any(layout_from_name(name) == layout for name in targets or ())


def gated_by(
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


def is_laid_out(targets: Iterable[str], own: Mapping[str, Layout], wanted: Layout) -> bool:
    """True if all experts among ``targets`` are in the wanted layout, as far as names and the modules tell."""
    names = [name for name in targets if any_experts(name)]
    return all(
        holds_experts(name, wanted) and own.get(name.rpartition(".")[0], wanted).axes == wanted.axes for name in names
    )


def not_laid_out(targets: Iterable[str], wanted: Layout, called: str) -> UnsupportedError:
    """The error for a model that is to be filled in a layout that its experts are not in."""
    return UnsupportedError(
        message(
            f"the model's experts are not in the layout {called!r}",
            expected="tensors named " + ", ".join(wanted.expected()),
            found=sorted({name.rpartition(".")[2] for name in targets if any_experts(name)}),
            do="leave {layout} out to load in the model's own layout",
        )
    )


def relaid_specs(
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
