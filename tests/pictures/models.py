"""Plans of models with many layers of experts, without files."""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import prod

from automodel_conv.planning.copies import Places, SourceTable, Target
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf
from tests.planning.plans import JOIN, MERGE

RULES = (
    "mlp.experts.*.gate_proj.weight + mlp.experts.*.up_proj.weight -> mlp.experts.gate_up_proj: merge, join",
    "mlp.experts.*.down_proj.weight -> mlp.experts.down_proj: merge",
)


def experts_model(layers: int, experts: int, intermediate: int, hidden: int, files: int = 4) -> CopyPlan:
    """Return the plan that merges the experts of each layer; each file holds the same number of tensors.

    The first tensor of the first file is read by no target.
    """
    shapes = {"unused": (3, 2)}
    parts = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.mlp.experts.{expert}.{part}.weight": shape
            for expert in range(experts)
            for part, shape in parts.items()
        }
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.input_layernorm.weight": (hidden,)}
    names = list(shapes)
    each = -(-len(names) // files)
    starts = [0, *itertools.accumulate(2 * prod(shape) for shape in shapes.values())]
    offsets = [starts[number] - starts[number - number % each] for number in range(len(names))]
    places = Places(
        tuple(f"/data/model-{file + 1:05d}-of-{files:05d}.safetensors" for file in range(files)),
        [number // each for number in range(len(names))],
        offsets,
    )
    sources = SourceTable(names, ["BF16"] * len(names), list(shapes.values()), places=places)
    row_of = {name: row for row, name in enumerate(names)}
    merged, joined = (_merged(experts, intermediate, hidden, count) for count in (1, 2))
    targets = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        rows = {p: [row_of[f"{prefix}.mlp.experts.{e}.{p}.weight"] for e in range(experts)] for p in parts}
        for rule, (name, (shape, copies), used) in enumerate(
            [("gate_up_proj", joined, ("gate_proj", "up_proj")), ("down_proj", merged, ("down_proj",))]
        ):
            sources_of = tuple(row for part in used for row in rows[part])
            targets.append(Target(f"{prefix}.mlp.experts.{name}", "BF16", shape, rule, sources_of, copies))
        for name in [f"self_attn.{name}_proj" for name in "qkvo"] + ["input_layernorm"]:
            targets.append(_as_is(sources, row_of[f"{prefix}.{name}.weight"]))
    return CopyPlan(sources, tuple(targets), rules=RULES)


def published_model(layers: int, experts: int, intermediate: int, hidden: int) -> CopyPlan:
    """Return the plan that keeps all tensors of such a model as they are, each under its own name."""
    sources = experts_model(layers, experts, intermediate, hidden).sources
    return CopyPlan(sources, tuple(_as_is(sources, row) for row in range(len(sources.names))))


def _merged(experts, intermediate, hidden, count):
    shape = (intermediate, hidden) if count == 2 else (hidden, intermediate)
    leaves = {f"p{i}": [leaf(i * experts + e, shape) for e in range(experts)] for i in range(count)}
    value = lower([MERGE, JOIN][:count], leaves, Context(tuple(leaves), ("out",), ()))["out"]
    return value.shape, copies_of(value)


@lru_cache
def _whole(shape):
    return copies_of(leaf(0, shape))


def _as_is(sources, row):
    shape = sources.shapes[row]
    return Target(sources.names[row], "BF16", shape, -1, (row,), _whole(shape))
