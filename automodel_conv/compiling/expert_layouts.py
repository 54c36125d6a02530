"""Determine the layout of a model's experts, and refuse a layout argument that contradicts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    LAYOUTS,
    ExpertLayout,
    Layout,
    has_no_gate,
    has_other_names,
    holds_experts,
    holds_grouped_experts,
    is_weight,
    layouts_with_names,
)
from automodel_conv.planning.relayout import relayout
from automodel_conv.planning.unmarked import layout_advice
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.models import expert_layouts
from automodel_conv.upstream.registry import is_pretrained_model
from automodel_conv.upstream.rules import RuleSet


def experts_of(model: nn.Module | None, layout: str | None) -> dict[str, ExpertLayout]:
    """Return the layouts of a model's experts modules by name, for modules that state their layout.

    Raises:
        UnsupportedError: ``layout`` is given for a transformers model with experts that do not state their layout.
    """
    stated = {} if model is None else expert_layouts(model)
    silent = [path for path, own in stated.items() if own is None]
    if layout is not None and silent and is_pretrained_model(model):
        raise UnsupportedError(
            message(
                f"cannot convert experts to the layout {layout!r}: the model does not state their layout",
                where=f"{silent[0]} of {type(model).__name__}",
                do="leave {layout} out to keep the model's own layout",
            )
        )
    return {path: own for path, own in stated.items() if own is not None}


def check_layout(name: str, table: SourceTable, argument: str) -> None:
    """Raise UnsupportedError if there are tensors and none of them can be in the layout.

    Args:
        name: name of the layout.
        table: the tensors.
        argument: name of the argument that states the layout, for the error.
    """
    layout = LAYOUTS[name]
    if table.names and not any(holds_experts(tensor, layout) for tensor in table.names):
        grouped = [tensor for tensor in table.names if holds_grouped_experts(tensor)]
        single = _single_experts(table)
        if grouped:
            do = [layout_advice(argument, filter(is_weight, grouped))]
        elif single:
            do = [
                f"leave {{{argument}}} out: these experts are not grouped",
                "{rules=} groups tensors of single experts",
            ]
        else:
            do = [f"leave {{{argument}}} out: no name is that of an expert"]
        raise UnsupportedError(
            message(
                f"no tensor is in the layout {name!r}",
                expected="names that end in " + " or ".join(f"experts.{weight}" for weight in layout.expected()),
                found="\n" + listing(grouped or single or table.names, 3),
                do=do,
            )
        )


def refuse_no_experts(targets: Iterable[str], layout: str, table: SourceTable) -> None:
    """Raise UnsupportedError if no target is grouped experts, so that ``layout`` would change nothing."""
    if not any(map(holds_grouped_experts, targets)):
        raise UnsupportedError(
            message(
                f"no tensor is in the layout {layout!r} or can be converted to it",
                expected="grouped experts, or a model or rules that group them",
                found="\n" + listing(_single_experts(table) or table.names, 3),
                do="leave {layout} out for a model without experts",
            )
        )


def _single_experts(table: SourceTable) -> list[str]:
    return [name for name in table.names if ".experts." in f".{name}"]


def has_names_of(targets: Mapping[str, TargetSpec] | None, layout: str) -> bool:
    """Return whether a model's experts have names of this layout, and not transformers' own, as in NeMo's models.

    Such a model has the experts in this layout, or in the one that loaders fill among layouts with the same names.

    Raises:
        UnsupportedError: the layout is one that an engine makes for a kernel, and the model has its names.
    """
    named = next((n for n in targets or () if has_other_names(n) and holds_experts(n, LAYOUTS[layout])), None)
    if named is None:
        return False
    same = layouts_with_names([named])
    if layout != same[0]:
        raise UnsupportedError(
            message(
                "cannot determine the layout of the model's experts",
                where=named,
                found=f"a name of several layouts, and tensors in the layout {layout!r}",
                do="pass {layout=}: one of " + ", ".join(f'"{name}"' for name in same),
            )
        )
    return True


def gated_by(
    experts: Mapping[str, ExpertLayout], rules: RuleSet, table: SourceTable, layout: Layout | None
) -> Callable[[str], bool]:
    """Return a function that determines whether an experts module, given by name, has a gate.

    The model decides if it states it. Otherwise there is no gate if a rule names ``experts.up_proj``, or if the two
    weights of the module are in ``layout`` and the rows of up equal the columns of down. All other experts have one.
    """
    patterns = [p for row in range(len(rules.converters)) for side in rules.patterns(row) for p in side]
    rules_are_ungated = any(pattern.endswith("experts.up_proj") for pattern in patterns)
    shapes = {} if layout is None else dict(zip(table.names, table.shapes, strict=True))

    def gated(path: str) -> bool:
        if path in experts:
            return experts[path].gated
        return not rules_are_ungated and not (layout is not None and has_no_gate(path, layout, shapes))

    return gated


def is_laid_out(targets: Iterable[str], own: Mapping[str, Layout], wanted: Layout) -> bool:
    """Return whether all experts among the targets are in the wanted layout, as far as names and modules show.

    Args:
        targets: names.
        own: layouts of the model's experts modules, by name.
        wanted: the layout.
    """
    names = [name for name in targets if holds_grouped_experts(name)]
    return all(
        holds_experts(name, wanted) and own.get(name.rpartition(".")[0], wanted).arrangement == wanted.arrangement
        for name in names
    )


def not_laid_out(targets: Iterable[str], wanted: Layout, called: str) -> UnsupportedError:
    """Return the error for filling a model in a layout that its experts are not in.

    Args:
        targets: the model's names.
        wanted: the layout.
        called: its name.
    """
    return UnsupportedError(
        message(
            f"the model's experts are not in the layout {called!r}",
            expected="tensors named " + ", ".join(wanted.expected()),
            found=sorted({name.rpartition(".")[2] for name in targets if holds_grouped_experts(name)}),
            do="leave {layout} out to load in the model's own layout",
        )
    )


def sizes_in(shapes: Mapping[str, tuple[int, ...]], layout: Callable[[str], Layout]) -> Callable[[str], dict[str, int]]:
    """Return a function from the name of an experts module to its intermediate size i and its hidden size h.

    The function returns no sizes if the module has no ``down`` with a shape that its layout allows.

    Args:
        shapes: shapes of tensors by name.
        layout: maps the name of an experts module to its layout.
    """

    def sizes(path: str) -> dict[str, int]:
        down = layout(path).down[0]
        found = down.sizes(shapes.get(f"{path}.{down.name}", ()))
        return {} if found is None else {axis: found[axis] for axis in ("i", "h")}

    return sizes


def relaid_specs(
    targets: Mapping[str, TargetSpec],
    wanted: Layout,
    canonical: Callable[[str], Layout],
    gated: Callable[[str], bool],
    sizes: Callable[[str], Mapping[str, int]] = lambda path: {},
) -> dict[str, TargetSpec]:
    """Return the targets that the rules must produce so that a relayout can fill ``targets`` in the wanted layout.

    ``sizes`` returns the sizes of a module without padding; see ``relayout``.
    """
    table = SourceTable(
        list(targets),
        [spec.dtype for spec in targets.values()],
        [spec.shape for spec in targets.values()],
    )
    plan = relayout(table, lambda path: wanted, canonical, gated, sizes)
    specs = list(targets.values())
    return {
        target.name: TargetSpec(target.dtype, target.shape, all(specs[row].is_new for row in target.sources))
        for target in plan.targets
    }
