"""Find square matrices that are stored transposed, which transformers cannot recognize and so must not load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.integrations.hooked_plan import ALL, PlannedLoad
from automodel_conv.planning.resolve import resolve
from automodel_conv.planning.square import WHICH_SOURCE_LAYOUT, conditional_transposes, square_matrices
from automodel_conv.upstream.rules import RuleSet


def transposed_squares(model: Any, state_dict: Mapping[str, Any], rules: RuleSet) -> list[str]:
    """Return the targets of square matrices that are stored transposed, which transformers would load unchanged.

    Raises:
        UnsupportedError: nothing determines how a square matrix is stored.
    """
    if not conditional_transposes(rules):
        return []
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = [tuple(s.get_shape() if hasattr(s, "get_shape") else s.shape) for s in state_dict.values()]
    assignments = resolve(list(state_dict), rules, parameters).assignments
    is_transposed = square_matrices(
        assignments,
        rules,
        shapes,
        parameters,
        do=[f"use load_model(), which needs no hook, with {WHICH_SOURCE_LAYOUT}"],
    )
    return [name for name, transposed in is_transposed.items() if transposed]


def _is_cut(parameter: Tensor) -> bool:
    """Return whether transformers selects this rank's experts before it compares shapes to decide about a transpose."""
    if not hasattr(parameter, "placements") or parameter.shape[0] < 2:
        return False
    sharded = zip(parameter.placements, parameter.device_mesh.shape, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    return any(placement.is_shard(0) and ranks > 1 for placement, ranks in sharded)


def refuse_unplanned(
    transposed: Iterable[str], planned: PlannedLoad | None, left: Mapping[str, str], model: Any
) -> None:
    """Raise UnsupportedError if a square matrix that is stored transposed is left to transformers."""
    targets = {target.name for target in planned.plan.targets} if planned is not None else set()
    names = [name for name in transposed if name not in targets]
    state = model.state_dict() if names else {}
    wrong = [f"{name}: {left.get(name, left.get(ALL))}" for name in names if not _is_cut(state[name])]
    if wrong:
        raise UnsupportedError(
            message(
                "transformers would load square matrices that are stored transposed without transposing them:\n"
                + listing(wrong),
                do="use load_model(), which needs no hook",
            )
        )
