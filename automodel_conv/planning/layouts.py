"""Named layouts of grouped experts, as data, and the plan that goes from one to another.

E experts, I intermediate size, H hidden size. A layout says which axis order the weights have, whether gate and up are
interleaved, and what the tensors are called; biases follow. Only *routed experts* are concerned: tensors of a module
called ``experts`` that hold all of them in one buffer. Everything else passes through.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import LoweringError, leaf


class ExpertLayout(NamedTuple):
    """How one experts module stores its weights, in the words of transformers' ``use_experts_implementation``."""

    transposed: bool
    interleaved: bool
    gated: bool


class Layout(NamedTuple):
    """How experts lie in memory.

    ``transposed``: weights are ``[E, in, out]``, not ``[E, out, in]``. ``interleaved``: gate and up alternate along the
    2I axis, gate first; otherwise gate comes before up as a whole. ``up`` and ``up_bias`` are the names for experts
    without a gate.
    """

    transposed: bool
    interleaved: bool
    gate_up: str
    up: str
    down: str
    gate_up_bias: str
    up_bias: str
    down_bias: str


LAYOUTS: Mapping[str, Layout] = {
    # transformers 5.x, `integrations/moe.py`: gate_up_proj [E, 2I, H], down_proj [E, H, I].
    "transformers": Layout(
        transposed=False,
        interleaved=False,
        gate_up="gate_up_proj",
        up="up_proj",
        down="down_proj",
        gate_up_bias="gate_up_proj_bias",
        up_bias="up_proj_bias",
        down_bias="down_proj_bias",
    ),
    # NeMo AutoModel 0.7.0, `components/moe/experts.py`: gate_and_up_projs [E, H, 2I], down_projs [E, I, H].
    "nemo": Layout(
        transposed=True,
        interleaved=False,
        gate_up="gate_and_up_projs",
        up="gate_and_up_projs",
        down="down_projs",
        gate_up_bias="gate_up_proj_bias",
        up_bias="gate_up_proj_bias",
        down_bias="down_proj_bias",
    ),
    # transformers 5.x, `models/gpt_oss`: gate_up_proj [E, H, 2I] with gate and up alternating, down_proj [E, I, H].
    "gpt_oss": Layout(
        transposed=True,
        interleaved=True,
        gate_up="gate_up_proj",
        up="up_proj",
        down="down_proj",
        gate_up_bias="gate_up_proj_bias",
        up_bias="up_proj_bias",
        down_bias="down_proj_bias",
    ),
    # vLLM, `FusedMoE`: w13_weight [E, 2I, H], w2_weight [E, H, I].
    "vllm": Layout(
        transposed=False,
        interleaved=False,
        gate_up="w13_weight",
        up="w13_weight",
        down="w2_weight",
        gate_up_bias="w13_bias",
        up_bias="w13_bias",
        down_bias="w2_bias",
    ),
}


PER_EXPERT = "per_expert"
"""As checkpoints of a type are published: most have one tensor for each expert and projection. No layout of buffers."""

SCALES = ("_scale_inv", "_scale")
"""What the scales of experts that are kept quantized are called after their names; they lie as these do.
Source: transformers 5.23.0, ``FP8Experts``; vLLM, ``Fp8MoEMethod``."""

_DO = "{dequantize=True} gives the numbers that they stand for"
_PACKED = frozenset({"F4", "U8", "I8", "I32"})  # several codes to an element, where the experts have scales


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
    return LAYOUTS["transformers"]._replace(transposed=own.transposed, interleaved=own.interleaved)


def holds_experts(name: str, layout: Layout) -> bool:
    """True if ``name`` is a tensor of grouped experts in that layout."""
    path, _, leaf_name = name.rpartition(".")
    return _is_experts(path) and leaf_name in layout[2:]


def own_layout(modules: Iterable[ExpertLayout | None]) -> str | None:
    """The layout that transformers loads for a type with such experts; None if they do not say, or differ.

    Only layouts under transformers' own names can be it.
    """
    said = set(modules)
    if len(said) != 1 or (own := said.pop()) is None:
        return None
    return next((name for name in ("transformers", "gpt_oss") if LAYOUTS[name] == as_layout(own)), None)


def any_experts(name: str) -> bool:
    """True if ``name`` is a tensor of grouped experts in some layout."""
    return _is_experts(name.rpartition(".")[0]) and any(holds_experts(name, layout) for layout in LAYOUTS.values())


def told_by_name(name: str) -> str | None:
    """The layout of a tensor of grouped experts whose name only one layout has; None for all other tensors."""
    found = [called for called, layout in LAYOUTS.items() if holds_experts(name, layout)]
    return found[0] if len(found) == 1 else None


def has_no_gate(path: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True if the weights of an experts module are up ``[E, I, H]`` and down ``[E, H, I]``, as the layout has them."""
    up, down = shapes.get(f"{path}.{layout.up}", ()), shapes.get(f"{path}.{layout.down}", ())
    if len(up) != 3 or len(down) != 3:
        return False
    rows, columns = (up[2], down[1]) if layout.transposed else (up[1], down[2])
    return rows == columns > 0


def _is_experts(path: str) -> bool:
    return path.rpartition(".")[2] == "experts"  # not shared_experts, which are no routed ones


def relayout(
    table: SourceTable,
    source: Callable[[str], Layout],
    target: Callable[[str], Layout],
    gated: Callable[[str], bool],
) -> CopyPlan:
    """The plan that lays all grouped experts of ``table`` out anew and passes everything else through, unless hidden.

    Args:
        source, target: the layout of an experts module, by the module's name.
        gated: whether such a module has a gate; asked only where a name leaves it open.

    Raises:
        UnsupportedError: an experts tensor of a rank the layout cannot have, or scales of blocks whose rows would have
            to alternate, or packed codes that would have to be moved apart.
    """
    scaled = {name[: name.rfind("experts") + len("experts")] for name in table.names if name.endswith(SCALES)}
    rules: dict[str, int] = {}
    shared: dict[object, tuple[tuple[int, ...], tuple[StridedCopy, ...]]] = {}
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if row in table.hidden:
            continue
        path, _, leaf_name = name.rpartition(".")
        chain, renamed, rule = (), name, -1
        if _is_experts(path):
            before, after = source(path), target(path)
            suffix = next((suffix for suffix in SCALES if leaf_name.endswith(suffix)), "")
            of = leaf_name.removesuffix(suffix)
            role = _role(of, before, gated(path))
            if role is not None:
                chain = _operations(role, before, after)
                if suffix and any(step.name == "Interleave" for step in chain):
                    raise UnsupportedError(message(f"{name}: gate and up that share a scale cannot alternate", do=_DO))
                if chain and not suffix and dtype in _PACKED and path in scaled:
                    text = f"{name}: packed codes cannot be laid out anew"
                    raise UnsupportedError(message(text, found=dtype, do=_DO))
                called = getattr(after, role) + suffix
                renamed = f"{path}.{called}"
                if chain or renamed != name:
                    steps = ", ".join(map(str, chain)) or "rename"
                    rule = rules.setdefault(f"experts.{leaf_name} -> experts.{called}: {steps}", len(rules))
        key = (chain, shape)
        if key not in shared:
            shared[key] = _lowered(name, shape, chain)
        made_shape, copies = shared[key]
        targets.append(Target(renamed, dtype, made_shape, rule, (row,), copies))
    plan = CopyPlan(table, tuple(targets), tuple(rules))
    plan.validate()
    return plan


def _role(leaf_name: str, layout: Layout, gated: bool) -> str | None:
    either = ("gate_up", "gate_up_bias"), ("up", "up_bias")
    first, second = either if gated else either[::-1]
    roles = (*first, *second, "down", "down_bias")
    return next((role for role in roles if leaf_name == getattr(layout, role)), None)


_SWAP = Operation("Transpose", (("dim0", 1), ("dim1", 2)))
_SEPARATE = Operation("Interleave", (("dim", 1), ("inverse", False)))
_ALTERNATE = Operation("Interleave", (("dim", 1), ("inverse", True)))


def _operations(role: str, before: Layout, after: Layout) -> tuple[Operation, ...]:
    """From one layout to the other by way of ``[E, 2I, H]`` / ``[E, H, I]``, without steps that undo each other."""
    is_weight = role in ("gate_up", "up", "down")
    alternates = role in ("gate_up", "gate_up_bias") and before.interleaved != after.interleaved
    swaps = is_weight and before.transposed != after.transposed
    chain: list[Operation] = []
    if alternates:
        around = is_weight and before.transposed
        step = _ALTERNATE if after.interleaved else _SEPARATE
        chain = [_SWAP, step] if around else [step]
        if is_weight and after.transposed:
            chain.append(_SWAP)
    elif swaps:
        chain = [_SWAP]
    return tuple(chain)


def _lowered(
    name: str, shape: tuple[int, ...], chain: tuple[Operation, ...]
) -> tuple[tuple[int, ...], tuple[StridedCopy, ...]]:
    try:
        value = lower(chain, {"x": [leaf(0, shape)]}, Context(("x",), ("x",), ()))["x"]
    except LoweringError as error:
        raise UnsupportedError(
            message(
                f"{name} does not have the shape that its layout says",
                found=f"{list(shape)}: {error}",
            )
        ) from None
    return value.shape, copies_of(value)
