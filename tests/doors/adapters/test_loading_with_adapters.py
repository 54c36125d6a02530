"""Tests of merging adapters while loading: the same tensors as in a checkpoint that is merged on disk."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import CoverageError, NameProblems, UnsupportedError
from automodel_conv.execution.factors import KEPT_BYTES
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same
from tests.doors.adapters import support
from tests.doors.adapters.support import CONFIG, MODULES, default_adapter, factors, merged, published, write_base
from tests.lora.support import PREFIX, dyadic, write_adapter

transformers = pytest.importorskip("transformers", reason="builds a transformers model")

LAYOUTS = [None, "nemo", "vllm", "gpt_oss", "vllm_w31", "vllm_deepep"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with a base, an adapter, and the merged base."""
    root = tmp_path_factory.mktemp("loading")
    write_base(root / "base", published(), files=2)
    write_base(root / "merged", merged(published(), factors(*MODULES)))
    default_adapter(root / "adapter")
    amc.convert_adapter(root / "adapter", root / "stacks", base=root / "base", layout="transformers")
    return root


def build(device="cpu", dtype=torch.bfloat16):
    config = transformers.Qwen3MoeConfig(**CONFIG)
    with torch.device(device):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=dtype)
    return model


def poisoned(model):
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).fill_(0xA5)
    return model


@pytest.mark.parametrize("form", ["adapter", "stacks"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_has_the_merged_weights(place, form, device):
    expected = poisoned(build())
    amc.load_model(expected, place / "merged")
    model = build(device) if device == "meta" else poisoned(build())
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    report = amc.load_model(model, place / "base", adapter=place / form)
    assert_same(model.state_dict(), expected.state_dict())
    if device == "cpu":
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    start = "model.layers.{}."
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", *(f"self_attn.{x}_proj.weight" for x in "qkvo")]
    changed = {start.format(layer) + name for layer in (0, 1) for name in names}
    assert set(report.adapted) == changed | {"model.layers.0.mlp.gate.weight"}
    assert "changed by the adapter" in str(report)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_has_the_merged_weights_in_any_layout(place, layout, memory_map):
    model = build("meta")
    options = {"layout": layout, "memory_map": memory_map}
    expected = amc.load_state_dict(place / "merged", model, **options)
    found = amc.load_state_dict(place / "base", model, adapter=place / "adapter", **options)
    assert_same(found, expected)
    assert found.report.adapted


@pytest.mark.parametrize(("layout", "inner"), [("vllm_trtllm", 128), ("vllm_trtllm_padded", 96)])
def test_state_dict_has_the_merged_weights_in_blocks_of_a_kernel(tmp_path, monkeypatch, layout, inner):
    sizes = {"hidden_size": 64, "moe_intermediate_size": inner, "intermediate_size": inner}
    monkeypatch.setattr(support, "CONFIG", CONFIG | sizes)
    monkeypatch.setattr(support, "HIDDEN", 64)
    monkeypatch.setattr(support, "INNER", inner)
    write_base(tmp_path / "base", published())
    write_base(tmp_path / "merged", merged(published(), factors(*MODULES)))
    default_adapter(tmp_path / "adapter")
    found = amc.load_state_dict(tmp_path / "base", adapter=tmp_path / "adapter", layout=layout)
    assert_same(found, amc.load_state_dict(tmp_path / "merged", layout=layout))


def test_published_names_need_no_model(place):
    found = amc.load_state_dict(place / "base", rules=[], adapter=place / "adapter")
    assert_same(found, merged(published(), factors(*MODULES)))
    assert sorted(found.report.adapted) == sorted(f"{module}.weight" for module in MODULES)


def test_stacks_need_a_model(place):
    with pytest.raises(UnsupportedError, match=r"(?s)rules or a plan are given, and no model.*model="):
        amc.load_state_dict(place / "base", rules=[], adapter=place / "stacks")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_have_the_dtype_of_their_target_before_the_sum(place, device):
    expected = build(dtype=torch.float32)
    amc.load_model(expected, write_once(place / "wide", torch.float32))
    model = build(device, dtype=torch.float32)
    amc.load_model(model, place / "base", adapter=place / "adapter")
    assert_same(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_dtype_of_a_state_dict_is_that_of_the_sum(place, dtype):
    found = amc.load_state_dict(place / "base", rules=[], adapter=place / "adapter", dtype=dtype)
    assert_same(found, merged(published(), factors(*MODULES), dtype=dtype))


def write_once(directory, dtype):
    """Return a checkpoint of the merged weights, computed in a dtype."""
    if not directory.exists():
        write_base(directory, merged(published(), factors(*MODULES), dtype=dtype))
    return directory


def test_several_adapters_add_up(place, tmp_path):
    other = factors(MODULES[0], "lm_head", seed=555)
    write_adapter(tmp_path / "other", other)
    pairs = [(place / "stacks", -0.5), (tmp_path / "other", 1)]
    found = amc.load_state_dict(
        place / "base", build("meta"), adapter=pairs, layout="transformers", dtype=torch.float32
    )
    base = merged(merged(published(), factors(*MODULES), -1.0, torch.float32), other)
    write_base(tmp_path / "both", base)
    assert_same(found, amc.load_state_dict(tmp_path / "both", build("meta"), dtype=torch.float32))


def test_mapped_files_do_not_change(place):
    before = {path: path.read_bytes() for path in (place / "base").iterdir()}
    amc.load_state_dict(place / "base", rules=[], adapter=place / "adapter", memory_map=True)
    assert {path: path.read_bytes() for path in (place / "base").iterdir()} == before


class Spread(nn.Module):
    """A layer whose weight has steps between its elements."""

    def __init__(self, turned):
        super().__init__()
        memory = torch.full((6, 10) if not turned else (5, 6), float("nan"))
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(memory.T if turned else memory[:, ::2])


@pytest.mark.parametrize("turned", [False, True])
def test_parameters_that_are_not_contiguous_are_merged(tmp_path, turned):
    weight, a, b = dyadic(6, 5, seed=2), dyadic(2, 5), dyadic(6, 2, seed=1)
    save_file({"proj.weight": weight}, tmp_path / "model.safetensors")
    write_adapter(tmp_path / "a", {f"{PREFIX}proj.lora_A.weight": a, f"{PREFIX}proj.lora_B.weight": b})
    model = Spread(turned)
    amc.load_model(model, tmp_path / "model.safetensors", adapter=tmp_path / "a")
    assert not model.proj.weight.is_contiguous()
    expected = (weight.double() + 2.0 * (b.double() @ a.double())).float()
    assert_bytes_equal(model.proj.weight.detach().contiguous(), expected)


def test_tied_parameter_is_merged_once(tmp_path):
    tensors = {name: tensor for name, tensor in published().items() if name != "lm_head.weight"}
    base = write_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    a, b = dyadic(2, 10), dyadic(16, 2, seed=1)
    embed = {f"{PREFIX}model.embed_tokens.lora_embedding_{part}": tensor for part, tensor in (("A", a), ("B", b))}
    write_adapter(tmp_path / "a", embed)
    config = transformers.Qwen3MoeConfig(**CONFIG | {"tie_word_embeddings": True})
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    amc.load_model(model, base, adapter=tmp_path / "a")
    weight = tensors["model.embed_tokens.weight"].double() + 2.0 * (b.double() @ a.double()).T
    assert_bytes_equal(model.lm_head.weight.detach(), weight.float().bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapter_that_does_not_fit_leaves_the_model_as_it_was(place, tmp_path, device):
    write_adapter(tmp_path / "a", factors(*MODULES) | {f"{PREFIX}nowhere.weight": dyadic(2)})
    model = build(device) if device == "meta" else poisoned(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NameProblems, match=r"nowhere.weight"):
        amc.load_model(model, place / "base", adapter=tmp_path / "a")
    if device == "cpu":
        assert_same(model.state_dict(), before)
    else:
        assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_module_that_the_model_does_not_load_is_named(place):
    """A model of one layer loads half of the checkpoint; the adapter's modules of the other half have no place."""
    config = transformers.Qwen3MoeConfig(**CONFIG | {"num_hidden_layers": 1})
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    with pytest.raises((CoverageError, NameProblems), match=r"(?s)no effect.*layers.1"):
        amc.load_model(model, place / "base", adapter=place / "adapter", strict=False)


def test_quantized_weight_is_named(place, tmp_path):
    tensors = published()
    name = f"{MODULES[0]}.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    base = write_base(tmp_path / "base", tensors)
    with pytest.raises(UnsupportedError, match=rf"(?s)quantized.*{name}"):
        amc.load_state_dict(base, rules=[], adapter=place / "adapter")


@pytest.mark.parametrize("threads", [1, 5])
def test_number_of_threads_does_not_matter(place, threads):
    found = amc.load_state_dict(place / "base", rules=[], adapter=place / "adapter", threads=threads)
    assert_same(found, merged(published(), factors(*MODULES)))


def test_plan_of_an_earlier_call_may_be_given(place):
    model = build("meta")
    plan = amc.compile_plan(place / "base", model)
    found = amc.load_state_dict(place / "base", model, plan=plan, adapter=place / "stacks")
    assert_same(found, amc.load_state_dict(place / "merged", model))


def test_checkpoint_in_another_layout_is_merged(place, tmp_path):
    amc.convert_checkpoint(place / "base", tmp_path / "own", layout="nemo")
    found = amc.load_state_dict(tmp_path / "own", build("meta"), adapter=place / "adapter")
    assert_same(found, amc.load_state_dict(place / "merged", build("meta")))


def test_memory_of_the_merge_is_in_the_budget(place):
    options = {"rules": [], "adapter": place / "adapter", "threads": 1}
    with pytest.raises(amc.ConversionError, match=r"memory_budget"):
        amc.load_state_dict(place / "base", memory_budget=1 << 20, **options)
    found = amc.load_state_dict(place / "base", memory_budget=256 << 20, **options)
    assert_same(found, merged(published(), factors(*MODULES)))
    assert found.report.peak_extra_bytes > KEPT_BYTES
