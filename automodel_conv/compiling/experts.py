"""Check that a model's tensors hold all of its experts.

With manual expert parallelism each rank has tensors of its own experts only. They look like those of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from automodel_conv.errors import CoverageError, listing, message
from automodel_conv.planning.layouts import SCALES, holds_grouped_experts

# Config attributes that hold the number of routed experts.
# Source: transformers 5.24.0, the configs of ``models/`` and their ``attribute_map``.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Names of routers ``[E, H]`` next to ``experts``.
# Source: transformers 5.24.0, the classes of ``models/``.
_ROUTERS = ("gate.weight", "router.weight", "router.gate.weight", "gate.wg.weight")


class _Count(NamedTuple):
    """The number of experts that a tensor or a list of modules holds, and the number that it should hold."""

    name: str
    expected: int
    held: int
    evidence: str
    """The config attribute, module attribute or router that states ``expected``."""


def refuse_missing_experts(shapes: Mapping[str, Sequence[int]], model: nn.Module | None) -> None:
    """Raise CoverageError if a tensor holds fewer experts than the model has.

    More experts are no error: some models include others in the count (LongCat's experts that compute nothing).

    Args:
        shapes: shapes of whole tensors, by their names in the model.
        model: the model, whose config states the number of experts. Without a model, or if it states none, the number
            of experts is the number of rows of the router (``gate.weight`` ``[E, H]`` next to ``experts``). In that
            case it is an error only if a tensor holds at most half of them.

    Raises:
        CoverageError: lists the tensors.
    """
    counts = {} if model is None else {count.name: count for count in _counts_by_model(model, shapes)}
    counts |= {count.name: count for count in _counts_by_routers(shapes) if count.name not in counts}
    fewer = [count for count in counts.values() if count.held < count.expected]
    if not fewer:
        return
    first = fewer[0]
    more = [f"{count.name}: {count.held} of {count.expected}" for count in fewer[1:]]
    raise CoverageError(
        message(
            f"{first.name} does not hold all experts",
            expected=f"{first.expected} experts, as {first.evidence} says",
            found=f"{first.held} experts" + (f"; also\n{listing(more)}" if more else ""),
            do=[
                "{experts=} names the experts of this rank",
                "wrap rank-local experts as DTensors with Shard(0) on the mesh that divides them, or gather them "
                "first; if experts were removed from the model, correct its config; if its layers have different "
                "numbers of experts, pass its state dict with rules=",
            ],
        )
    )


def _counts_by_model(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Iterator[_Count]:
    indices = _expert_indices(shapes)
    for path, module in model.named_modules():
        leaves = [f"{path}.{leaf}".lstrip(".") for leaf in (*module._parameters, *module._buffers)]
        held = [name for name in leaves if name in shapes and _is_grouped(name, shapes[name], module)]
        if not held and path not in indices:
            continue
        evidence, expected = _stated_number(model, path, module)
        if expected:
            yield from (_Count(name, expected, shapes[name][0], evidence) for name in held)
            if path in indices:
                yield _Count(path, expected, len(indices[path]), evidence)


def _is_grouped(name: str, shape: Sequence[int], module: nn.Module) -> bool:
    """Return whether the first dimension of a tensor counts experts."""
    if _holds_experts(name):
        return len(shape) > 0
    return len(shape) == 3 and isinstance(getattr(module, "num_experts", None), int)


def _holds_experts(name: str) -> bool:
    """Return whether a tensor is grouped experts, or the scales of grouped experts."""
    suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), "")
    return holds_grouped_experts(name.removesuffix(suffix))


def _expert_indices(shapes: Mapping[str, Sequence[int]]) -> dict[str, set[str]]:
    """Return the experts of each module list by its path, such as "17" for ``path.experts.17.w1.weight``."""
    indices: dict[str, set[str]] = {}
    for name in shapes:
        before, experts, after = name.rpartition("experts.")
        index = after.partition(".")[0]
        if experts and index.isdecimal() and (not before or before.endswith(".")):
            indices.setdefault(f"{before}experts", set()).add(index)
    return indices


def _stated_number(model: nn.Module, path: str, module: nn.Module) -> tuple[str, int]:
    """Return the attribute that states a module's number of experts, and the number; 0 if none does.

    It is an attribute of the nearest config, or else of the module itself.
    """
    ancestor = path
    while True:
        config = getattr(model.get_submodule(ancestor), "config", None)
        for attribute in _NUM_EXPERTS if config is not None else ():
            number = _number(config, attribute)
            if number is not None:
                return f"{type(config).__name__}.{attribute}", number
        if not ancestor:
            return f"{path}.num_experts".lstrip("."), _number(module, "num_experts") or 0
        ancestor = ancestor.rpartition(".")[0]


def _number(holder: Any, attribute: str) -> int | None:
    try:
        number = getattr(holder, attribute, None)
    except RuntimeError:  # raised by a config whose layers have different numbers
        return None
    return number if isinstance(number, int) else None


def _counts_by_routers(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Count]:
    for name, shape in shapes.items():
        if not _holds_experts(name) or not shape:
            continue
        parent = name.rpartition("experts.")[0]
        router = next((parent + leaf for leaf in _ROUTERS if shapes.get(parent + leaf)), None)
        if router is None:
            continue
        rows = shapes[router][0]
        # A router may have rows for a few experts that are stored elsewhere, such as Inkling's shared experts. If
        # ranks divide the experts, each holds at most half of them, rounded up if the division is uneven.
        if shape[0] <= (rows + 1) // 2:
            yield _Count(name, rows, shape[0], router)
