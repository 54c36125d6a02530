"""Named layouts of grouped experts, and the functions that recognize them by names and shapes; pure.

Each layout is one entry of ``LAYOUTS``. Layouts concern only *routed experts*: tensors of a module named ``experts``
that hold all experts in one buffer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.axes import dims_of, sizes_of

GATE_UP = ("gate", "up")
UP = ("up",)
DOWN = ("down",)


class Buffer(NamedTuple):
    """A tensor that holds one or two projections of all experts of a module.

    The axes are E (experts), g (projections), i (intermediate size) and h (hidden size).
    """

    name: str
    axes: str
    """Axes in einops notation. Parentheses merge g and another axis into one dimension."""
    projections: tuple[str, ...]
    """Names of the projections, in their order along g."""

    @property
    def is_weight(self) -> bool:
        """Whether the buffer holds weights and not biases."""
        return {"i", "h"} <= {axis for dim in dims_of(self.axes) for axis in dim}

    def sizes(self, shape: Sequence[int]) -> dict[str, int] | None:
        """Return the size of each axis, or None for a shape that the buffer cannot have."""
        try:
            return sizes_of(dims_of(self.axes), shape, {"g": len(self.projections)})
        except ValueError:
            return None


@dataclass(frozen=True)
class Layout:
    """The names of the tensors of grouped experts, and their arrangement in memory.

    A weight comes before its bias.
    """

    first: tuple[Buffer, ...]
    """Buffers of gate and up: one for both, or one for each."""
    ungated: tuple[Buffer, ...]
    """Buffers of up, for experts without a gate."""
    down: tuple[Buffer, ...]
    """Buffers of down."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of weights and biases, with and without a gate."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down))

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the weights."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down) if buffer.is_weight)

    @cached_property
    def axes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Axes and projections of each buffer, without its name."""
        return tuple((buffer.axes, buffer.projections) for buffer in (*self.first, *self.ungated, *self.down))

    @property
    def transposed(self) -> bool:
        """Whether weights are ``[E, in, out]`` and not ``[E, out, in]``."""
        axes = [axis for dim in dims_of(self.down[0].axes) for axis in dim]
        return axes.index("i") < axes.index("h")

    def buffers(self, gated: bool) -> tuple[Buffer, ...]:
        """Return the buffers of experts with or without a gate."""
        return (*(self.first if gated else self.ungated), *self.down)

    def expected(self) -> list[str]:
        """Return the names of the weights of experts with a gate, in order, for error messages."""
        return [buffer.name for buffer in self.buffers(gated=True) if buffer.is_weight]

    def fits(self, shapes: Mapping[str, Sequence[int]], gated: bool = True) -> bool:
        """Return whether the shapes can be those of all weights of one module.

        Args:
            shapes: shape of each tensor by its name in the module.
            gated: whether the experts have a gate.
        """
        known: dict[str, int] = {}
        for buffer in self.buffers(gated):
            if buffer.is_weight:
                sizes = buffer.sizes(shapes.get(buffer.name, ()))
                if sizes is None or any(known.setdefault(axis, sizes[axis]) != sizes[axis] for axis in ("i", "h")):
                    return False
        return True


LAYOUTS: Mapping[str, Layout] = {
    # transformers 5.x, `integrations/moe.py`: gate_up_proj [E, 2I, H], down_proj [E, H, I].
    "transformers": Layout(
        first=(Buffer("gate_up_proj", "E (g i) h", GATE_UP), Buffer("gate_up_proj_bias", "E (g i)", GATE_UP)),
        ungated=(Buffer("up_proj", "E i h", UP), Buffer("up_proj_bias", "E i", UP)),
        down=(Buffer("down_proj", "E h i", DOWN), Buffer("down_proj_bias", "E h", DOWN)),
    ),
    # NeMo AutoModel 0.7.0, `components/moe/experts.py`: gate_and_up_projs [E, H, 2I], down_projs [E, I, H].
    "nemo": Layout(
        first=(Buffer("gate_and_up_projs", "E h (g i)", GATE_UP), Buffer("gate_up_proj_bias", "E (g i)", GATE_UP)),
        ungated=(Buffer("gate_and_up_projs", "E h i", UP), Buffer("gate_up_proj_bias", "E i", UP)),
        down=(Buffer("down_projs", "E i h", DOWN), Buffer("down_proj_bias", "E h", DOWN)),
    ),
    # transformers 5.x, `models/gpt_oss`: gate_up_proj [E, H, 2I] with gate and up alternating, down_proj [E, I, H].
    "gpt_oss": Layout(
        first=(Buffer("gate_up_proj", "E h (i g)", GATE_UP), Buffer("gate_up_proj_bias", "E (i g)", GATE_UP)),
        ungated=(Buffer("up_proj", "E h i", UP), Buffer("up_proj_bias", "E i", UP)),
        down=(Buffer("down_proj", "E i h", DOWN), Buffer("down_proj_bias", "E h", DOWN)),
    ),
    # vLLM, `FusedMoE`: w13_weight [E, 2I, H], w2_weight [E, H, I].
    "vllm": Layout(
        first=(Buffer("w13_weight", "E (g i) h", GATE_UP), Buffer("w13_bias", "E (g i)", GATE_UP)),
        ungated=(Buffer("w13_weight", "E i h", UP), Buffer("w13_bias", "E i", UP)),
        down=(Buffer("w2_weight", "E h i", DOWN), Buffer("w2_bias", "E h", DOWN)),
    ),
}
"""All layouts by name.

If gate and up have a buffer each, ``first`` holds both, as in ``Buffer("gate", "E i h", ("gate",))``. If up comes
before gate, the projections are ``("up", "gate")``."""

TRANSFORMERS = LAYOUTS["transformers"]
"""The layout that rules of transformers produce, unless the model has another one."""

PER_EXPERT = "per_expert"
"""The name for experts as checkpoints of a type are published: most have one tensor for each expert and projection.

It is not a layout of buffers."""

SCALES = ("_scale_inv", "_scale")
"""Suffixes of the scales of experts that are kept quantized. Scales have the layout of their experts.

Source: transformers 5.24.0, ``FP8Experts``; vLLM, ``Fp8MoEMethod``."""


class ExpertLayout(NamedTuple):
    """The way one experts module stores its weights, in the terms of transformers' ``use_experts_implementation``."""

    transposed: bool
    interleaved: bool
    gated: bool


def get_layout(name: str, *others: str) -> Layout:
    """Return the layout with this name.

    Args:
        name: name of a layout.
        others: further names that the caller accepts and that are not layouts of buffers.

    Raises:
        UnsupportedError: there is no such layout; the message lists the accepted names and suggests a similar one.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    known = sorted([*LAYOUTS, *others])
    normalized = re.sub(r"\W+", "_", str(name).strip().lower())
    similar = difflib.get_close_matches(normalized, [*LAYOUTS, PER_EXPERT], 1)
    if similar == [PER_EXPERT] and PER_EXPERT not in others:
        do = '{convert_checkpoint(..., layout="per_expert")} writes single experts'
    else:
        do = f"write {similar[0]!r}" if similar else None
    raise UnsupportedError(message(f"unknown layout {name!r}", expected=f"one of {known}", do=do))


def as_layout(own: ExpertLayout) -> Layout:
    """Return the layout of a model's own experts, under transformers' names."""
    first = "(i g)" if own.interleaved else "(g i)"
    weight, up, down = ("E h {}", "E h i", "E i h") if own.transposed else ("E {} h", "E i h", "E h i")

    def with_axes(buffers: tuple[Buffer, ...], weight: str, bias: str) -> tuple[Buffer, ...]:
        return tuple(buffer._replace(axes=weight if buffer.is_weight else bias) for buffer in buffers)

    return Layout(
        with_axes(TRANSFORMERS.first, weight.format(first), f"E {first}"),
        with_axes(TRANSFORMERS.ungated, up, "E i"),
        with_axes(TRANSFORMERS.down, down, "E h"),
    )


def same_names(layout: Layout) -> list[str]:
    """Return the layouts with the same tensor names.

    Only a mark in the checkpoint or a model distinguishes them.
    """
    return [name for name, other in LAYOUTS.items() if other.names == layout.names]


def holds_experts(name: str, layout: Layout) -> bool:
    """Return whether ``name`` is a tensor of grouped experts in this layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and leaf_name in layout.names


def own_layout(modules: Iterable[ExpertLayout | None]) -> str | None:
    """Return the layout that transformers loads for a type with these experts modules, or None.

    The result is None if the modules differ or do not state their layout. It has transformers' own tensor names.
    """
    distinct = set(modules)
    if len(distinct) != 1 or (own := distinct.pop()) is None:
        return None
    return next((name for name in same_names(TRANSFORMERS) if LAYOUTS[name] == as_layout(own)), None)


def holds_grouped_experts(name: str) -> bool:
    """Return whether ``name`` is a tensor of grouped experts in any layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and any(leaf_name in layout.names for layout in LAYOUTS.values())


def is_weight(name: str) -> bool:
    """Return whether ``name`` is a weight of grouped experts in any layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and any(leaf_name in layout.weights for layout in LAYOUTS.values())


def layout_from_name(name: str) -> str | None:
    """Return the layout of a tensor of grouped experts if only one layout has its name, else None."""
    candidates = [key for key, layout in LAYOUTS.items() if holds_experts(name, layout)]
    return candidates[0] if len(candidates) == 1 else None


def layouts_with_names(names: Iterable[str]) -> list[str]:
    """Return the layouts that have all of these tensors of grouped experts, by their names only."""
    names = list(names)
    return [key for key, layout in LAYOUTS.items() if all(holds_experts(name, layout) for name in names)]


def has_no_gate(path: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether an experts module has only up and down weights, which agree on the intermediate size."""
    buffers = layout.buffers(gated=False)
    ungated = {buffer.name for buffer in buffers}
    if any(f"{path}.{buffer.name}" in shapes for buffer in layout.first if buffer.name not in ungated):
        return False
    sizes = [buffer.sizes(shapes.get(f"{path}.{buffer.name}", ())) for buffer in buffers if buffer.is_weight]
    up, down = (0 if size is None else size["i"] for size in sizes)
    return up == down > 0


def is_experts(path: str) -> bool:
    """Return whether ``path`` names a module of routed experts."""
    return path.rpartition(".")[2] == "experts"  # shared_experts are not routed
