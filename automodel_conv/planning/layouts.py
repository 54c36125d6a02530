"""Named layouts of grouped experts, and the functions that recognize them by names and shapes; pure.

Each layout is one entry of ``LAYOUTS``. Layouts concern only *routed experts*: tensors of a module named ``experts``
that hold all experts in one buffer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.buffers import Blocks, Buffer, Layout

GATE_UP = ("gate", "up")
UP_GATE = ("up", "gate")
UP = ("up",)
DOWN = ("down",)


# FlashInfer 0.7.2.post1, `get_shuffle_matrix_a_row_indices` in utils.py: row 4a + b of 32 rows becomes row 8b + a;
# `convert_to_block_layout` in fused_moe/core.py: blocks of 128 bytes of all rows follow each other.
_ROWS = Blocks("E (m a b) (n k)", "E n m b a k", (("a", 8), ("b", 4), ("k", 64)))
# `get_reorder_rows_for_gated_act_gemm_row_indices` there lets up and gate alternate first, so that b is (c g).
_PAIRS_OF_ROWS = Blocks("E g (m a c) (n k)", "E n m c g a k", (("a", 8), ("c", 2), ("k", 64)))


def _trtllm(pads: bool) -> Layout:
    """Return the layout of FlashInfer's TRT-LLM kernel, without biases, with the intermediate size padded or not."""
    padded, multiples = ((("i", 128),), (("h", 64),)) if pads else ((), (("i", 128), ("h", 64)))

    def weight(name: str, axes: str, projections: tuple[str, ...], blocks: Blocks) -> tuple[Buffer]:
        return (Buffer(name, axes, projections, blocks, multiples, padded, dtypes=("BF16",)),)

    return Layout(
        first=weight("w13_weight", "E (g i) h", UP_GATE, _PAIRS_OF_ROWS),
        ungated=weight("w13_weight", "E i h", UP, _ROWS),
        down=weight("w2_weight", "E h i", DOWN, _ROWS),
    )


def _padded(layout: Layout, dtypes: tuple[str, ...], *padded: tuple[str, int]) -> Layout:
    """Return a layout with axes padded in all buffers that have them."""

    def pad(buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        return tuple(
            buffer._replace(padded=tuple(p for p in padded if p[0] in buffer.flat_axes), dtypes=dtypes)
            for buffer in buffers
        )

    return Layout(pad(layout.first), pad(layout.ungated), pad(layout.down))


# vLLM, `FusedMoE`: w13_weight [E, 2I, H], w2_weight [E, H, I].
_VLLM = Layout(
    first=(Buffer("w13_weight", "E (g i) h", GATE_UP), Buffer("w13_bias", "E (g i)", GATE_UP)),
    ungated=(Buffer("w13_weight", "E i h", UP), Buffer("w13_bias", "E i", UP)),
    down=(Buffer("w2_weight", "E h i", DOWN), Buffer("w2_bias", "E h", DOWN)),
)

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
    "vllm": _VLLM,
    # vLLM 0.33.0, `swap_w13_to_w31` in quantization/utils/flashinfer_utils.py, for FlashInfer's CUTLASS kernels; of
    # biases, `convert_weight_to_mxfp4_moe_kernel_format` in fused_moe/oracle/mxfp4.py.
    "vllm_w31": Layout(
        first=(Buffer("w13_weight", "E (g i) h", UP_GATE), Buffer("w13_bias", "E (g i)", UP_GATE)),
        ungated=_VLLM.ungated,
        down=_VLLM.down,
    ),
    # vLLM 0.33.0, `convert_moe_weights_to_flashinfer_trtllm_block_layout` in quantization/utils/flashinfer_utils.py,
    # whose parameters keep the shapes of "vllm"; 128 is the multiple of `convert_to_unquantized_kernel_format` in
    # fused_moe/oracle/unquantized.py, which pads to it, and 64 elements are the blocks of 128 bytes.
    "vllm_trtllm": _trtllm(pads=False),
    "vllm_trtllm_padded": _trtllm(pads=True),
    # vLLM 0.33.0, `DeepEPHTPrepareAndFinalize.maybe_roundup_layer_hidden_size`: rows of a multiple of 512 bytes.
    "vllm_deepep": _padded(_VLLM, ("BF16", "F16"), ("h", 256)),
}
"""All layouts by name.

If gate and up have a buffer each, ``first`` holds both, as in ``Buffer("gate", "E i h", ("gate",))``. If up comes
before gate, the projections are ``("up", "gate")``. Of layouts with the same names, the first is the one that loaders
fill; engines make the others of it for their kernels."""

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
    if isinstance(name, str) and name in LAYOUTS:
        return LAYOUTS[name]
    known = sorted([*LAYOUTS, *others])
    normalized = re.sub(r"\W+", "_", str(name).strip().lower())
    similar = difflib.get_close_matches(normalized, [*LAYOUTS, PER_EXPERT], 1)
    if similar == [PER_EXPERT] and PER_EXPERT not in others:
        do = '{convert_checkpoint(..., layout="per_expert")} writes single experts'
    else:
        do = f"write {similar[0]!r}" if similar else None
    raise UnsupportedError(message(f"unknown layout {name!r}", expected=", ".join(known), do=do))


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


def layouts_that_pad(buffer: Buffer, axis: str) -> list[str]:
    """Return the layouts with a buffer that is arranged as this one, and that pads an axis."""

    def pads(other: Buffer) -> bool:
        is_same = other[:4] == buffer[:4] and other.dtypes == buffer.dtypes
        return is_same and axis in dict(other.padded)

    return [name for name, layout in LAYOUTS.items() if any(map(pads, (*layout.first, *layout.ungated, *layout.down)))]


def layouts_without_padding(buffer: Buffer) -> list[str]:
    """Return the layouts with a buffer that is arranged as this one, but without padding."""
    return [
        name
        for name, layout in LAYOUTS.items()
        if any(other[:4] == buffer[:4] and not other.padded for other in (*layout.first, *layout.ungated, *layout.down))
    ]


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


def has_other_names(name: str) -> bool:
    """Return whether ``name`` is a tensor of grouped experts under a name that transformers' own models do not have."""
    return holds_grouped_experts(name) and not holds_experts(name, TRANSFORMERS)


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
