"""Refuse grouped experts under names of another layout, which transformers would replace by random experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.integrations.hooked_files import Slice
from automodel_conv.planning.layouts import PER_EXPERT, layout_from_name
from automodel_conv.planning.resolve import Resolution, all_targets
from automodel_conv.planning.rules import Rules


def refuse_other_names(
    model: Any, state_dict: Mapping[str, Any], names: Sequence[str], resolution: Resolution, rules: Rules
) -> None:
    """Raise UnsupportedError if the model lacks experts, and tensors without a target have names of another layout.

    transformers would report the experts as missing and initialize them.

    Args:
        model: model that is loaded.
        state_dict: tensors that transformers is about to load, or lazy slices of them.
        names: names of the tensors.
        resolution: the assignment of the names to the parameters of the model.
        rules: the rules that assign them.
    """
    foreign = [names[row] for row in resolution.unclaimed if layout_from_name(names[row]) is not None]
    if not foreign:
        return
    filled = {target for use in resolution.assignments for target in all_targets(rules, use.rule, use.target)}
    lacking = [name for name in model.state_dict() if ".experts." in f".{name}" and name not in filled]
    if not lacking:
        return
    layout = layout_from_name(foreign[0])
    do = [f'build the model and call load_model(model, path, source_layout="{layout}"), which needs no hook']
    do.append(f'convert the files: convert_checkpoint(..., source_layout="{layout}", layout="{PER_EXPERT}")')
    if not isinstance(state_dict[foreign[0]], Slice):
        do = [f'pass the result of convert_state_dict(tensors, model, source_layout="{layout}") instead']
    raise UnsupportedError(
        message(
            f"transformers would initialize the experts, because their names are those of the layout {layout!r}",
            where=type(model).__name__,
            expected="\n" + listing(lacking, 3),
            found="\n" + listing(foreign, 3),
            do=do,
        )
    )
