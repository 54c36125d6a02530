"""Tests of plans that rearrange grouped experts, against loops over experts, rows and columns."""

import itertools

import pytest

from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import LAYOUTS, Buffer, Layout
from automodel_conv.planning.relayout import relayout
from tests.planning.oracles import execute

PATH = "model.layers.3.mlp.experts"


SIZES = [(2, 3, 5), (1, 1, 4), (3, 4, 1), (1, 2, 2)]  # experts, intermediate, hidden


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
    "vllm": ("w13_weight", "w13_weight", "w2_weight", "w13_bias", "w13_bias", "w2_bias"),
}


INPUT_FIRST = {"transformers": False, "nemo": True, "gpt_oss": True, "vllm": False}


ALTERNATING = {"transformers": False, "nemo": False, "gpt_oss": True, "vllm": False}


def row_of(layout, part, i, size):
    """Return the position of row ``i`` of gate or up along the 2I axis."""
    if ALTERNATING[layout]:
        return 2 * i + (part == "up")
    return i + size * (part == "up")


def grouped(layout, sizes, gated=True, biases=True):
    """Return name -> (shape, flat elements) in a layout; each element identifies itself."""
    experts, size, hidden = sizes
    gate_up, up, down, gate_up_bias, up_bias, down_bias = NAMES[layout]
    parts = ("gate", "up") if gated else ("up",)
    rows = len(parts) * size
    first, first_bias = {}, {}
    second, second_bias = {}, {}
    for e, part, i in itertools.product(range(experts), parts, range(size)):
        r = row_of(layout, part, i, size) if gated else i
        first_bias[e, r] = (part, "bias", e, i)
        for h in range(hidden):
            first[(e, h, r) if INPUT_FIRST[layout] else (e, r, h)] = (part, e, i, h)
    for e, h in itertools.product(range(experts), range(hidden)):
        second_bias[e, h] = ("down", "bias", e, h)
        for i in range(size):
            second[(e, i, h) if INPUT_FIRST[layout] else (e, h, i)] = ("down", e, i, h)
    weights = [(rows, hidden), (hidden, size)]
    if INPUT_FIRST[layout]:
        weights = [shape[::-1] for shape in weights]
    tensors = {
        gate_up if gated else up: ((experts, *weights[0]), first),
        down: ((experts, *weights[1]), second),
    }
    if biases:
        tensors[gate_up_bias if gated else up_bias] = ((experts, rows), first_bias)
        tensors[down_bias] = ((experts, hidden), second_bias)
    return {
        f"{PATH}.{name}": (shape, [at[c] for c in itertools.product(*map(range, shape))])
        for name, (shape, at) in tensors.items()
    }


def table(tensors):
    return SourceTable(list(tensors), ["BF16"] * len(tensors), [shape for shape, _ in tensors.values()])


def laid_out(tensors, source, target, gated=True):
    plan = relayout(table(tensors), lambda path: LAYOUTS[source], lambda path: LAYOUTS[target], lambda path: gated)
    results = execute(plan, {name: elements for name, (_, elements) in tensors.items()})
    return {t.name: (t.shape, results[t.name]) for t in plan.targets}


def test_all_layouts_are_written_down_here():
    assert LAYOUTS.keys() == NAMES.keys()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(NAMES, NAMES)))
def test_every_layout_becomes_every_other(source, target, gated):
    for sizes in SIZES:
        tensors = grouped(source, sizes, gated)
        converted = laid_out(tensors, source, target, gated)
        assert converted == grouped(target, sizes, gated)
        assert laid_out(converted, target, source, gated) == tensors


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
@pytest.mark.parametrize("sizes", SIZES)
def test_gate_and_up_can_have_a_tensor_each(name, sizes):
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
        plan = relayout(table(tensors), lambda path: source, lambda path: target, lambda path: True)
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
