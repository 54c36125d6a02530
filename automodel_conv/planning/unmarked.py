"""Refuse grouped experts in an unstated layout unless their names and shapes prove which one it is.

Nothing is guessed here. If no layout is stated, grouped experts are assumed to be in the model's layout, or without a
model in the layout that transformers' rules produce. The model's shapes must confirm this, or the two weights of a
module together. ``[E, 2I, H]`` with ``[E, H, I]`` is one layout, ``[E, H, 2I]`` with ``[E, I, H]`` is the other, and 2I
is even. One or two square matrices fit both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    LAYOUTS,
    TRANSFORMERS,
    Layout,
    has_other_names,
    holds_experts,
    holds_grouped_experts,
    is_weight,
    layouts_with_names,
    same_names,
)
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.rules import Rules

Shape = tuple[int, ...]


def refuse_other_layouts(problems: Problems, plan: CopyPlan, rules: Rules, model_states_layout: bool) -> None:
    """Refuse grouped experts that are not in their model's layout, or that might be in another layout.

    Args:
        problems: tensors that do not fit the model, except those that it ignores.
        plan: the plan of all tensors that fit.
        rules: the model's rules. Experts that they do not produce have one published form, the model's own.
        model_states_layout: whether the model states the layout of its experts, as transformers' models do.

    Raises:
        UnsupportedError: such a tensor exists. The error names the first one and advises ``source_layout``; also
            ``layout`` if the model does not state its own.
    """
    for name, shape, expected in problems.mismatched:
        if is_weight(name) and shape == _transposed(expected) != expected:
            are_grouped = any(map(is_weight, plan.sources.names))
            do = [layout_advice("source_layout", [name])] if are_grouped else []
            if not model_states_layout:
                transposed = [n for n, layout in LAYOUTS.items() if layout.transposed and holds_experts(name, layout)]
                do += [f'pass {{layout="{other}"}} if the model has its experts in it' for other in transposed]
            raise _refused(name, do, f"{list(expected)}, as the model has it", list(shape))
    foreign = [name for name in problems.unexpected if has_other_names(name)]
    if foreign and any(".experts." in name for name in problems.missing):  # else no expert of the model is missing
        found = f"{len(foreign)} tensors with names of another layout"
        raise _refused(
            foreign[0], [layout_advice("source_layout", foreign)], "names of experts that the model has", found
        )
    patterns = [pattern for row in range(len(rules.converters)) for pattern in rules.patterns(row)[1]]
    produced = {pattern.rpartition(".")[2] for pattern in patterns}
    for path, weights in _by_module({t.name: t.shape for t in plan.targets if t.rule < 0}).items():
        if not produced.isdisjoint(weights) and all(_is_square(shape) for shape in weights.values()):
            leaf, shape = next(iter(weights.items()))
            do = [layout_advice("source_layout", [f"{path}.{leaf}"])]
            raise _refused(f"{path}.{leaf}", do, "a matrix that is not square", list(shape))


def refuse_unknown_layout(plan: CopyPlan, canonical: Callable[[str], Layout], gated: Callable[[str], bool]) -> None:
    """Refuse grouped experts if neither a rule, a model nor their two weights determine their layout.

    Args:
        canonical: returns the layout of an experts module, by its name.
        gated: returns whether an experts module has a gate, by its name.

    Raises:
        UnsupportedError: such a tensor exists. The error names the first one and advises ``source_layout``.
    """
    unproduced = {target.name for target in plan.targets if target.rule < 0}
    for path, weights in _by_module({target.name: target.shape for target in plan.targets}).items():
        kept = [leaf for leaf in weights if f"{path}.{leaf}" in unproduced]
        if not kept:
            continue
        layout = canonical(path)
        first, down = layout.first[0], layout.down[0]
        if first.name not in weights or not gated(path):
            is_known = False
        elif down.name not in weights:  # gate and up cannot share a dimension of odd size
            shape = weights[first.name]
            fits, fits_transposed = first.sizes(shape) is not None, first.sizes(_transposed(shape)) is not None
            is_known = not layout.transposed and fits and not fits_transposed
        else:
            is_known = layout.fits(weights)
        if not is_known:
            expected = f"{first.name} [E, 2I, H] and {down.name} [E, H, I]"
            do = [layout_advice("source_layout", [f"{path}.{weight}" for weight in weights])]
            raise _refused(f"{path}.{kept[0]}", do, expected, list(weights[kept[0]]))


def refuse_contradictions(table: SourceTable, shapes: Mapping[str, Shape], rules: Rules) -> None:
    """Refuse a model's tensors if its grouped experts are not in its layout, before rules split them.

    Args:
        table: the tensors.
        shapes: shapes of the model's tensors, by name. Any other tensor is assumed to be as the rules produce it.
        rules: the rules, reversed.

    Raises:
        UnsupportedError: such a tensor exists. The error names the first one and advises ``layout``.
    """
    grouped = dict(zip(table.names, table.shapes, strict=True))
    patterns = [pattern for row in range(len(rules.converters)) for pattern in rules.patterns(row)[0]]
    splits_experts = any("experts" in pattern for pattern in patterns)
    leaves = {pattern.rpartition(".")[2] for pattern in patterns}
    for path, weights in _by_module(grouped).items():
        for leaf, shape in weights.items():
            name = f"{path}.{leaf}"
            expected, do = shapes.get(name), [layout_advice("layout", [name])]
            if expected is not None and shape == _transposed(expected) != expected:
                raise _refused(name, do, f"{list(expected)}, as the model has it", list(shape))
            if splits_experts and leaf not in leaves and has_other_names(name):
                raise _refused(name, do, "names of experts that the rules split", list(shape))
        first, down = TRANSFORMERS.first[0].name, TRANSFORMERS.down[0].name
        if splits_experts and f"{path}.{down}" not in shapes and not TRANSFORMERS.fits(weights):
            if any(LAYOUTS[other].fits(weights) for other in same_names(TRANSFORMERS)):
                expected = "[E, 2I, H] and [E, H, I]"
                do = [layout_advice("layout", [f"{path}.{first}"])]
                raise _refused(f"{path}.{first}", do, expected, list(weights[first]))


def refuse_grouped(plan: CopyPlan, rules: Rules) -> None:
    """Refuse a plan to checkpoint names that does not split grouped experts although the rules split experts.

    The rules then do not match the names of the experts. The names may have the prefix of a wrapper, or of an outer
    model that contains the model that the rules are for.

    Args:
        plan: the plan that the rules produce.
        rules: the rules, reversed.

    Raises:
        UnsupportedError: such experts exist; the error names them.
    """
    patterns = [p.replace("\\", "").rstrip("$") for row in range(len(rules.converters)) for p in rules.patterns(row)[0]]
    leaves = {pattern.rpartition(".")[2] for pattern in patterns if holds_grouped_experts(pattern)}
    names = [t.name for t in plan.targets if t.rule < 0 and holds_grouped_experts(t.name)]
    unsplit = [name for name in names if name.rpartition(".")[2] in leaves]
    if unsplit:
        do = "pass them under the names that they have in the model that the rules are for"
        raise unsplit_experts_error(unsplit, do)


def unsplit_experts_error(names: Sequence[str], do: str | list[str]) -> UnsupportedError:
    """Return the error for grouped experts in a checkpoint that should have one tensor per expert and projection."""
    return UnsupportedError(message("no rule splits these experts", found="\n" + listing(names), do=do))


def _by_module(tensors: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Return the shapes of grouped expert weights, by the name of the module and the name of the weight in it."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        if is_weight(name) and len(shape) == 3:
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = shape
    return modules


def _is_square(shape: Shape) -> bool:
    return shape[1] == shape[2]


def _transposed(shape: Shape) -> Shape:
    """Return the shape with its last two dimensions swapped if it has three, else the shape itself."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def layout_advice(argument: str, names: Iterable[str]) -> str:
    """Return the advice to pass the layout that grouped experts with these names can be in.

    Args:
        argument: name of the argument that states the layout.
        names: names of the tensors. If no layout has all of them, the advice lists all layouts.
    """
    layouts = layouts_with_names(names)
    if len(layouts) == 1:
        return f'the names are those of the layout "{layouts[0]}": pass {{{argument}="{layouts[0]}"}}'
    return f"pass {{{argument}=}}: one of " + ", ".join(f'"{name}"' for name in layouts or LAYOUTS)


def _refused(name: str, do: Sequence[str], expected: object, found: object) -> UnsupportedError:
    text = "cannot determine the layout of grouped experts"
    return UnsupportedError(message(text, where=name, expected=expected, found=found, do=do))
