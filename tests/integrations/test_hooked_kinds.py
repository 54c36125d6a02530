"""Tests of models and checkpoints under the hook: other dtypes, tied towers, stray files, MTP heads, remote code."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="hooks from_pretrained of transformers")

from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, dynamic_module_utils, modeling_layers

import automodel_conv as amc
from automodel_conv.integrations.hooked_plan import ALL
from automodel_conv.testing import address_valued
from tests.integrations.support import assert_same_model, both, saved
from tests.model_zoo import build_model, fill, isolate_registry, write_checkpoint


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    model = build_model("mixtral")
    write_checkpoint(model, directory)
    return model, directory


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float16, "auto"], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_checkpoint_is_loaded_in_another_dtype(mixtral, tmp_path, stored, wanted):
    model = copy.deepcopy(mixtral[0]).to(stored)
    if stored == torch.float32:  # bits that bfloat16 lacks
        fill(model)
    write_checkpoint(model, tmp_path / "published")
    stock, hooked, [load] = both(type(model), tmp_path / "published", dtype=wanted)
    assert load.lowered
    assert load.left == {}
    assert stock.dtype == (stored if wanted == "auto" else wanted)
    assert saved(hooked, tmp_path / "hooked") == saved(stock, tmp_path / "stock")


def tied_vlm(name):
    """Return a model of the zoo with its head tied to the embeddings of its text tower."""
    untied = build_model(name)
    config = copy.deepcopy(untied.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(untied)._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model.eval()


@pytest.mark.parametrize("name", ["mistral3+mixtral", "internvl+qwen3_moe"])
def test_tied_vision_model_with_experts_and_a_stray_file(tmp_path, name):
    published = tmp_path / "published"
    model = tied_vlm(name)
    write_checkpoint(model, published)
    files = sorted(published.glob("model-*.safetensors"))
    tensors = {n: tensor for file in files for n, tensor in load_file(file).items()}
    assert len(files) > 1
    assert not any("lm_head" in n for n in tensors)
    strays = {n: torch.full_like(tensor, 7) for n, tensor in tensors.items()}
    save_file(strays, published / "consolidated.safetensors", metadata={"format": "pt"})
    stock, hooked, [load] = both(type(model), published)
    assert load.lowered
    assert load.left == {}
    assert hooked.get_output_embeddings().weight is hooked.get_input_embeddings().weight
    assert_same_model(hooked, model)
    assert saved(hooked, tmp_path / "hooked") == saved(stock, tmp_path / "stock")


@pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers loads no MTP heads")
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_experts_of_an_mtp_head_are_converted_by_plan(tmp_path, monkeypatch, name):
    model = build_model(name)
    write_checkpoint(model, tmp_path, 1 << 30)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    tensors = load_file(tmp_path / "model.safetensors")
    last, head = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    added = {head + n.removeprefix(last): -tensor for n, tensor in tensors.items() if n.startswith(last)}
    shapes = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    added |= {f"{head}{n}.weight": address_valued(shape, torch.bfloat16) for n, shape in shapes.items()}
    save_file(tensors | added, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # The layers of the published models that are such heads are known by number.
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [re.escape(head)])
    main, _, [load] = both(type(model), tmp_path)
    assert load.lowered
    stock = modeling_layers.MtpModel.from_pretrained(main)
    with amc.accelerate_transformers() as acceleration:
        hooked = modeling_layers.MtpModel.from_pretrained(main)
    [load] = acceleration.loads
    assert set(load.lowered) == {n for n in hooked.state_dict() if ".experts." in n}
    assert load.left == {}
    assert_same_model(hooked, stock)
    grouped = hooked.layers[0].mtp_block.mlp.experts.down_proj
    assert torch.equal(grouped, -main.model.layers[-1].mlp.experts.down_proj)


def test_transformers_converts_fake_tensors(mixtral):
    model, source = mixtral
    with FakeTensorMode(allow_non_fake_inputs=True):
        stock = type(model).from_pretrained(source)
        with amc.accelerate_transformers() as acceleration:
            hooked = type(model).from_pretrained(source)
    for loaded in (stock, hooked):
        assert isinstance(loaded.model.layers[0].mlp.experts.down_proj.data, FakeTensor)
    [load] = acceleration.loads
    assert load.lowered == ()
    assert "FakeTensor" in load.left[ALL]


MODELING = """
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


class OwnConfig(MixtralConfig):
    model_type = "own_moe"


class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""
REGISTERING = """
gate, up, down = (f"own.*.{name}.weight" for name in ("w1", "w3", "w2"))
grouped = [MergeModulelist(dim=0), Concatenate(dim=1)]
register_checkpoint_conversion_mapping(
    "own_moe",
    [
        WeightConverter([gate, up], "mlp.experts.gate_up_proj", operations=grouped),
        WeightConverter(down, "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ],
    overwrite=True,
)
"""


def remote(mixtral, directory: Path, code: str, *, grouped: bool) -> Path:
    """Write a checkpoint with its own modeling file, and its own names of experts."""
    model, source = mixtral
    if grouped:
        tensors = {n: tensor.contiguous() for n, tensor in model.state_dict().items()}
    else:
        stored = {n: tensor for file in source.glob("*.safetensors") for n, tensor in load_file(file).items()}
        tensors = {n.replace("block_sparse_moe.experts", "own"): tensor for n, tensor in stored.items()}
        tensors = {n.replace("block_sparse_moe", "mlp"): tensor for n, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_own.py").write_text(code)
    return directory


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Isolate the folder of remote code, and the rules it registers, for one test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    isolate_registry(monkeypatch)


@pytest.mark.usefixtures("own_modules")
def test_remote_code_that_registers_rules_is_converted_by_plan(mixtral, tmp_path):
    path = remote(mixtral, tmp_path, MODELING + REGISTERING, grouped=False)
    stock, hooked, [load] = both(AutoModelForCausalLM, path, trust_remote_code=True)
    assert load.model == "OwnForCausalLM"
    assert set(load.lowered) == {n for n in hooked.state_dict() if ".experts." in n}
    assert load.left == {}
    assert_same_model(hooked, mixtral[0])
    assert saved(hooked, tmp_path / "hooked") == saved(stock, tmp_path / "stock")


@pytest.mark.usefixtures("own_modules")
def test_remote_code_without_rules_is_loaded_unchanged(mixtral, tmp_path):
    path = remote(mixtral, tmp_path, MODELING, grouped=True)
    _, hooked, [load] = both(AutoModelForCausalLM, path, trust_remote_code=True)
    assert load == ("OwnForCausalLM", (), {}, (), (), 0)
    assert_same_model(hooked, mixtral[0])


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@needs_peft
def test_adapter_checkpoint_loads_its_base_under_the_hook(mixtral, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(type(mixtral[0]).from_pretrained(mixtral[1]), lora).save_pretrained(tmp_path)
    stock, hooked, loads = both(AutoModelForCausalLM, tmp_path)
    assert any("lora_A" in n for n in hooked.state_dict())
    assert sum(len(load.lowered) for load in loads) == 2 * hooked.config.num_hidden_layers
    assert_same_model(hooked, stock)


def adapter_of_single_experts(model, directory: Path):
    """Write an adapter as it was saved when each expert was a module."""
    shapes = {
        "w1": model.config.intermediate_size,
        "w3": model.config.intermediate_size,
        "w2": model.config.hidden_size,
    }
    tensors = {}
    for layer in range(model.config.num_hidden_layers):
        for e in range(model.config.num_local_experts):
            for name, out in shapes.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{name}"
                other = model.config.hidden_size + model.config.intermediate_size - out
                tensors[f"{path}.lora_A.weight"] = torch.randn(4, other)
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, 4)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"target_modules": list(shapes), "target_parameters": None}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@needs_peft
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("single", [False, True], ids=["grouped experts", "single experts"])
def test_an_adapter_of_experts_is_loaded_onto_a_base_under_the_hook(mixtral, tmp_path, single):
    from peft import LoraConfig, get_peft_model

    model, source = mixtral
    torch.manual_seed(0)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    get_peft_model(type(model).from_pretrained(source), lora).save_pretrained(tmp_path)
    if single:
        adapter_of_single_experts(model, tmp_path)
    stock = type(model).from_pretrained(source)
    stock.load_adapter(tmp_path)
    with amc.accelerate_transformers() as acceleration:
        hooked = type(model).from_pretrained(source)
        hooked.load_adapter(tmp_path)
    assert_same_model(hooked, stock)
    base, adapter = acceleration.loads
    assert base.lowered
    assert adapter.lowered == ()  # PEFT converts with its own operations
    assert bool(adapter.left) is single
    assert all("is not a stock operation" in reason for reason in adapter.left.values())
    assert all(t.any() for n, t in hooked.state_dict().items() if "experts" in n and "lora_B" in n)
