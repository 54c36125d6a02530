"""Every operation against loops over coordinates, and against transformers' own ``convert``; addressed elements."""

import random
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_conv.planning import values
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.lowering import copies_of, lower, needs_target_shapes
from automodel_conv.planning.operations import OPERATIONS, Context, NotLowerable, Operation
from automodel_conv.planning.values import LoweringError, leaf
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles
from tests.planning.oracles import Cells, cells, flat

SEEDS = st.integers(0, 2**32)
HEADS = 2
TARGET = "model.made"


class Case(NamedTuple):
    """One operation with its inputs, and the answer by loops: key -> cells."""

    arguments: dict[str, Any]  # of transformers' constructor
    options: dict[str, Any]  # of ours
    sources: list[str]
    targets: list[str]
    inputs: dict[str, list[Cells]]
    expected: dict[str, Cells]
    shapes: tuple[tuple[int, ...], ...] = ()
    config: dict[str, Any] = {}  # noqa: RUF012


def shape_of(rng, rank, sizes=(0, 1, 1, 2, 3, 4, 5)):
    return tuple(rng.choice(sizes) for _ in range(rank))


def numbered(shapes_by_pattern):
    """Tensors with all elements different, as a list for each pattern."""
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
    made = {s: oracles.stacked(parts, dim) for s, parts in inputs.items()}
    expected = made if len(sources) > 1 else {TARGET: made[sources[0]]}
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
    if rng.random() < 0.3:  # first of a chain: the key stays the source's
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
        count = rng.choice((3, 5, 6))  # four in three groups leave one group empty
    sources = ["a.*.x", "b.*.x"][: rng.randint(1, 2)]
    targets = [f"{TARGET}.{g}" for g in range(groups)]
    inputs = numbered({s: [shape] * count for s in sources})
    made = oracles.ernie_fused(list(inputs.values()), groups, 0, 1)
    arguments = {"stack_dim": 0, "concat_dim": 1}
    return Case(arguments, arguments, sources, targets, inputs, dict(zip(targets, made, strict=True)))


def ernie_split(rng):
    groups = rng.randint(1, 3)
    shape = (rng.randint(1, 3), groups * rng.randint(1, 3), rng.randint(1, 3))
    sources = ["a", "b"][: rng.randint(1, 2)]
    targets = [f"{TARGET}.{g}.*.x" for g in range(groups)]
    inputs = numbered({s: [shape] for s in sources})
    made = oracles.ernie_split([t for (t,) in inputs.values()], groups, 0, 1)
    expected = {
        target.replace("*", str(i)): part
        for target, parts in zip(targets, made, strict=True)
        for i, part in enumerate(parts)
    }
    arguments = {"stack_dim": 0, "concat_dim": 1}
    return Case(arguments, arguments, sources, targets, inputs, expected)


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
    "_IdentityOp": identity,
}
each_operation = pytest.mark.parametrize("name", CASES)


def test_every_operation_has_a_case():
    assert CASES.keys() == OPERATIONS.keys()


def lowered(operations, case):
    """Key -> (shape, elements) by our pieces, executed one element at a time."""
    ordinal, leaves, elements = 0, {}, []
    for pattern, tensors in case.inputs.items():
        leaves[pattern] = []
        for tensor in tensors:
            leaves[pattern].append(leaf(ordinal, tensor.shape))
            elements.append(flat(tensor))
            ordinal += 1
    values = lower(operations, leaves, Context(tuple(case.sources), tuple(case.targets), case.shapes))
    made = {}
    for key, value in values.items():
        target = oracles.written(piece for copy in copies_of(value) for piece in copy.pieces())
        assert sorted(target) == list(range(prod(value.shape))), key
        made[key] = (value.shape, [elements[s][e] for _, (s, e) in sorted(target.items())])
    return made


def answer(case):
    return {key: (tensor.shape, flat(tensor)) for key, tensor in case.expected.items()}


@each_operation
@settings(max_examples=40)
@given(seed=SEEDS)
def test_operation_equals_loops_over_coordinates(name, seed):
    case = CASES[name](random.Random(seed))
    operation = Operation(name, tuple(sorted(case.options.items())))
    assert lowered([operation], case) == answer(case)


# --- against the installed transformers -----------------------------------------------------------


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


def model_with(shapes, **config):
    """As much of a model as operations look at."""
    return SimpleNamespace(
        config=Config(num_attention_heads=HEADS, **config),
        get_parameter=lambda name: torch.empty(shapes[name], device="meta"),
    )


def tensor_of(tensor):
    return torch.tensor(flat(tensor), dtype=torch.int64).reshape(tensor.shape)


def found(tensors):
    return {key: (tuple(t.shape), t.reshape(-1).tolist()) for key, t in tensors.items()}


def squeezes_all_dims(core):
    chunks = {"a": torch.zeros(2, 1)}
    return core.SplitModulelist(0).convert(chunks, ["a"], ["a.*"])["a.0"].dim() == 0


@each_operation
@settings(max_examples=25)
@given(seed=SEEDS)
def test_operation_equals_upstream(name, seed):
    core = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(core, name):
        pytest.skip(f"this transformers has no {name}")
    case = CASES[name](random.Random(seed))
    try:
        operation = getattr(core, name)(**case.arguments)
    except TypeError:
        return  # an option that this transformers does not have
    shapes = dict(zip(case.targets, case.shapes, strict=False))
    model = model_with(shapes, **case.config)
    inputs = {p: [tensor_of(t) for t in tensors] for p, tensors in case.inputs.items()}
    try:
        made = operation.convert(
            inputs,
            source_patterns=case.sources,
            target_patterns=case.targets,
            full_layer_name=case.targets[0],
            model=model,
            config=model.config,
        )
    except (ValueError, TypeError, AttributeError) as error:
        older = (name == "Chunk" and "Failed to convert" in str(error)) or (
            name == "PermuteForRope" and case.options["permute_layer_names"] is None
        )
        if not older:
            raise
        return  # what an older transformers cannot do
    made = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
    converter = core.WeightConverter(case.sources, case.targets, operations=[operation])
    ours = lowered(RuleSet([converter], model).operations(0), case)
    if name == "SplitModulelist" and squeezes_all_dims(core):
        ours = {k: (tuple(n for n in shape if n != 1), e) for k, (shape, e) in ours.items()}
        made = {k: t.squeeze() for k, t in made.items()}
    assert ours == found(made)


def registered_chains():
    """One rule for each distinct chain of operations of the installed registry."""
    try:
        rules = oracles.registry()
    except ModuleNotFoundError:
        return []
    chains = {}
    for model_type, entry in rules.items():
        for rule in entry:
            if hasattr(rule, "operations"):
                texts = [f"{type(op).__name__}{vars(op)}" for op in rule.operations]
                key = (*texts, len(rule.source_patterns), len(rule.target_patterns))
                chains.setdefault(key, (model_type, rule))
    return [
        pytest.param(rule, id=f"{model_type}-{'-'.join(type(op).__name__ for op in rule.operations)}")
        for model_type, rule in chains.values()
    ]


def example_names(rule, count):
    """Source names of one target of a rule: ``count`` for each pattern that stands for many."""
    names = []
    for pattern in rule.source_patterns:
        glob = pattern.replace(r"\.", ".").replace(".*.", ".*").replace("*.", "*")
        for i in range(count) if "*" in glob else (0,):
            regex = next(
                branch
                for branch in rule.compiled_sources.pattern.split("|(?P<")
                if branch.removeprefix("(?P<").startswith(f"g{rule.source_patterns.index(pattern)}>")
            )
            regex = regex.removeprefix("(?P<").split(">", 1)[1].removesuffix(")")
            name = oracles.example(regex, i)
            names.append(name if regex.startswith("^") else f"model.layers.7.{name.lstrip('.')}")
    return names


def source_shape(rule):
    """A shape that every operation of the chain can take."""
    operations = [(type(op).__name__, vars(op)) for op in rule.operations]
    if operations[0][0] in ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts"):
        return (4, 6)
    dims = [v for _, o in operations for k, v in o.items() if k in ("dim", "dim0", "dim1")]
    if any(n == "PermuteForRope" for n, _ in operations):
        return (24, 5)
    return (24, 12, 8)[: max(2, *(d + 1 for d in dims))]


def plan_values(rule, tensors, model, shapes, reverse=False):
    names = list(tensors)
    table = SourceTable(names, ["I64"] * len(names), [tuple(t.shape) for t in tensors.values()])
    rules = RuleSet([rule], model, reverse=reverse)
    plan, problems = compile_targets(table, rules, None, parameters=shapes)
    problems.raise_unless_fit("test")
    elements = {name: t.reshape(-1).tolist() for name, t in tensors.items()}
    made = oracles.execute(plan, elements)
    return {t.name: (t.shape, made[t.name]) for t in plan.targets}


@pytest.mark.parametrize("rule", registered_chains())
@pytest.mark.parametrize("transposed", [False, True], ids=["as wanted", "transposed"])
def test_registered_chain_equals_upstream_both_ways(rule, transposed):
    names, shape = example_names(rule, 4), source_shape(rule)
    tensors, start = {}, 0
    for name in names:
        tensors[name] = torch.arange(start, start + prod(shape)).reshape(shape)
        start += prod(shape)
    mapped, _ = oracles.upstream_mapping(names, [rule], None)
    assert len(mapped) == 1, mapped.keys()
    first = next(iter(mapped))
    targets = [first.replace(rule.target_patterns[0], pattern) for pattern in rule.target_patterns]
    shapes = {target: shape for target in targets}
    for op in rule.operations:
        if type(op).__name__ == "Split":
            sizes = [shape[op.dim] // 2, *[shape[op.dim] // 4] * (len(targets) - 1)]
            for target, size in zip(targets, sizes, strict=True):
                shapes[target] = (*shape[: op.dim], size, *shape[op.dim + 1 :])
        if type(op).__name__ == "Transpose" and transposed:
            stored_transposed = list(shape)
            stored_transposed[op.dim0], stored_transposed[op.dim1] = shape[op.dim1], shape[op.dim0]
            shapes = {target: tuple(stored_transposed) for target in targets}
    shards = {
        op.num_shards_attribute: len(names) for op in rule.operations if getattr(op, "num_shards_attribute", None)
    }
    model = model_with(shapes, **shards)
    expected = oracles.upstream_values([rule], tensors, model)
    assert plan_values(rule, tensors, model, shapes) == found(expected)

    try:
        back = rule.reverse_transform()
    except NotImplementedError:
        return  # this transformers cannot go back here either
    grouped = {name: tensor.contiguous() for name, tensor in expected.items()}
    restored = oracles.upstream_values([back], grouped, model_with({n: t.shape for n, t in tensors.items()}, **shards))
    ours = plan_values(rule, grouped, model, {n: tuple(t.shape) for n, t in tensors.items()}, reverse=True)
    assert ours == found(restored)


def test_registry_has_chains():
    pytest.importorskip("transformers")
    assert len(registered_chains()) >= 8


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "shapes", "text"),
    [
        (Operation("MergeModulelist", (("dim", 0),)), [(2, 3), (2, 4)], "cannot join"),
        (Operation("Concatenate", (("dim", 1),)), [(2, 3), (3, 3)], "cannot join"),
        (Operation("Concatenate", (("dim", 2),)), [(2, 3)], "no dimension 2"),
        (Operation("Transpose", (("dim0", 0), ("dim1", 2))), [(2, 3)], "no dimension 2"),
        (Operation("Interleave", (("dim", 0),)), [(3, 2)], "cannot reshape"),
        (Operation("PermuteForRope", (("heads", 4),)), [(6, 2)], "cannot reshape"),
        (Operation("Split", (("dim", 0),)), [(5,)], "cannot split"),
        (Operation("Conv3dToLinear"), [(2, 3, 4)], "5-D or 2-D"),
        (Operation("MergeModulelist", (("dim", 0),)), [(2, 3), (2, 3), (3, 2)], "cannot join"),
        (
            Operation("LinearToConv3d", (("in_channels", 2), ("kernel_size", (2, 2, 2)))),
            [(3, 15)],
            "cannot reshape",
        ),
    ],
    ids=str,
)
def test_sources_that_do_not_fit_are_named_with_the_operation(operation, shapes, text):
    inputs = {"a": [leaf(i, shape) for i, shape in enumerate(shapes)]}
    context = Context(("a",), ("m",), ((2,), (2,)))
    with pytest.raises(LoweringError, match=text) as error:
        lower([operation], inputs, context)
    assert operation.name in str(error.value)


def test_ernie_split_of_too_few_is_named():
    operation = Operation("ErnieSplitAndDecoupleTextVisionExperts", (("concat_dim", 1), ("stack_dim", 0)))
    with pytest.raises(LoweringError, match=r"Ernie.*cannot be shared out to 2"):
        lower([operation], {"a": [leaf(0, (2, 1, 3))]}, Context(("a",), ("m.*", "n.*"), ()))


def test_chains_that_ask_for_shapes_say_so():
    assert needs_target_shapes([Operation("Split", (("dim", 0),))])
    assert needs_target_shapes([Operation("Transpose", (("check_dims", True),))])
    assert not needs_target_shapes([Operation("Transpose", (("check_dims", False),))])
    assert not needs_target_shapes([])


def test_operations_without_a_config_are_not_guessed():
    core = pytest.importorskip("transformers.core_model_loading")
    try:
        operation = core.PermuteForRope(permute_layer_names=["q"])
    except TypeError:
        operation = core.PermuteForRope()
    rule = core.WeightConverter("a", "b", operations=[operation])
    with pytest.raises(NotLowerable, match="PermuteForRope"):
        RuleSet([rule]).operations(0)


def test_tensors_of_other_ranks_are_not_joined():
    with pytest.raises(LoweringError, match="cannot join"):
        values.concatenate([leaf(0, (2, 3)), leaf(1, (2,))], 1)


def test_a_source_that_is_stacked_twice_is_two_copies():
    """No walk with a step of 0, which could not be turned around."""
    copies = copies_of(values.stack([leaf(1, (2, 3)), leaf(1, (2, 3)), leaf(2, (2, 3))], 0))
    assert [copy.ordinals for copy in copies] == [(1, 1, 2)]
    assert all(copy.box.is_run for copy in copies)
