"""A case for every operation: sources, attributes, and the result by loops over coordinates."""

from math import prod
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st

from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context
from automodel_conv.planning.values import leaf
from tests.planning import oracles
from tests.planning.oracles import Cells, cells, flat

SEEDS = st.integers(0, 2**32)
HEADS = 2
TARGET = "model.result"


class Case(NamedTuple):
    """One operation with its inputs, and the result by loops: key -> cells."""

    arguments: dict[str, Any]  # arguments of transformers' constructor
    options: dict[str, Any]  # attributes of our operation
    sources: list[str]
    targets: list[str]
    inputs: dict[str, list[Cells]]
    expected: dict[str, Cells]
    shapes: tuple[tuple[int, ...], ...] = ()
    config: dict[str, Any] = {}  # noqa: RUF012


def shape_of(rng, rank, sizes=(0, 1, 1, 2, 3, 4, 5)):
    return tuple(rng.choice(sizes) for _ in range(rank))


def numbered(shapes_by_pattern):
    """Return tensors whose elements are all different, as a list for each pattern."""
    start, inputs = 0, {}
    for pattern, shapes in shapes_by_pattern.items():
        inputs[pattern] = []
        for shape in shapes:
            inputs[pattern].append(cells(shape, start))
            start += prod(shape)
    return inputs


def one(shape, source="a"):
    return numbered({source: [shape]})


def simple(rng, arguments, tensor_inputs, expected, **more):
    return Case(arguments, arguments, ["a"], [TARGET], tensor_inputs, {TARGET: expected}, **more)


def merge(rng):
    shape, count = shape_of(rng, rng.randint(0, 3)), rng.randint(1, 4)
    dim = rng.randint(-len(shape) - 1, len(shape))
    sources = ["a.*.x", "b.*.x"][: rng.randint(1, 2)]
    inputs = numbered({s: [shape] * count for s in sources})
    merged = {s: oracles.stacked(parts, dim) for s, parts in inputs.items()}
    expected = merged if len(sources) > 1 else {TARGET: merged[sources[0]]}
    return Case({"dim": dim}, {"dim": dim}, sources, [TARGET], inputs, expected)


def split_modulelist(rng):
    shape = shape_of(rng, rng.randint(1, 3), (1, 2, 3, 4))
    dim = rng.randrange(len(shape))
    sources = ["a.*.x", "b.*.x"][: rng.randint(1, 2)]
    inputs = numbered({s: [shape] for s in sources})
    expected = {}
    for source, (tensor,) in inputs.items():
        name = source if len(sources) > 1 else f"{TARGET}.*.y"
        for i, part in enumerate(oracles.unstacked(tensor, dim)):
            expected[name.replace("*", str(i))] = part
    return Case({"dim": dim}, {"dim": dim}, sources, [f"{TARGET}.*.y"], inputs, expected)


def concatenate(rng):
    shape = shape_of(rng, rng.randint(1, 3))
    dim = rng.randint(-len(shape), len(shape) - 1)
    at = dim % len(shape)
    sources = ["c", "a", "b"][: rng.randint(1, 3)]
    widths = (0, 1, 2, 3, 5)
    inputs = numbered(
        {s: [(*shape[:at], rng.choice(widths), *shape[at + 1 :]) for _ in range(rng.randint(1, 2))] for s in sources}
    )
    parts = [part for s in sources for part in inputs[s]]
    shuffled = dict(rng.sample(list(inputs.items()), len(inputs)))
    expected = {TARGET: oracles.joined(parts, dim)}
    return Case({"dim": dim}, {"dim": dim}, sources, [TARGET], shuffled, expected)


def chunk(rng):
    shape = shape_of(rng, rng.randint(1, 3), (0, 1, 2, 3, 4, 5, 6, 7, 12))
    dim = rng.randint(-len(shape), len(shape) - 1)
    if rng.random() < 0.3:
        count = rng.randint(1, 4)
        targets, names = [f"{TARGET}.*"], [f"{TARGET}.{i}" for i in range(count)]
        arguments = {"dim": dim, "num_shards_attribute": "shards"}
        options, config = {"dim": dim, "num_shards": count}, {"shards": count}
    else:
        targets = names = ["q", "k", "v", "o"][: rng.randint(2, 4)]
        arguments = options = {"dim": dim}
        config = {}
    inputs = one(shape)
    expected = dict(zip(names, oracles.chunked(inputs["a"][0], len(names), dim), strict=False))
    return Case(arguments, options, ["a"], targets, inputs, expected, config=config)


def split(rng):
    shape = shape_of(rng, rng.randint(1, 3))
    dim = rng.randint(-len(shape), len(shape) - 1)
    at = dim % len(shape)
    sizes = [rng.randint(0, 4) for _ in range(rng.randint(2, 3))]
    targets = [f"{TARGET}.{i}" for i in range(len(sizes))]
    shapes = tuple((*shape[:at], size, *shape[at + 1 :]) for size in sizes)
    inputs = one((*shape[:at], sum(sizes), *shape[at + 1 :]))
    expected = dict(zip(targets, oracles.cut(inputs["a"][0], dim, sizes), strict=True))
    return Case({"dim": dim}, {"dim": dim}, ["a"], targets, inputs, expected, shapes)


def transpose(rng):
    shape = shape_of(rng, rng.randint(2, 4))
    dims = [rng.randint(-len(shape), len(shape) - 1) for _ in range(2)]
    inputs = one(shape)
    arguments = {"dim0": dims[0], "dim1": dims[1]}
    expected = oracles.transposed(inputs["a"][0], *dims)
    shapes = ()
    if rng.random() < 0.5:
        arguments["check_dims"] = True
        wanted = rng.choice([shape, expected.shape])
        shapes = (wanted,)
        if wanted == shape:
            expected = inputs["a"][0]
    if rng.random() < 0.3:  # first in a chain: the key is that of the source
        targets = [TARGET, f"{TARGET}.2"]
        return Case(arguments, arguments, ["a"], targets, inputs, {"a": expected}, shapes)
    return simple(rng, arguments, inputs, expected, shapes=shapes)


def interleave(rng):
    shape = list(shape_of(rng, rng.randint(1, 3)))
    dim = rng.randrange(len(shape))
    shape[dim] = rng.choice((0, 2, 4, 6, 10))
    inverse = rng.random() < 0.5
    inputs = one(shape)
    turn = oracles.alternated if inverse else oracles.separated
    arguments = {"dim": dim, "inverse": inverse}
    return simple(rng, arguments, inputs, turn(inputs["a"][0], dim))


def rope_arguments(rng, inverse):
    names = rng.choice([("q", "k"), ("q",)])
    arguments = {"permute_layer_names": list(names), "inverse": inverse}
    options = {"permute_layer_names": names, "inverse": inverse, "heads": HEADS}
    return arguments, options, names


def permute_for_rope(rng):
    inverse = rng.random() < 0.5
    arguments, options, names = rope_arguments(rng, inverse)
    arguments["subconfig_key"] = rng.choice(["vision_config", None])
    shape = (HEADS * 2 * rng.randint(1, 3), *shape_of(rng, rng.randint(0, 1), (1, 2, 3)))
    if rng.random() < 0.3:
        arguments["permute_layer_names"] = options["permute_layer_names"] = None
        names = ("",)
    sources = ["q.w", "k.w", "v.w"]
    inputs = numbered({s: [shape] for s in sources})
    expected = {s: oracles.rope(t, HEADS, inverse) if any(n in s for n in names) else t for s, (t,) in inputs.items()}
    return Case(arguments, options, sources, [TARGET], inputs, expected)


def vision_fuse(rng):
    inverse = rng.random() < 0.5
    arguments, options, names = rope_arguments(rng, inverse)
    shape = (HEADS * 2 * rng.randint(1, 3), rng.randint(1, 3))
    sources = ["q.w", "k.w", "v.w"]
    inputs = numbered({s: [shape] for s in sources})
    parts = [oracles.rope(t, HEADS, inverse) if any(n in s for n in names) else t for s, (t,) in inputs.items()]
    dim = rng.choice((0, 1))
    expected = {TARGET: oracles.joined(parts, dim)}
    return Case(arguments | {"dim": dim}, options | {"dim": dim}, sources, [TARGET], inputs, expected)


def vision_unfuse(rng):
    inverse = rng.random() < 0.5
    arguments, options, names = rope_arguments(rng, inverse)
    shape = (3 * HEADS * 2 * rng.randint(1, 3), rng.randint(1, 3))
    targets = ["q.w", "k.w", "v.w"]
    inputs = one(shape)
    expected = {
        t: oracles.rope(part, HEADS, inverse) if any(n in t for n in names) else part
        for t, part in zip(targets, oracles.chunked(inputs["a"][0], 3, 0), strict=True)
    }
    return Case(arguments | {"dim": 0}, options | {"dim": 0}, ["a"], targets, inputs, expected)


def conv3d_to_linear(rng):
    shape = shape_of(rng, rng.choice((2, 5)), (1, 2, 3))
    inputs = one(shape)
    expected = oracles.reshaped(inputs["a"][0], (shape[0], prod(shape[1:])))
    arguments = {"in_channels": 3, "kernel_size": (2, 2, 2)}
    return Case(arguments, {}, ["a"], [TARGET], inputs, {TARGET: expected})


def linear_to_conv3d(rng):
    channels, *kernel = shape_of(rng, 4, (1, 2, 3))
    rows = rng.randint(1, 3)
    inputs = one((rows, channels * prod(kernel)))
    arguments = {"in_channels": channels, "kernel_size": tuple(kernel)}
    expected = oracles.reshaped(inputs["a"][0], (rows, channels, *kernel))
    return simple(rng, arguments, inputs, expected)


def ernie_fuse(rng):
    shape = shape_of(rng, 2)
    groups, count = rng.randint(1, 3), rng.choice((3, 4, 5, 6))
    if groups == 3:
        count = rng.choice((3, 5, 6))  # four in three groups would leave one group empty
    sources = ["a.*.x", "b.*.x"][: rng.randint(1, 2)]
    targets = [f"{TARGET}.{g}" for g in range(groups)]
    inputs = numbered({s: [shape] * count for s in sources})
    fused = oracles.ernie_fused(list(inputs.values()), groups, 0, 1)
    arguments = {"stack_dim": 0, "concat_dim": 1}
    return Case(arguments, arguments, sources, targets, inputs, dict(zip(targets, fused, strict=True)))


def ernie_split(rng):
    groups = rng.randint(1, 3)
    shape = (rng.randint(1, 3), groups * rng.randint(1, 3), rng.randint(1, 3))
    sources = ["a", "b"][: rng.randint(1, 2)]
    targets = [f"{TARGET}.{g}.*.x" for g in range(groups)]
    inputs = numbered({s: [shape] for s in sources})
    split_parts = oracles.ernie_split([t for (t,) in inputs.values()], groups, 0, 1)
    expected = {
        target.replace("*", str(i)): part
        for target, parts in zip(targets, split_parts, strict=True)
        for i, part in enumerate(parts)
    }
    arguments = {"stack_dim": 0, "concat_dim": 1}
    return Case(arguments, arguments, sources, targets, inputs, expected)


def unpad_vocab(rng):
    rows, missing = rng.randint(1, 4), rng.randint(0, 3)
    rest = shape_of(rng, rng.randint(0, 2), (0, 1, 2, 3))
    config = {"vocab_size": rows + missing, "unpadded_vocab_size": rows}
    if rng.random() < 0.5:
        options = {"inverse": True, "rows": rows + missing}
        tensor = cells((rows, *rest), 1)
        expected = oracles.joined([tensor, oracles.zeros((missing, *rest))], 0)
    else:
        options = {"inverse": False, "rows": rows}
        tensor = cells((rng.choice((rows - 1, rows, rows + missing)), *rest), 1)
        kept = min(rows, tensor.shape[0])
        expected = oracles.cut(tensor, 0, [kept, tensor.shape[0] - kept])[0]
    arguments = {"inverse": options["inverse"]}
    shapes = (expected.shape,)
    return Case(arguments, options, ["a"], [TARGET], {"a": [tensor]}, {TARGET: expected}, shapes, config)


def merge_message_queries(rng):
    layers = rng.randint(0, 4)
    rest = shape_of(rng, rng.randint(0, 2), (0, 1, 2, 3))
    merged = cells((layers, 4, *rest))
    query, key, value, mlp = oracles.unstacked(merged, 1)
    pairs = ((query, mlp), (key, value))
    parts = [oracles.reshaped(oracles.stacked(pair, 1), (2 * layers, *rest)) for pair in pairs]
    names = ["queries", "kv_queries"]
    if rng.random() < 0.5:
        expected = dict(zip(names, parts, strict=True))
        return Case({"inverse": True}, {"inverse": True}, ["a"], names, {"a": [merged]}, expected)
    inputs = {name: [part] for name, part in zip(names, parts, strict=True)}
    shuffled = dict(rng.sample(list(inputs.items()), 2))
    return Case({"inverse": False}, {"inverse": False}, names, [TARGET], shuffled, {TARGET: merged})


def dequantize_experts(rng):
    inputs = one(shape_of(rng, 3))
    targets = [f"{TARGET}.{part}" for part in ("weight", "scale")[: rng.randint(1, 2)]]
    return Case({}, {}, ["a"], targets, inputs, {targets[0]: inputs["a"][0]})


def identity(rng):
    inputs = one(shape_of(rng, 2), TARGET)
    return Case({}, {}, [TARGET], [TARGET], inputs, {TARGET: inputs[TARGET][0]})


CASES = {
    "MergeModulelist": merge,
    "SplitModulelist": split_modulelist,
    "Concatenate": concatenate,
    "Chunk": chunk,
    "Split": split,
    "Transpose": transpose,
    "Interleave": interleave,
    "PermuteForRope": permute_for_rope,
    "Conv3dToLinear": conv3d_to_linear,
    "LinearToConv3d": linear_to_conv3d,
    "ErnieFuseAndSplitTextVisionExperts": ernie_fuse,
    "ErnieSplitAndDecoupleTextVisionExperts": ernie_split,
    "VisionFuseAndPermuteForRope": vision_fuse,
    "VisionUnfuseAndPermuteForRope": vision_unfuse,
    "Inkling2UnpadVocab": unpad_vocab,
    "Inkling2LoopMergeMessageQueries": merge_message_queries,
    "Inkling2LoopDequantizeExperts": dequantize_experts,
    "_IdentityOp": identity,
}

each_operation = pytest.mark.parametrize("name", CASES)


def lowered(operations, case):
    """Return key -> (shape, elements) of our pieces, executed one element at a time."""
    ordinal, leaves, elements = 0, {}, []
    for pattern, tensors in case.inputs.items():
        leaves[pattern] = []
        for tensor in tensors:
            leaves[pattern].append(leaf(ordinal, tensor.shape))
            elements.append(flat(tensor))
            ordinal += 1
    values = lower(operations, leaves, Context(tuple(case.sources), tuple(case.targets), case.shapes))
    results = {}
    for key, value in values.items():
        target = oracles.written(piece for copy in copies_of(value) for piece in copy.pieces())
        zeros = [0] * (value.zero_rows * prod(value.shape[1:]))
        assert sorted(target) == list(range(prod(value.shape) - len(zeros))), key
        results[key] = (value.shape, [elements[s][e] for _, (s, e) in sorted(target.items())] + zeros)
    return results
