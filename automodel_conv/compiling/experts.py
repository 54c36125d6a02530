"""How many experts a model has, and whether its tensors hold all of them.

Expert parallelism by hand leaves each rank with tensors of its own experts, which look like those of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from automodel_conv.errors import CoverageError, listing, message
from automodel_conv.planning.layouts import SCALES, any_experts

# Names of the number of routed experts in configs. Source: transformers 5.23.0, the configs of ``models/`` and their
# ``attribute_map``.
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Names of routers ``[E, H]`` beside ``experts``. Source: transformers 5.23.0, the classes of ``models/``.
_ROUTERS = ("gate.weight", "router.weight", "router.gate.weight", "gate.wg.weight")


class _Count(NamedTuple):
    """How many experts a tensor, or a list of modules, holds, and how many there are."""

    name: str
    expected: int
    found: int
    told_by: str


def refuse_missing_experts(shapes: Mapping[str, Sequence[int]], model: nn.Module | None) -> None:
    """Refuse tensors of fewer experts than the model has.

    More are no error: some models count others in (LongCat's experts that compute nothing).

    Args:
        shapes: of whole tensors, by their names in the model.
        model: whose config says how many there are; None, or a model that does not say: the rows of the router
            (``gate.weight`` ``[E, H]`` beside ``experts``), where the experts are half of them or fewer.

    Raises:
        CoverageError: names the tensors.
    """
    counts = {} if model is None else {count.name: count for count in _counted_by(model, shapes)}
    counts |= {count.name: count for count in _counted_by_routers(shapes) if count.name not in counts}
    fewer = [count for count in counts.values() if count.found < count.expected]
    if not fewer:
        return
    first = fewer[0]
    more = [f"{each.name}: {each.found} of {each.expected}" for each in fewer[1:]]
    raise CoverageError(
        message(
            f"{first.name} does not hold all experts",
            expected=f"{first.expected} experts, as {first.told_by} says",
            found=f"{first.found} experts" + (f"; and so\n{listing(more)}" if more else ""),
            do="wrap rank-local experts as DTensors with Shard(0) on the mesh that divides them, or gather them first; "
            "where experts were taken out of the model, say so in its config; where layers have unequal numbers, "
            "pass its state dict with rules=",
        )
    )


def _counted_by(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Iterator[_Count]:
    numbered = _numbered(shapes)
    for path, module in model.named_modules():
        leaves = [f"{path}.{leaf}".lstrip(".") for leaf in (*module._parameters, *module._buffers)]
        held = [name for name in leaves if name in shapes and _is_grouped(name, shapes[name], module)]
        if not held and path not in numbered:
            continue
        told_by, expected = _said(model, path, module)
        if expected:
            yield from (_Count(name, expected, shapes[name][0], told_by) for name in held)
            if path in numbered:
                yield _Count(path, expected, len(numbered[path]), told_by)


def _is_grouped(name: str, shape: Sequence[int], module: nn.Module) -> bool:
    """Whether the first dimension of a tensor counts experts."""
    if _holds_experts(name):
        return len(shape) > 0
    return len(shape) == 3 and isinstance(getattr(module, "num_experts", None), int)


def _holds_experts(name: str) -> bool:
    """Whether a tensor is grouped experts, or the scales of such."""
    suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), "")
    return any_experts(name.removesuffix(suffix))


def _numbered(shapes: Mapping[str, Sequence[int]]) -> dict[str, set[str]]:
    """The numbers of experts in a list, by its path: 17 of ``path.experts.17.w1.weight``."""
    found: dict[str, set[str]] = {}
    for name in shapes:
        before, experts, after = name.rpartition("experts.")
        number = after.partition(".")[0]
        if experts and number.isdecimal() and (not before or before.endswith(".")):
            found.setdefault(f"{before}experts", set()).add(number)
    return found


def _said(model: nn.Module, path: str, module: nn.Module) -> tuple[str, int]:
    """Who says how many experts a module has: the nearest config, or else the module itself; 0 if nobody does."""
    at = path
    while True:
        config = getattr(model.get_submodule(at), "config", None)
        for attribute in _NUMBERS if config is not None else ():
            number = _number(config, attribute)
            if number is not None:
                return f"{type(config).__name__}.{attribute}", number
        if not at:
            return f"{path}.num_experts".lstrip("."), _number(module, "num_experts") or 0
        at = at.rpartition(".")[0]


def _number(of: Any, attribute: str) -> int | None:
    try:
        number = getattr(of, attribute, None)
    except RuntimeError:  # a config that differs from layer to layer has no answer for all
        return None
    return number if isinstance(number, int) else None


def _counted_by_routers(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Count]:
    for name, shape in shapes.items():
        if not _holds_experts(name) or not shape:
            continue
        beside = name.rpartition("experts.")[0]
        router = next((beside + leaf for leaf in _ROUTERS if shapes.get(beside + leaf)), None)
        if router is None:
            continue
        rows = shapes[router][0]
        # A router may know of a few experts that lie elsewhere, as Inkling's of shared ones. A rank of several has half
        # of all at most, also where it has one more or less than the others.
        if shape[0] <= (rows + 1) // 2:
            yield _Count(name, rows, shape[0], router)
