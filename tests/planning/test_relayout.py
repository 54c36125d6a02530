"""Tests of plans that rearrange grouped experts, against loops over experts, rows and columns."""

import itertools

import pytest

from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import LAYOUTS, Buffer, Layout
from automodel_conv.planning.relayout import relayout
from tests.planning.kernel_orders import alternating, in_blocks
from tests.planning.oracles import execute

PATH = "model.layers.3.mlp.experts"


SIZES = [(2, 3, 5), (1, 1, 4), (3, 4, 1), (1, 2, 2)]  # experts, intermediate, hidden
IN_BLOCKS = [(1, 128, 128), (2, 128, 64), (0, 128, 64)]  # what the blocks of a layout divide


# Written by hand, not taken from the table under test: names, axes of the weights, order of gate and up.
NAMES = {
    "transformers": ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"),
    "nemo": (
        "gate_and_up_projs",
        "gate_and_up_projs",
        "down_projs",
        "gate_up_proj_bias",
        "gate_up_proj_bias",
        "down_proj_bias",
    ),
    "gpt_oss": ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"),
    **dict.fromkeys(
        ["vllm", "vllm_w31", "vllm_trtllm", "vllm_trtllm_padded", "vllm_deepep"],
        ("w13_weight", "w13_weight", "w2_weight", "w13_bias", "w13_bias", "w2_bias"),
    ),
}


INPUT_FIRST = {"nemo", "gpt_oss"}


ALTERNATING = {"gpt_oss"}


UP_BEFORE_GATE = {"vllm_w31"}


BLOCKS = {"vllm_trtllm", "vllm_trtllm_padded"}


PADDED = {"vllm_trtllm_padded": (128, 1), "vllm_deepep": (1, 256)}  # multiples of the intermediate and hidden size


def padded_sizes(layout, size, hidden):
    """Return the intermediate and hidden size with padding."""
    multiples = PADDED.get(layout, (1, 1))
    while size % multiples[0]:
        size += 1
    while hidden % multiples[1]:
        hidden += 1
    return size, hidden


def row_of(layout, part, i, size):
    """Return the position of row ``i`` of gate or up along the 2I axis."""
    if layout in ALTERNATING:
        return 2 * i + (part == "up")
    return i + size * (part == ("gate" if layout in UP_BEFORE_GATE else "up"))


def grouped(layout, sizes, gated=True, biases=True):
    """Return name -> (shape, flat elements) in a layout; each element identifies itself, or is a zero of padding."""
    experts, real_size, real_hidden = sizes
    size, hidden = padded_sizes(layout, real_size, real_hidden)
    gate_up, up, down, gate_up_bias, up_bias, down_bias = NAMES[layout]
    parts = ("gate", "up") if gated else ("up",)
    rows = len(parts) * size
    first, first_bias = {}, {}
    second, second_bias = {}, {}
    for e, part, i in itertools.product(range(experts), parts, range(size)):
        r = row_of(layout, part, i, size) if gated else i
        first_bias[e, r] = (part, "bias", e, i) if i < real_size else 0
        for h in range(hidden):
            is_real = i < real_size and h < real_hidden
            first[(e, h, r) if layout in INPUT_FIRST else (e, r, h)] = (part, e, i, h) if is_real else 0
    for e, h in itertools.product(range(experts), range(hidden)):
        second_bias[e, h] = ("down", "bias", e, h) if h < real_hidden else 0
        for i in range(size):
            is_real = i < real_size and h < real_hidden
            second[(e, i, h) if layout in INPUT_FIRST else (e, h, i)] = ("down", e, i, h) if is_real else 0
    weights = [(rows, hidden), (hidden, size)]
    if layout in INPUT_FIRST:
        weights = [shape[::-1] for shape in weights]
    tensors = {
        gate_up if gated else up: ((experts, *weights[0]), first),
        down: ((experts, *weights[1]), second),
    }
    if biases:
        tensors[gate_up_bias if gated else up_bias] = ((experts, rows), first_bias)
        tensors[down_bias] = ((experts, hidden), second_bias)
    flat = {
        f"{PATH}.{name}": (shape, [at[c] for c in itertools.product(*map(range, shape))])
        for name, (shape, at) in tensors.items()
    }
    return {name: reordered(name, *tensor, gated) for name, tensor in flat.items()} if layout in BLOCKS else flat


def reordered(name, shape, elements, gated):
    """Return a weight with the elements of each expert in the order of the TRT-LLM kernel."""
    experts, rows, columns = shape
    matrix = [elements[start : start + columns] for start in range(0, len(elements), max(columns, 1))]
    result = []
    for e in range(experts):
        expert = matrix[e * rows : (e + 1) * rows]
        result += in_blocks(alternating(expert) if gated and name.endswith("w13_weight") else expert)
    return shape, result


def table(tensors):
    return SourceTable(list(tensors), ["BF16"] * len(tensors), [shape for shape, _ in tensors.values()])


def laid_out(tensors, source, target, gated=True, sizes=(0, 0, 0)):
    plan = relayout(
        table(tensors),
        lambda path: LAYOUTS[source],
        lambda path: LAYOUTS[target],
        lambda path: gated,
        lambda path: {"i": sizes[1], "h": sizes[2]},
    )
    results = execute(plan, {name: elements for name, (_, elements) in tensors.items()})
    return {t.name: (t.shape, results[t.name]) for t in plan.targets}


def test_all_layouts_are_written_down_here():
    assert LAYOUTS.keys() == NAMES.keys()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(NAMES, NAMES)))
def test_every_layout_becomes_every_other(source, target, gated):
    has_blocks = not BLOCKS.isdisjoint((source, target))
    for sizes in IN_BLOCKS[-2:] if has_blocks else SIZES:
        tensors = grouped(source, sizes, gated, biases=not has_blocks)
        converted = laid_out(tensors, source, target, gated, sizes)
        assert converted == grouped(target, sizes, gated, biases=not has_blocks)
        assert laid_out(converted, target, source, gated, sizes) == tensors


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("sizes", [*IN_BLOCKS, (1, 256, 192)], ids=str)
def test_blocks_have_the_order_of_the_kernel(sizes, gated):
    plain = grouped("vllm", sizes, gated, biases=False)
    assert laid_out(plain, "vllm", "vllm_trtllm", gated) == grouped("vllm_trtllm", sizes, gated, biases=False)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("size", [1, 96, 100, 129, 0])
def test_zeros_follow_each_projection_up_to_the_multiple(size, gated):
    sizes = (2, size, 64)
    plain = grouped("transformers", sizes, gated, biases=False)
    padded = laid_out(plain, "transformers", "vllm_trtllm_padded", gated)
    assert padded == grouped("vllm_trtllm_padded", sizes, gated, biases=False)
    assert laid_out(padded, "vllm_trtllm_padded", "transformers", gated, sizes) == plain


def test_other_tensors_pass_through():
    others = {
        "model.layers.3.mlp.shared_experts.down_proj": (2, 3, 4),
        "model.layers.3.mlp.shared_experts.gate_up_proj": (2, 3, 4),
        "model.layers.3.mlp.gate_up_proj": (6, 4),
        "model.layers.3.mlp.experts.router": (2, 4),
        "model.layers.3.mlp.experts.gate_up_proj.weight": (6, 4),
        "experts": (3,),
        "w2_weight": (3, 4),
    }
    sources = SourceTable(list(others), ["F32"] * len(others), list(others.values()))
    for source, target in itertools.product(LAYOUTS.values(), LAYOUTS.values()):
        plan = relayout(sources, lambda path: source, lambda path: target, lambda path: True)  # noqa: B023
        assert [(t.name, t.shape) for t in plan.targets] == list(others.items())
        assert {plan.execution_of(t) for t in plan.targets} == {"read"}
        assert plan.rules == ()


def test_experts_of_the_root_module_are_experts():
    sources = SourceTable(["experts.gate_up_proj"], ["F32"], [(2, 4, 3)])
    plan = relayout(sources, lambda path: LAYOUTS["transformers"], lambda path: LAYOUTS["nemo"], lambda path: True)
    assert [(t.name, t.shape) for t in plan.targets] == [("experts.gate_and_up_projs", (2, 3, 4))]


def test_layouts_can_differ_between_modules():
    names = ["a.experts.gate_up_proj", "b.experts.gate_up_proj"]
    sources = SourceTable(names, ["F32"] * 2, [(2, 4, 3)] * 2)
    plan = relayout(
        sources,
        lambda path: LAYOUTS["transformers"],
        lambda path: LAYOUTS["nemo" if path == "a.experts" else "vllm"],
        lambda path: True,
    )
    assert [(t.name, t.shape) for t in plan.targets] == [
        ("a.experts.gate_and_up_projs", (2, 3, 4)),
        ("b.experts.w13_weight", (2, 4, 3)),
    ]


def test_shape_that_does_not_fit_the_layout_is_an_error():
    def go(name, shape, source, target):
        sources = SourceTable([f"experts.{name}"], ["F32"], [shape])
        relayout(sources, lambda path: LAYOUTS[source], lambda path: LAYOUTS[target], lambda path: True)

    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj does not have a shape(.|\n)*\[4, 3\]"):
        go("gate_up_proj", (4, 3), "transformers", "nemo")
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj does not have a shape"):
        go("gate_up_proj", (2, 5, 3), "transformers", "gpt_oss")


def test_two_tensors_for_one_name_of_a_layout_are_an_error():
    sources = SourceTable(["experts.gate_up_proj", "experts.w13_weight"], ["F32"] * 2, [(2, 4, 3)] * 2)
    with pytest.raises(CoverageError, match=r"experts\.w13_weight"):
        relayout(sources, lambda path: LAYOUTS["transformers"], lambda path: LAYOUTS["vllm"], lambda path: True)


def relaid(target, hidden=frozenset(), **tensors):
    """Return the names and shapes of experts' tensors rearranged from the layout "transformers"."""
    dtypes, shapes = zip(*tensors.values(), strict=True)
    sources = SourceTable([f"experts.{name}" for name in tensors], dtypes, shapes, hidden=frozenset(hidden))
    plan = relayout(sources, lambda path: LAYOUTS["transformers"], lambda path: LAYOUTS[target], lambda path: True)
    return [(t.name.removeprefix("experts."), t.shape) for t in plan.targets]


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_kept_scales_are_arranged_like_their_codes(suffix):
    tensors = {"gate_up_proj": ("F8_E4M3", (2, 8, 6)), "gate_up_proj" + suffix: ("F32", (2, 8, 1))}
    names_and_shapes = relaid("nemo", **tensors)
    assert names_and_shapes == [("gate_and_up_projs", (2, 6, 8)), ("gate_and_up_projs" + suffix, (2, 1, 8))]
    names_and_shapes = relaid("vllm", **tensors)
    assert names_and_shapes == [("w13_weight", (2, 8, 6)), ("w13_weight" + suffix, (2, 8, 1))]


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("dtype", ["U8", "I8", "I32", "F4"])
def test_packed_codes_are_not_rearranged(dtype, suffix):
    tensors = {"gate_up_proj": (dtype, (2, 8, 16)), "gate_up_proj" + suffix: ("F8_E8M0", (2, 8, 1))}
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj: packed codes cannot be rearranged"):
        relaid("nemo", **tensors)
    assert relaid("vllm", **tensors)[0] == ("w13_weight", (2, 8, 16))
    ungrouped = {"gate_up_proj": (dtype, (2, 8, 16)), f"0.w1.weight{suffix}": ("F8_E8M0", (4, 1))}
    with pytest.raises(UnsupportedError, match="packed codes"):
        relaid("nemo", **ungrouped)
    assert relaid("nemo", gate_up_proj=(dtype, (2, 8, 16))) == [("gate_and_up_projs", (2, 16, 8))]


def test_hidden_tensors_are_not_laid_out():
    tensors = {"gate_up_proj": ("BF16", (2, 8, 6)), "gate_up_proj_scale_inv": ("F32", (2, 1, 1))}
    assert relaid("gpt_oss", {1}, **tensors) == [("gate_up_proj", (2, 6, 8))]


SEPARATE = Layout(
    first=(Buffer("gate", "E i h", ("gate",)), Buffer("up", "E i h", ("up",))),
    ungated=(Buffer("up", "E i h", ("up",)),),
    down=(Buffer("down", "E h i", ("down",)),),
)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("number", range(3))
def test_gate_and_up_can_have_a_tensor_each(name, number):
    sizes = (IN_BLOCKS if name in BLOCKS else SIZES)[number]
    experts, size, hidden = sizes
    separate = {
        f"{PATH}.{part}": (
            (experts, size, hidden),
            [(part, e, i, h) for e in range(experts) for i in range(size) for h in range(hidden)],
        )
        for part in ("gate", "up")
    }
    down = [("down", e, i, h) for e in range(experts) for h in range(hidden) for i in range(size)]
    separate[f"{PATH}.down"] = ((experts, hidden, size), down)
    joined = grouped(name, sizes, biases=False)

    def laid_out_by(tensors, source, target):
        known = {"i": size, "h": hidden}
        plan = relayout(table(tensors), lambda path: source, lambda path: target, lambda path: True, lambda path: known)
        elements = execute(plan, {name: elements for name, (_, elements) in tensors.items()})
        return {t.name: (t.shape, elements[t.name]) for t in plan.targets}

    assert laid_out_by(separate, SEPARATE, LAYOUTS[name]) == joined
    assert laid_out_by(joined, LAYOUTS[name], SEPARATE) == separate


def test_plan_lists_its_renames_and_moves():
    names = ["norm", "experts.gate_up_proj", "experts.down_proj"]
    sources = SourceTable(names, ["F32"] * 3, [(4,), (2, 6, 4), (2, 4, 3)])
    plan = relayout(sources, lambda path: LAYOUTS["transformers"], lambda path: LAYOUTS["vllm"], lambda path: True)
    assert [target.rule for target in plan.targets] == [-1, 0, 1]
    assert plan.rules == (
        "experts.gate_up_proj -> experts.w13_weight: rename",
        "experts.down_proj -> experts.w2_weight: rename",
    )
    plan = relayout(sources, lambda path: LAYOUTS["transformers"], lambda path: LAYOUTS["gpt_oss"], lambda path: True)
    assert plan.rules[1] == "experts.down_proj -> experts.down_proj: E h i -> E i h"


def refused(source, target, match, dtype="BF16", sizes=None, **shapes):
    sources = SourceTable([f"experts.{name}" for name in shapes], [dtype] * len(shapes), list(shapes.values()))
    with pytest.raises(UnsupportedError, match=match):
        relayout(sources, lambda _: LAYOUTS[source], lambda _: LAYOUTS[target], lambda _: True, lambda _: sizes or {})


@pytest.mark.parametrize("target", ["vllm_trtllm", "vllm_trtllm_padded"])
def test_biases_that_a_kernel_does_not_take_are_refused(target):
    match = r"experts\.{}: the kernel that reads this layout does not take it(.|\n)*without biases"
    refused("transformers", target, match.format("gate_up_proj_bias"), gate_up_proj_bias=(2, 256))
    refused("vllm", target, match.format("w2_bias"), w2_bias=(2, 64))
    refused(target, "vllm", match.format("w13_bias"), w13_bias=(2, 256))
    refused(target, target, match.format("w13_bias"), w13_bias=(2, 256))


@pytest.mark.parametrize("dtype", ["F32", "F16", "F8_E4M3"])
def test_dtypes_that_a_kernel_does_not_take_are_refused(dtype):
    match = rf"w2_weight: the kernel .* does not take it(.|\n)*BF16\n(.|\n)*{dtype}"
    refused("vllm", "vllm_trtllm", match, dtype, w2_weight=(2, 64, 128))
    refused("vllm_trtllm", "vllm", match, dtype, w2_weight=(2, 64, 128))
    if dtype != "F16":
        refused("vllm", "vllm_deepep", r"BF16 or F16", dtype, w2_weight=(2, 64, 128))


def test_sizes_that_blocks_do_not_divide_are_refused_with_the_layout_that_pads_them():
    pads = r'the intermediate size does not fit(.|\n)*multiple of 128(.|\n)*{}(.|\n)*"vllm_trtllm_padded" pads it'
    refused("vllm", "vllm_trtllm", pads.format(64), w2_weight=(2, 64, 64))
    refused("transformers", "vllm_trtllm", pads.format(192), gate_up_proj=(2, 384, 64))
    hidden = r"the hidden size does not fit(.|\n)*multiple of 64(.|\n)*96(.|\n)*another layout"
    refused("vllm", "vllm_trtllm", hidden, w2_weight=(2, 96, 128))
    refused("vllm", "vllm_trtllm_padded", hidden, w13_weight=(2, 2, 96))
    refused("vllm_trtllm", "vllm", r"the hidden size(.|\n)*are in this layout", w13_weight=(2, 256, 96))


def test_size_that_padding_hides_is_refused():
    match = r"w2_weight: the {} without padding is not known(.|\n)*pass model="
    refused("vllm_trtllm_padded", "vllm", match.format("intermediate size"), w2_weight=(2, 64, 128))
    refused("vllm_deepep", "transformers", match.format("hidden size"), w2_weight=(2, 256, 3))
    wrong = r"w2_weight does not have a shape(.|\n)*i has size 128, not 256, as 200 with padding"
    refused("vllm_trtllm_padded", "vllm", wrong, sizes={"i": 200, "h": 64}, w2_weight=(2, 64, 128))


def test_same_layout_needs_no_size_without_padding():
    sources = SourceTable(["experts.w2_weight"], ["BF16"], [(2, 64, 128)])
    padded = LAYOUTS["vllm_trtllm_padded"]
    plan = relayout(sources, lambda _: padded, lambda _: padded, lambda _: True)
    assert [plan.execution_of(target) for target in plan.targets] == ["read"]


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_kept_codes_have_no_layout_of_a_kernel(suffix):
    for target in ("vllm_w31", "vllm_trtllm", "vllm_deepep"):
        for name, dtype, shape in (
            ("gate_up_proj", "F8_E4M3", (2, 256, 64)),
            (f"gate_up_proj{suffix}", "F32", (2, 4, 1)),
        ):
            match = "gate and up share a scale" if target == "vllm_w31" else "does not take it"
            if suffix in name or target != "vllm_w31":
                refused("transformers", target, match, dtype, **{name: shape})


@pytest.mark.parametrize("target", ["vllm_w31", "vllm_trtllm", "vllm_trtllm_padded"])
@pytest.mark.parametrize("size", [128, 256])
def test_layouts_for_kernels_are_one_copy_for_each_projection(target, size):
    names = ["experts.gate_up_proj", "experts.down_proj"]
    sources = SourceTable(names, ["BF16"] * 2, [(4, 2 * size, 192), (4, 192, size)])
    plan = relayout(sources, lambda _: LAYOUTS["transformers"], lambda _: LAYOUTS[target], lambda _: True)
    assert [len(copy.ordinals) for t in plan.targets for copy in t.copies] == [2, 1]
