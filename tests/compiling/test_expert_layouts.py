"""Tests of the layout of a model's experts, and of layouts that the model or the tensors contradict."""

import pytest
from torch import nn

from automodel_conv.compiling.expert_layouts import (
    check_layout,
    experts_of,
    gated_by,
    has_names_of,
    is_laid_out,
    not_laid_out,
    refuse_no_experts,
    relaid_specs,
    sizes_in,
)
from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.layouts import LAYOUTS, ExpertLayout
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.rules import RuleSet
from tests.compiling.support import Experts, Model, StatedExperts, table

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
NO_RULES = RuleSet([])


def test_experts_that_state_their_layout_are_listed_with_it():
    assert experts_of(Model(StatedExperts(2, 3, 4)), "nemo") == {"experts": ExpertLayout(False, False, True)}
    assert experts_of(Model(Experts(2, 3, 4)), "nemo") == {}
    assert experts_of(nn.Linear(2, 2), None) == experts_of(None, "nemo") == {}


def test_silent_experts_of_transformers_have_no_layout_to_convert_to():
    transformers = pytest.importorskip("transformers")

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

    model = Pretrained(transformers.PretrainedConfig())
    model.experts = Experts(2, 3, 4)
    assert experts_of(model, None) == {}
    with pytest.raises(UnsupportedError, match=r"'nemo'(.|\n)*experts of Pretrained(.|\n)*leave layout out"):
        experts_of(model, "nemo")


def test_layout_needs_a_tensor_with_one_of_its_names():
    check_layout("vllm", table({"experts.w13_weight": (2, 6, 4)}), "source_layout")
    check_layout("vllm", table({}), "source_layout")
    with pytest.raises(UnsupportedError, match=r"'vllm'(.|\n)*experts\.w13_weight(.|\n)*source_layout"):
        check_layout("vllm", table({GATE_UP: (2, 6, 4)}), "source_layout")


@pytest.mark.parametrize(
    ("names", "found", "advice"),
    [
        (["norm", "m.experts.down_projs"], "m.experts.down_projs", 'of the layout "nemo": pass source_layout="nemo"'),
        (
            ["norm", "m.experts.down_proj"],
            "m.experts.down_proj",
            'pass source_layout=: one of "transformers", "gpt_oss"',
        ),
        (["norm", "m.experts.0.w2.weight"], "m.experts.0.w2.weight", "leave source_layout out: these experts are not"),
        (["norm", "m.shared_experts.down_proj"], "norm", "leave source_layout out: no name is that of an expert"),
    ],
)
def test_a_layout_that_no_tensor_has_is_refused_with_the_experts_found(names, found, advice):
    with pytest.raises(UnsupportedError) as caught:
        check_layout("vllm", table({name: (2, 6, 4) for name in names}), "source_layout")
    assert f"found:\n    {found}\n" in str(caught.value)
    assert advice in str(caught.value)


def test_layout_without_experts_is_refused():
    refuse_no_experts(["norm", "m.experts.w2_weight"], "nemo", table({"norm": (4,)}))
    with pytest.raises(UnsupportedError, match=r"'nemo'(.|\n)*norm(.|\n)*leave layout out"):
        refuse_no_experts(["norm", "shared_experts.down_proj"], "nemo", table({"norm": (4,)}))


@pytest.mark.parametrize(
    ("name", "layout", "known"),
    [
        ("m.experts.down_projs", "nemo", True),
        ("m.experts.w2_weight", "nemo", False),
        ("m.experts.down_proj", "gpt_oss", False),
    ],
)
def test_only_names_of_one_layout_determine_it(name, layout, known):
    assert has_names_of({name: TargetSpec("F32", (2, 4, 3))}, layout) is known
    assert not has_names_of(None, layout)


@pytest.mark.parametrize("leaf", ["w13_weight", "w2_weight", "w13_bias"])
def test_names_do_not_determine_a_layout_that_an_engine_makes(leaf):
    targets = {f"m.experts.{leaf}": TargetSpec("BF16", (2, 4, 3))}
    assert has_names_of(targets, "vllm")
    assert not has_names_of({"m.experts.down_projs": TargetSpec("BF16", (2, 4, 3))}, "vllm_w31")
    with pytest.raises(
        UnsupportedError, match=r"(?s)experts\.w.*'vllm_w31'.*pass layout=: one of \"vllm\", \"vllm_w31\""
    ):
        has_names_of(targets, "vllm_w31")


@pytest.mark.parametrize(("intermediate", "hidden"), [(3, 4), (4, 4), (1, 1), (0, 4)])
def test_sizes_are_those_of_down(intermediate, hidden):
    shapes = {"a.experts.down_projs": (2, intermediate, hidden), DOWN: (2, hidden, intermediate), "b.experts.w2": (4,)}
    sizes = sizes_in(shapes, lambda path: LAYOUTS["nemo" if path == "a.experts" else "transformers"])
    assert sizes("a.experts") == sizes("experts") == {"i": intermediate, "h": hidden}
    assert sizes("b.experts") == sizes("c.experts") == {}


def test_module_decides_about_its_gate_before_rules_and_shapes():
    ungated = table({"experts.up_proj": (2, 3, 4), DOWN: (2, 4, 3)})
    stated = {"experts": ExpertLayout(False, False, True)}
    assert gated_by(stated, NO_RULES, ungated, LAYOUTS["transformers"])("experts")
    assert not gated_by({}, NO_RULES, ungated, LAYOUTS["transformers"])("experts")
    assert gated_by({}, NO_RULES, ungated, None)("experts")


@pytest.mark.parametrize(("rows", "gated"), [(3, False), (6, True)])
def test_up_has_as_many_rows_as_down_has_columns_if_there_is_no_gate(rows, gated):
    sources = table({"experts.w13_weight": (2, rows, 4), "experts.w2_weight": (2, 4, 3)})
    assert gated_by({}, NO_RULES, sources, LAYOUTS["vllm"])("experts") is gated


def test_rules_for_up_without_gate_mean_no_gate():
    core = pytest.importorskip("transformers.core_model_loading")
    rule = core.WeightConverter("experts.*.up.weight", "experts.up_proj", operations=[core.MergeModulelist(dim=0)])
    assert not gated_by({}, RuleSet([rule]), table({}), None)("experts")


def test_experts_are_laid_out_if_names_and_modules_agree():
    names = ["norm", GATE_UP, DOWN]
    assert is_laid_out(names, {}, LAYOUTS["gpt_oss"])
    assert not is_laid_out(names, {"experts": LAYOUTS["transformers"]}, LAYOUTS["gpt_oss"])
    assert not is_laid_out(names, {}, LAYOUTS["nemo"])
    assert is_laid_out(["norm"], {}, LAYOUTS["nemo"])
    assert "down_proj" in str(not_laid_out(names, LAYOUTS["nemo"], "nemo"))


@pytest.mark.parametrize(("experts", "intermediate", "hidden"), [(2, 3, 4), (2, 4, 4), (2, 2, 4), (1, 1, 1), (0, 3, 4)])
def test_specs_are_those_of_the_canonical_layout(experts, intermediate, hidden):
    specs = {
        "norm": TargetSpec("F32", (4,), True),
        "experts.gate_and_up_projs": TargetSpec("BF16", (experts, hidden, 2 * intermediate), True),
        "experts.down_projs": TargetSpec("BF16", (experts, intermediate, hidden), False),
    }
    relaid = relaid_specs(specs, LAYOUTS["nemo"], lambda path: LAYOUTS["transformers"], lambda path: True)
    assert relaid == {
        "norm": TargetSpec("F32", (4,), True),
        GATE_UP: TargetSpec("BF16", (experts, 2 * intermediate, hidden), True),
        DOWN: TargetSpec("BF16", (experts, hidden, intermediate), False),
    }


def test_specs_of_padded_experts_have_the_sizes_without_padding():
    specs = {
        "experts.w13_weight": TargetSpec("BF16", (2, 256, 64), True),
        "experts.w2_weight": TargetSpec("BF16", (2, 64, 128), True),
    }
    layouts = LAYOUTS["vllm_trtllm_padded"], lambda path: LAYOUTS["transformers"], lambda path: True
    assert relaid_specs(specs, *layouts, lambda path: {"i": 96, "h": 64}) == {
        GATE_UP: TargetSpec("BF16", (2, 192, 64), True),
        DOWN: TargetSpec("BF16", (2, 64, 96), True),
    }
    with pytest.raises(UnsupportedError, match="without padding is not known"):
        relaid_specs(specs, *layouts)
