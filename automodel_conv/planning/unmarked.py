"""Grouped experts of which nobody has said how they lie: what shapes and names contradict, or leave open, is an error.

Nothing is guessed here. Without a word, grouped experts are taken to lie as the model has them, or without a model as
transformers' rules make them, and this must be borne out: by the model's shapes, or by a module's two weights together.
``[E, 2I, H]`` beside ``[E, H, I]`` is the one, ``[E, H, 2I]`` beside ``[E, I, H]`` the other, and 2I is even; a square
matrix alone, or two of them, are both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import (
    LAYOUTS,
    TRANSFORMERS,
    Layout,
    any_experts,
    holds_experts,
    is_weight,
    layout_from_name,
    same_names,
)
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.rules import Rules

Shape = tuple[int, ...]


def refuse_other_layouts(problems: Problems, plan: CopyPlan, rules: Rules, model_says: bool) -> None:
    """Refuse grouped experts that are not in their model's layout, or that may be in another one as well.

    Args:
        problems: what did not fit the model, less what it ignores.
        plan: what does.
        rules: the model's; experts that they do not make have one published form, which is the model's own.
        model_says: the model says how its experts lie, as those of transformers do; others may lie otherwise too.

    Raises:
        UnsupportedError: names the first tensor, and ``source_layout``, or ``layout`` of a model that does not say it.
    """
    for name, found, expected in problems.mismatched:
        if is_weight(name) and found == _transposed(expected) != expected:
            are_grouped = any(map(is_weight, plan.sources.names))
            do = [_say("source_layout")] if are_grouped else []
            if not model_says:
                turned = [n for n, layout in LAYOUTS.items() if layout.transposed and holds_experts(name, layout)]
                do += [f'say {{layout="{called}"}} if the model has its experts in that layout' for called in turned]
            raise _refused(name, do, f"{list(expected)}, as the model has it", list(found))
    told = [name for name in problems.unexpected if layout_from_name(name) is not None]
    if told and any(".experts." in name for name in problems.missing):  # else the model has all of its own
        raise _refused(told[0], [_say("source_layout")], "names that the model has", f"{len(told)} such names")
    made = {pattern.rpartition(".")[2] for row in range(len(rules.converters)) for pattern in rules.patterns(row)[1]}
    for path, weights in _by_module({t.name: t.shape for t in plan.targets if t.rule < 0}).items():
        if not made.isdisjoint(weights) and all(_is_square(shape) for shape in weights.values()):
            leaf, shape = next(iter(weights.items()))
            raise _refused(f"{path}.{leaf}", [_say("source_layout")], "a matrix that is not square", list(shape))


def refuse_unknown_layout(plan: CopyPlan, canonical: Callable[[str], Layout], gated: Callable[[str], bool]) -> None:
    """Refuse grouped experts that no rule has made, no model has, and whose two weights do not tell how they lie.

    Raises:
        UnsupportedError: names the first tensor, and ``source_layout``.
    """
    for path, weights in _by_module({t.name: t.shape for t in plan.targets if t.rule < 0}).items():
        layout = canonical(path)
        first, down = layout.first[0], layout.down[0]
        if first.name not in weights or not gated(path):
            told = False
        elif down.name not in weights:  # gate and up cannot lie along a dimension that is odd
            shape = weights[first.name]
            told = not layout.transposed and first.sizes(shape) is not None and first.sizes(_transposed(shape)) is None
        else:
            told = layout.fits(weights)
        if not told:
            leaf, shape = next(iter(weights.items()))
            expected = f"{first.name} [E, 2I, H] and {down.name} [E, H, I]"
            raise _refused(f"{path}.{leaf}", [_say("source_layout")], expected, list(shape))


def refuse_contradictions(table: SourceTable, shapes: Mapping[str, Shape], rules: Rules) -> None:
    """Refuse tensors of a model whose grouped experts are not in its layout, before rules take them apart.

    Args:
        shapes: of the model's tensors, by name; those that are not in it are taken to be as the rules make them.

    Raises:
        UnsupportedError: names the first tensor, and ``layout``.
    """
    grouped = dict(zip(table.names, table.shapes, strict=True))
    patterns = [pattern for row in range(len(rules.converters)) for pattern in rules.patterns(row)[0]]
    takes, taken = any("experts" in pattern for pattern in patterns), {p.rpartition(".")[2] for p in patterns}
    for path, weights in _by_module(grouped).items():
        for leaf, found in weights.items():
            name = f"{path}.{leaf}"
            expected = shapes.get(name)
            if expected is not None and found == _transposed(expected) != expected:
                raise _refused(name, [_say("layout")], f"{list(expected)}, as the model has it", list(found))
            if takes and leaf not in taken and layout_from_name(name) is not None:
                raise _refused(name, [_say("layout")], "names that the rules take apart", list(found))
        first, down = TRANSFORMERS.first[0].name, TRANSFORMERS.down[0].name
        if takes and f"{path}.{down}" not in shapes and not TRANSFORMERS.fits(weights):
            if any(LAYOUTS[other].fits(weights) for other in same_names(TRANSFORMERS)):
                found = list(weights[first])
                raise _refused(f"{path}.{first}", [_say("layout")], "[E, 2I, H] beside [E, H, I]", found)


def refuse_grouped(plan: CopyPlan, rules: Rules) -> None:
    """Refuse to go back to a checkpoint's names with grouped experts that rules are for and that none of them has met.

    A rule meets no tensor where there are no experts, which is fine, or where they are called otherwise than in the
    model that it is of: under a prefix of a wrapper, or of the model that holds it.

    Args:
        plan: what the rules make.
        rules: reversed.

    Raises:
        UnsupportedError: names the tensors.
    """
    patterns = [p.replace("\\", "").rstrip("$") for row in range(len(rules.converters)) for p in rules.patterns(row)[0]]
    leaves = {pattern.rpartition(".")[2] for pattern in patterns if any_experts(pattern)}
    left = [t.name for t in plan.targets if t.rule < 0 and any_experts(t.name) and t.name.rpartition(".")[2] in leaves]
    if left:
        raise not_taken_apart(left, "pass them under the names that they have in the model of these rules")


def not_taken_apart(names: Sequence[str], do: str | list[str]) -> UnsupportedError:
    """The error for grouped experts in what should be a checkpoint with one tensor for each expert and projection."""
    return UnsupportedError(message("no rule takes these experts apart", found="\n" + listing(names), do=do))


def _by_module(tensors: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """The weights of grouped experts among these, by the names of their modules and then their own."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        if is_weight(name) and len(shape) == 3:
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = shape
    return modules


def _is_square(shape: Shape) -> bool:
    return shape[1] == shape[2]


def _transposed(shape: Shape) -> Shape:
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def _say(argument: str) -> str:
    return f"say it: {{{argument}=}} takes " + ", ".join(f'"{name}"' for name in LAYOUTS)


def _refused(name: str, do: Sequence[str], expected: object, found: object) -> UnsupportedError:
    text = "grouped experts lie in a layout that cannot be told"
    return UnsupportedError(message(text, where=name, expected=expected, found=found, do=do))
