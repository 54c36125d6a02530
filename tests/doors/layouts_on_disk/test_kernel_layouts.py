"""Tests of files in layouts that engines make for their kernels, and of loads into such layouts."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="makes checkpoints with transformers")

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, tensors_of
from tests.planning.kernel_orders import kernel_tensors
from tests.zoo.ranks import assert_ranks_read_their_parts

IN_FILES = ("vllm_w31", "vllm_trtllm")
PADDED = ("vllm_trtllm_padded", "vllm_deepep")
TYPES = ("qwen3_moe", "nemotron_h")
SIZES = [(3, 128, 64), (1, 128, 128)]  # experts, intermediate, hidden


def arranged(state, layout):
    """Return the tensors of a model with its experts in a layout of vLLM."""
    tensors = dict(state)
    for path in {name.rpartition(".")[0] for name in state if name.endswith(".experts.down_proj")}:
        down, both = tensors.pop(f"{path}.down_proj"), tensors.pop(f"{path}.gate_up_proj", None)
        gate, up = (None, tensors.pop(f"{path}.up_proj")) if both is None else both.chunk(2, 1)
        tensors[f"{path}.w13_weight"], tensors[f"{path}.w2_weight"] = kernel_tensors(layout, gate, up, down)
    return tensors


class Engine(nn.Module):
    """The module of an engine: parameters with the names of a state dict, and other values."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.full_like(tensor, 3), requires_grad=False))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", IN_FILES)
@pytest.mark.parametrize("model_type", TYPES)
def test_files_state_the_layout_and_go_back(published, model_type, layout, sizes, tmp_path):
    directory, state = published(model_type, sizes)
    amc.convert_checkpoint(directory, tmp_path / "made", layout=layout)
    assert_same(tensors_of(tmp_path / "made"), arranged(state, layout))
    assert amc.open_checkpoint(tmp_path / "made").layouts == (layout,)
    assert all(file.name.startswith(layout) for file in (tmp_path / "made").glob("*.safetensors"))
    amc.verify_checkpoint(directory, tmp_path / "made", layout=layout)
    assert_same(amc.load_state_dict(tmp_path / "made"), state)
    assert_same(amc.load_state_dict(tmp_path / "made", layout="vllm"), arranged(state, "vllm"))
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", layout="per_expert")
    amc.verify_checkpoint(directory, tmp_path / "back", layout="per_expert")


@pytest.mark.parametrize("sizes", [*SIZES, (2, 96, 64)], ids=str)
@pytest.mark.parametrize("layout", [*IN_FILES, *PADDED])
@pytest.mark.parametrize("model_type", TYPES)
def test_state_dict_is_loaded_and_saved_in_the_layout(published, model_type, layout, sizes, tmp_path):
    directory, state = published(model_type, sizes)
    if layout == "vllm_trtllm" and sizes[1] == 96:
        with pytest.raises(UnsupportedError, match=r'(?s)multiple of 128.*96.*layout "vllm_trtllm_padded" pads it'):
            amc.load_state_dict(directory, layout=layout)
        return
    loaded = amc.load_state_dict(directory, layout=layout)
    assert_same(loaded, arranged(state, layout))
    rules = amc.get_checkpoint_conversion_mapping(model_type)
    if layout in PADDED:
        with pytest.raises(UnsupportedError, match=r"(?s)without padding is not known.*pass reference="):
            amc.save_checkpoint(dict(loaded), tmp_path / "saved", rules=rules, layout=layout)
        amc.save_checkpoint(dict(loaded), tmp_path / "saved", rules=rules, layout=layout, reference=directory)
        assert_same(tensors_of(tmp_path / "saved"), tensors_of(directory))
        assert_same(amc.revert_state_dict(dict(loaded), Engine(state), rules=[], layout=layout), state)
        return
    amc.save_checkpoint(dict(loaded), tmp_path / "saved", rules=rules, layout=layout)
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(directory))


@pytest.mark.parametrize("sizes", [*SIZES, (2, 96, 64)], ids=str)
@pytest.mark.parametrize("layout", [*IN_FILES, *PADDED])
@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_of_an_engine_are_filled_in_place(published, model_type, layout, sizes):
    directory, state = published(model_type, sizes)
    if layout == "vllm_trtllm" and sizes[1] == 96:
        layout = "vllm_trtllm_padded"
    wanted = arranged(state, layout)
    module = Engine(wanted)
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    rules = amc.get_checkpoint_conversion_mapping(model_type)
    amc.load_model(module, directory, rules=rules, layout=layout)
    assert_same(module.state_dict(), wanted)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == places


@pytest.mark.parametrize("sizes", [(4, 128, 64), (4, 96, 128)], ids=str)
@pytest.mark.parametrize("layout", [*IN_FILES, *PADDED])
def test_ranks_read_their_parts(published, layout, sizes):
    if layout == "vllm_trtllm" and sizes[1] == 96:
        layout = "vllm_trtllm_padded"
    directory, state = published("qwen3_moe", sizes)
    assert_ranks_read_their_parts(directory, arranged(state, layout), layout=layout)


@pytest.mark.parametrize("layout", [*IN_FILES, *PADDED])
def test_plan_is_kept_as_text_and_shown(published, layout):
    directory, state = published("qwen3_moe", (4, 128, 64))
    plan = amc.compile_plan(directory, layout=layout)
    loaded = amc.load_state_dict(directory, plan=plan.to_json())
    assert loaded.layout == layout
    assert_same(loaded, arranged(state, layout))
    text = plan.summary() + plan.explain("model.layers.0.mlp.experts.w13_weight")
    assert ("in blocks E n m c g a k" in text) == ("trtllm" in layout)
    assert ("constant 0" in text) == (layout == "vllm_deepep")
    back = plan.inverse().targets
    assert {t.name: t.shape for t in back} == {
        n: s for n, s in zip(plan.sources.names, plan.sources.shapes, strict=True)
    }


@pytest.mark.parametrize("layout", [*IN_FILES, *PADDED])
def test_little_scratch_is_enough(published, layout):
    directory, state = published("qwen3_moe", (3, 128, 64))
    loaded = amc.load_state_dict(directory, layout=layout, scratch_bytes=1 << 12, threads=2)
    assert_same(loaded, arranged(state, layout))
    assert loaded.report.bytes_read == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("layout", PADDED)
def test_missing_experts_of_an_engine_are_named(published, layout):
    directory, state = published("qwen3_moe", (2, 96, 64))
    path = "model.layers.0.mlp.experts"
    more = {f"model.layers.7.mlp.experts.{leaf}": state[f"{path}.{leaf}"] for leaf in ("gate_up_proj", "down_proj")}
    module = Engine(arranged(state | more, layout))
    with pytest.raises(amc.NameProblems, match=r"(?s)missing.*layers\.7\.mlp\.experts"):
        amc.load_model(module, directory, rules=amc.get_checkpoint_conversion_mapping("qwen3_moe"), layout=layout)


def test_checkpoint_in_float32_is_cast_to_what_the_kernel_takes(published, tmp_path):
    directory, state = published("qwen3_moe", SIZES[0])
    amc.convert_checkpoint(directory, tmp_path / "float32", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"(?s)the kernel.*BF16.*pass dtype="):
        amc.load_state_dict(tmp_path / "float32", layout="vllm_trtllm", dtype=torch.float32)
    loaded = amc.load_state_dict(tmp_path / "float32", layout="vllm_trtllm", dtype=torch.bfloat16)
    for name, tensor in arranged(state, "vllm_trtllm").items():
        assert_bytes_equal(loaded[name], tensor.to(torch.bfloat16))


@pytest.mark.parametrize("layout", PADDED)
def test_padding_is_not_written_to_files(published, layout, tmp_path):
    directory, _ = published("qwen3_moe", (2, 96, 64))
    with pytest.raises(UnsupportedError, match=r"(?s)w13_weight has constants.*load"):
        amc.convert_checkpoint(directory, tmp_path / "made", layout=layout)
    assert not list(tmp_path.glob("made/*.safetensors"))
