"""Tests of layouts of grouped experts against loops over experts, rows and columns."""

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.layouts import (
    LAYOUTS,
    PER_EXPERT,
    ExpertLayout,
    as_layout,
    get_layout,
    has_other_names,
    holds_experts,
    layout_from_name,
    layouts_that_pad,
    layouts_with_names,
    same_names,
)


@pytest.mark.parametrize("given", [["nemo"], {}, 3, b"nemo"])
def test_layout_that_is_no_name_is_unknown(given):
    with pytest.raises(UnsupportedError, match=r"^unknown layout "):
        get_layout(given)


def test_unknown_layout_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match="unknown layout 'vlllm'") as error:
        get_layout("vlllm")
    assert all(name in str(error.value) for name in LAYOUTS)
    assert get_layout("nemo") is LAYOUTS["nemo"]


@pytest.mark.parametrize("name", ["per-expert", "per expert", "PER_EXPERT", "perexpert", "per_experts"])
def test_layout_with_a_similar_name_is_suggested(name):
    with pytest.raises(UnsupportedError, match=r"(?s)expected: .*per_expert.*write 'per_expert'"):
        get_layout(name, PER_EXPERT)
    with pytest.raises(UnsupportedError, match="convert_checkpoint") as error:
        get_layout(name)
    assert "'per_expert'" not in str(error.value)


def test_names_unlike_all_layouts_get_only_the_list():
    with pytest.raises(UnsupportedError, match="write 'gpt_oss'"):
        get_layout("gpt-oss")
    for name in ("megatron", "", "hf"):
        with pytest.raises(UnsupportedError) as error:
            get_layout(name)
        assert "do:" not in str(error.value)


def test_models_own_flags_are_a_layout():
    assert as_layout(ExpertLayout(transposed=False, interleaved=False, gated=True)) == LAYOUTS["transformers"]
    assert as_layout(ExpertLayout(transposed=True, interleaved=True, gated=True)) == LAYOUTS["gpt_oss"]


def test_names_of_experts_are_recognized_by_module_and_name():
    assert holds_experts("m.experts.w13_weight", LAYOUTS["vllm"])
    assert not holds_experts("m.experts.w13_weight", LAYOUTS["nemo"])
    assert not holds_experts("m.shared_experts.w13_weight", LAYOUTS["vllm"])
    assert not holds_experts("m.w13_weight", LAYOUTS["vllm"])


def test_layouts_for_kernels_have_the_names_of_the_layout_that_loaders_fill():
    shared = ["vllm", "vllm_w31", "vllm_trtllm", "vllm_trtllm_padded", "vllm_deepep"]
    assert layouts_with_names(["m.experts.w13_weight", "m.experts.w2_weight"]) == shared
    assert same_names(LAYOUTS["vllm"])[0] == "vllm"
    assert layout_from_name("m.experts.w2_weight") is None
    assert layout_from_name("m.experts.down_projs") == "nemo"


def test_names_are_others_if_transformers_has_no_experts_of_these_names():
    assert has_other_names("m.experts.w2_weight")
    assert has_other_names("experts.down_projs")
    assert not has_other_names("m.experts.down_proj")
    assert not has_other_names("m.experts.gate_up_proj_bias")
    assert not has_other_names("m.shared_experts.w2_weight")


def test_layout_that_pads_is_found_for_one_that_does_not():
    trtllm = LAYOUTS["vllm_trtllm"]
    for buffer in (*trtllm.first, *trtllm.ungated, *trtllm.down):
        assert layouts_that_pad(buffer, "i") == ["vllm_trtllm_padded"]
        assert layouts_that_pad(buffer, "h") == []
