"""Named layouts of grouped experts: one entry of ``LAYOUTS`` each, and what names and shapes say of them; pure.

Only *routed experts* are concerned: tensors of a module called ``experts`` that hold all of them in one buffer.
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

    ``axes``, as in einops: E experts, g projections, i intermediate size, h hidden size. Parentheses make one dimension
    of g and another axis. ``projections`` are in their order along g.
    """

    name: str
    axes: str
    projections: tuple[str, ...]

    @property
    def is_weight(self) -> bool:
        """Whether the buffer holds weights, not biases."""
        return {"i", "h"} <= {axis for dim in dims_of(self.axes) for axis in dim}

    def sizes(self, shape: Sequence[int]) -> dict[str, int] | None:
        """The size of each axis; None for a shape that the buffer cannot have."""
        try:
            return sizes_of(dims_of(self.axes), shape, {"g": len(self.projections)})
        except ValueError:
            return None


@dataclass(frozen=True)
class Layout:
    """What the tensors of grouped experts are called, and how they lie in memory.

    ``first`` hold gate and up, in one buffer or in one each; ``ungated`` hold up, of experts without a gate. A weight
    comes before its bias.
    """

    first: tuple[Buffer, ...]
    ungated: tuple[Buffer, ...]
    down: tuple[Buffer, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Of weights and biases, with and without a gate."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down))

    @cached_property
    def weights(self) -> frozenset[str]:
        """The names of the weights."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down) if buffer.is_weight)

    @cached_property
    def axes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """How the buffers lie, whatever they are called."""
        return tuple((buffer.axes, buffer.projections) for buffer in (*self.first, *self.ungated, *self.down))

    @property
    def transposed(self) -> bool:
        """Whether weights are ``[E, in, out]``, not ``[E, out, in]``."""
        axes = [axis for dim in dims_of(self.down[0].axes) for axis in dim]
        return axes.index("i") < axes.index("h")

    def of(self, gated: bool) -> tuple[Buffer, ...]:
        """The buffers of experts with a gate, or without one."""
        return (*(self.first if gated else self.ungated), *self.down)

    def expected(self) -> list[str]:
        """The names of the weights of experts with a gate, in order, for errors."""
        return [buffer.name for buffer in self.of(True) if buffer.is_weight]

    def fits(self, shapes: Mapping[str, Sequence[int]], gated: bool = True) -> bool:
        """Whether these can be the weights of one module, all of them.

        Args:
            shapes: by the name of the tensor.
        """
        made: dict[str, int] = {}
        for buffer in self.of(gated):
            if buffer.is_weight:
                sizes = buffer.sizes(shapes.get(buffer.name, ()))
                if sizes is None or any(made.setdefault(axis, sizes[axis]) != sizes[axis] for axis in ("i", "h")):
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
"""Gate and up in one buffer each are two of ``first``, as ``Buffer("gate", "E i h", ("gate",))``; up before gate is
``("up", "gate")``."""

TRANSFORMERS = LAYOUTS["transformers"]
"""What rules of transformers make, unless the model says otherwise."""

PER_EXPERT = "per_expert"
"""As checkpoints of a type are published: most have one tensor for each expert and projection. No layout of buffers."""

SCALES = ("_scale_inv", "_scale")
"""What the scales of experts that are kept quantized are called after their names; they lie as these do.
Source: transformers 5.23.0, ``FP8Experts``; vLLM, ``Fp8MoEMethod``."""


class ExpertLayout(NamedTuple):
    """How one experts module stores its weights, in the words of transformers' ``use_experts_implementation``."""

    transposed: bool
    interleaved: bool
    gated: bool


def get_layout(name: str, *others: str) -> Layout:
    """The layout of that name.

    Args:
        others: what the caller takes besides, and is no layout of buffers.

    Raises:
        UnsupportedError: no such layout; lists those that the caller takes, and names one that is spelled alike.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    known = sorted([*LAYOUTS, *others])
    spelled = re.sub(r"\W+", "_", str(name).strip().lower())
    alike = difflib.get_close_matches(spelled, [*LAYOUTS, PER_EXPERT], 1)
    if alike == [PER_EXPERT] and PER_EXPERT not in others:
        do = 'single experts are written by {convert_checkpoint(..., layout="per_expert")}'
    else:
        do = f"write {alike[0]!r}" if alike else None
    raise UnsupportedError(message(f"unknown layout {name!r}", expected=f"one of {known}", do=do))


def as_layout(own: ExpertLayout) -> Layout:
    """A model's own way as a layout under transformers' names."""
    first = "(i g)" if own.interleaved else "(g i)"
    weight, up, down = ("E h {}", "E h i", "E i h") if own.transposed else ("E {} h", "E i h", "E h i")

    def lying(buffers: tuple[Buffer, ...], weight: str, bias: str) -> tuple[Buffer, ...]:
        return tuple(buffer._replace(axes=weight if buffer.is_weight else bias) for buffer in buffers)

    return Layout(
        lying(TRANSFORMERS.first, weight.format(first), f"E {first}"),
        lying(TRANSFORMERS.ungated, up, "E i"),
        lying(TRANSFORMERS.down, down, "E h"),
    )


def same_names(layout: Layout) -> list[str]:
    """The layouts with the same names of tensors; only a mark or a model tells them apart."""
    return [name for name, other in LAYOUTS.items() if other.names == layout.names]


def holds_experts(name: str, layout: Layout) -> bool:
    """True if ``name`` is a tensor of grouped experts in that layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and leaf_name in layout.names


def own_layout(modules: Iterable[ExpertLayout | None]) -> str | None:
    """The layout that transformers loads for a type with such experts; None if they do not say, or differ.

    Only layouts under transformers' own names can be it.
    """
    said = set(modules)
    if len(said) != 1 or (own := said.pop()) is None:
        return None
    return next((name for name in same_names(TRANSFORMERS) if LAYOUTS[name] == as_layout(own)), None)


def any_experts(name: str) -> bool:
    """True if ``name`` is a tensor of grouped experts in some layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and any(leaf_name in layout.names for layout in LAYOUTS.values())


def is_weight(name: str) -> bool:
    """True if ``name`` is a weight of grouped experts in some layout."""
    path, _, leaf_name = name.rpartition(".")
    return is_experts(path) and any(leaf_name in layout.weights for layout in LAYOUTS.values())


def layout_from_name(name: str) -> str | None:
    """The layout of a tensor of grouped experts whose name only one layout has; None for all other tensors."""
    found = [called for called, layout in LAYOUTS.items() if holds_experts(name, layout)]
    return found[0] if len(found) == 1 else None


def has_no_gate(path: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True if the weights of an experts module are up and down alone, which agree on the intermediate size."""
    alone = layout.of(gated=False)
    ungated = {buffer.name for buffer in alone}
    if any(f"{path}.{buffer.name}" in shapes for buffer in layout.first if buffer.name not in ungated):
        return False
    sizes = [buffer.sizes(shapes.get(f"{path}.{buffer.name}", ())) for buffer in alone if buffer.is_weight]
    up, down = (0 if size is None else size["i"] for size in sizes)
    return up == down > 0


def is_experts(path: str) -> bool:
    """True for the name of a module of routed experts."""
    return path.rpartition(".")[2] == "experts"  # not shared_experts, which are no routed ones
