"""Find square matrices that are stored transposed; transformers cannot tell, so they must not be left to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.integrations.hooked_plan import ALL, Work
from automodel_conv.planning.resolve import resolve
from automodel_conv.planning.square import WHICH_SOURCE_LAYOUT, conditional_transposes, square_matrices
from automodel_conv.upstream.rules import RuleSet


def square_and_transposed(model: Any, state_dict: Mapping[str, Any], rules: RuleSet) -> list[str]:
    """Targets made of square matrices that lie transposed, which transformers takes for the model's own.

    Raises:
        UnsupportedError: a square matrix of which nothing tells how it lies.
    """
    if not conditional_transposes(rules):
        return []
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = [tuple(s.get_shape() if hasattr(s, "get_shape") else s.shape) for s in state_dict.values()]
    assignments = resolve(list(state_dict), rules, parameters).assignments
    lies = square_matrices(
        assignments,
        rules,
        shapes,
        parameters,
        do=[f"use load_model(), which needs no hook, with {WHICH_SOURCE_LAYOUT}"],
    )
    return [name for name, transposed in lies.items() if transposed]


def _is_cut(parameter: Tensor) -> bool:
    """True if transformers cuts experts out of its source first, whose shape it then takes for one to be transposed."""
    if not hasattr(parameter, "placements") or parameter.shape[0] < 2:
        return False
    sharded = zip(parameter.placements, parameter.device_mesh.shape, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    return any(placement.is_shard(0) and ranks > 1 for placement, ranks in sharded)


def refuse_left(turned: Iterable[str], work: Work | None, left: Mapping[str, str], model: Any) -> None:
    """Raise UnsupportedError if a square matrix that lies transposed is left to transformers, which does not see it."""
    made = {target.name for target in work.plan.targets} if work is not None else set()
    names = [name for name in turned if name not in made]
    state = model.state_dict() if names else {}
    wrong = [f"{name}: {left.get(name, left.get(ALL))}" for name in names if not _is_cut(state[name])]
    if wrong:
        raise UnsupportedError(
            message(
                "square matrices lie transposed, and transformers, to which they are left, does not see it:\n"
                + listing(wrong),
                do="use load_model(), which needs no hook",
            )
        )
