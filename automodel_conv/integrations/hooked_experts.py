"""Refuse experts under names that transformers has no rule for, and that it would replace by random experts.

They are grouped experts of another layout, or per-expert tensors of a type that is published grouped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.integrations.hooked_files import Slice
from automodel_conv.planning.layouts import PER_EXPERT, has_other_names, layouts_with_names
from automodel_conv.planning.resolve import Resolution, all_targets
from automodel_conv.planning.rules import Rules


def refuse_other_names(
    model: Any, state_dict: Mapping[str, Any], names: Sequence[str], resolution: Resolution, rules: Rules
) -> None:
    """Raise UnsupportedError if the model lacks experts, and tensors without a target have other names of experts.

    transformers would report the experts as missing and initialize them.

    Args:
        model: model that is loaded.
        state_dict: tensors that transformers is about to load, or lazy slices of them.
        names: names of the tensors.
        resolution: the assignment of the names to the parameters of the model.
        rules: the rules that assign them.
    """
    unclaimed = [names[row] for row in resolution.unclaimed if ".experts." in names[row]]
    if not unclaimed:
        return
    filled = {target for use in resolution.assignments for target in all_targets(rules, use.rule, use.target)}
    lacking = [name for name in model.state_dict() if ".experts." in f".{name}" and name not in filled]
    foreign = [name for name in unclaimed if has_other_names(name)]
    if foreign and lacking:
        first, *others = layouts_with_names(foreign[:1])
        do = [
            f'build the model and call load_model(model, path, source_layout="{first}"), which needs no hook',
            f'convert the files: convert_checkpoint(..., source_layout="{first}", layout="{PER_EXPERT}")',
        ]
        if not isinstance(state_dict[foreign[0]], Slice):
            do = [f'pass the result of convert_state_dict(tensors, model, source_layout="{first}") instead']
        if others:
            do.append(f"if the experts are in another layout with these names, state it: {', '.join(others)}")
        raise _refused(model, f"their names are those of the layout {first!r}", lacking, foreign, do)
    modules = {name.rpartition(".")[0] for name in lacking}
    single = _of_single_experts(unclaimed, modules)
    if single:
        do = ["build the model and call load_model(model, path), which needs no hook"]
        do.append("convert the files: convert_checkpoint(..., dequantize=True)")
        if not isinstance(state_dict[single[0]], Slice):
            do = ["pass the result of convert_state_dict(tensors, model) instead"]
        raise _refused(model, "it has no rule that groups tensors of single experts for this type", lacking, single, do)


def _of_single_experts(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Return the tensors of single experts of modules, with or without a prefix of the module's name."""
    names_of: dict[str, list[str]] = {}
    for name in names:
        path, _, rest = name.rpartition(".experts.")
        if rest.partition(".")[0].isdecimal():
            names_of.setdefault(f"{path}.experts", []).append(name)
    return [
        name
        for path, of_path in names_of.items()
        if any(path == module or path.endswith(f".{module}") or module.endswith(f".{path}") for module in modules)
        for name in of_path
    ]


def _refused(model: Any, why: str, lacking: Sequence[str], names: Sequence[str], do: list[str]) -> UnsupportedError:
    return UnsupportedError(
        message(
            f"transformers would initialize the experts, because {why}",
            where=type(model).__name__,
            expected="\n" + listing(lacking, 3),
            found="\n" + listing(names, 3),
            do=do,
        )
    )
