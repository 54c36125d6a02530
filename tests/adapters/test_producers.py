"""Tests of adapters as their producers write them: merged as PEFT merges them, and converted there and back.

PEFT writes the adapters at test time. Older releases and Unsloth wrote the same values in another order; such files are
made from these by the rules of the producers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="compares with models of transformers")
pytest.importorskip("peft", reason="compares with PEFT")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import automodel_conv as amc
from tests.adapters.support import dyadic, expert_modules, linear_modules, load_with_peft
from tests.comparing import assert_same, tensors_of
from tests.model_zoo import build_model, write_checkpoint

PROJECTIONS = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Settings of PEFT on a model with a module for each expert, as transformers 4 had them.
BY_MODULE: dict[str, dict[str, Any]] = {
    "attention and experts": {"target_modules": [*ATTENTION, *PROJECTIONS]},
    "a regular expression": {"target_modules": r".*\.experts\.\d+\.(gate_proj|up_proj|w1|w3)"},
    "only down": {"target_modules": ["down_proj", "w2"]},
    "only gate": {"target_modules": ["gate_proj", "w1"]},
    "the router": {"target_modules": ["gate", *ATTENTION]},
    "one layer": {"target_modules": PROJECTIONS, "layers_to_transform": [1], "layers_pattern": "layers"},
    "one expert": {"target_modules": r".*\.experts\.3\..*"},
    "without some": {"target_modules": PROJECTIONS, "exclude_modules": r".*\.layers\.1\..*|.*\.experts\.0\..*"},
    "ranks and alphas": {
        "target_modules": [*ATTENTION, *PROJECTIONS],
        "rank_pattern": {r"experts\.\d+\.(down_proj|w2)": 2, "q_proj": 1},
        "alpha_pattern": {r"layers\.1\..*\.(down_proj|w2)": 3, "o_proj": 0},
    },
    "alpha 0": {"target_modules": PROJECTIONS, "lora_alpha": 0},
    "rank 1": {"target_modules": PROJECTIONS, "r": 1},
    "rank-stabilized": {"target_modules": PROJECTIONS, "use_rslora": True, "r": 4},
    "rank-stabilized, ranks and alphas": {
        "target_modules": PROJECTIONS,
        "use_rslora": True,
        "r": 4,
        "rank_pattern": {"down_proj": 1, "w2": 1},
        "alpha_pattern": {"down_proj": 2, "w2": 2},
    },
}

# Settings of PEFT on a model with stacks of experts: types by the experts' parameters.
BY_PARAMETER: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ATTENTION},
    "only down": {"target_parameters": ["experts.down_proj"]},
    "only gate and up": {"target_parameters": ["experts.gate_up_proj"]},
    "one layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
    "one each": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"]},
    "ranks and alphas": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 1},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
    },
    "alpha 0": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "lora_alpha": 0},
    "rank 1": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 1},
    "rank-stabilized": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True, "r": 4},
    "the router": {"target_parameters": ["experts.down_proj", "mlp.gate.weight", "mlp.router.weight"]},
}

STACKED = ["qwen3_moe", "mixtral", "qwen3_vl_moe", "gpt_oss"]


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.long)])
def base(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    """Return a checkpoint with a tensor for each expert, and its model."""
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=STACKED)
def stacked(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    """Return a checkpoint, and its model, whose experts are stacks; some are published so."""
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("settings", BY_MODULE.values(), ids=BY_MODULE)
def test_adapter_by_module_merges_as_peft_merges_it(base, settings, tmp_path):
    adapted = adapt(module_tree(*base), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    amc.merge_adapter(base[0], tmp_path / "adapter", tmp_path / "merged")
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(base[0]) | adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("settings", BY_MODULE.values(), ids=BY_MODULE)
def test_adapter_by_module_is_fused_and_goes_back(base, settings, tmp_path):
    path, model = base
    adapted = adapt(module_tree(path, model), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "fused", base=path, layout="transformers")
    amc.convert_adapter(tmp_path / "fused", tmp_path / "back", base=path, layout="per_expert")
    loaded = load_with_peft(type(model).from_pretrained(path), tmp_path / "fused").merge_and_unload()
    assert_same(loaded.state_dict(), type(model).from_pretrained(tmp_path / "merged").state_dict())
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(module_tree(path, model), str(tmp_path / "back"))
    assert_same(again.merge_and_unload().state_dict(), adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("settings", BY_PARAMETER.values(), ids=BY_PARAMETER)
def test_adapter_by_parameter_merges_as_peft_merges_it(stacked, settings, tmp_path):
    path, model = stacked
    adapted = adapt(type(model).from_pretrained(path), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert_same(loaded.state_dict(), adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("settings", BY_PARAMETER.values(), ids=BY_PARAMETER)
def test_adapter_by_parameter_is_divided_among_experts(base, settings, tmp_path):
    path, model = base
    adapted = adapt(type(model).from_pretrained(path), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "divided", base=path, layout="per_expert")
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "expected")
    amc.merge_adapter(path, tmp_path / "divided", tmp_path / "merged")
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected"))
    again = PeftModel.from_pretrained(module_tree(path, model), str(tmp_path / "divided"))
    merged = again.merge_and_unload().state_dict()
    assert_same({name: tensors_of(tmp_path / "expected")[name] for name in merged}, merged)


WHOLE_MODULES: dict[str, dict[str, Any]] = {
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the output": {"target_modules": ["lm_head", "q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def test_saved_module_that_is_tied_to_another_is_refused(tmp_path):
    path, model = checkpoint("olmoe-tied", tmp_path / "checkpoint")
    adapted = adapt(type(model).from_pretrained(path), WHOLE_MODULES["modules to save"])
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(amc.NameProblems, match=r"lm_head.weight: it would also replace model.embed_tokens.weight"):
        amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe-tied"])
@pytest.mark.parametrize("settings", WHOLE_MODULES.values(), ids=WHOLE_MODULES)
def test_embeddings_and_saved_modules_are_merged_as_peft_merges_them(name, settings, tmp_path):
    if "modules_to_save" in settings and name.endswith("-tied"):
        pytest.skip("refused")
    path, model = checkpoint(name, tmp_path / "checkpoint")
    adapted = adapt(type(model).from_pretrained(path), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "published", base=path, layout="per_expert")
    amc.merge_adapter(path, tmp_path / "published", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "merged"))
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert_same(loaded.state_dict(), adapted.merge_and_unload().state_dict())


# Releases of PEFT, and whether they read A of a stack that is `[out, in]`, and of one that is `[in, out]`, in another
# order than the installed release. Found by running each.
RELEASES = {
    "0.17.1": (True, False),
    "0.18.1": (True, False),
    "0.19.0": (True, True),
    "0.19.1": (False, False),
    "0.20.0": (False, False),
}


@pytest.mark.parametrize("equal", [None, "2I == H", "I == H"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapter_of_an_older_peft_merges_as_that_release_merges_it(name, release, equal, tmp_path):
    path, model = checkpoint(name, tmp_path / "checkpoint", equal)
    adapted = adapt(type(model).from_pretrained(path), BY_PARAMETER["both"])
    adapted.save_pretrained(tmp_path / "adapter")
    is_other = RELEASES[release][name == "gpt_oss"]
    as_by(release, tmp_path / "adapter", lambda a, b: exchanged(a, b, 12) if is_other else (a, b))
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert_same(loaded.state_dict(), adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("order", ["grouped_by_expert", "rank_major"])
def test_adapter_of_unsloth_is_read_in_the_order_that_it_states(order, tmp_path):
    path, model = checkpoint("qwen3_moe", tmp_path / "checkpoint")
    adapted = adapt(type(model).from_pretrained(path), BY_PARAMETER["both"])
    adapted.save_pretrained(tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    as_by("0.18.1", tmp_path / "adapter", lambda a, b: (a, grouped(b, 12) if order != "rank_major" else b), order)
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "again", base=path, layout="transformers")
    assert_same(tensors_of(tmp_path / "again"), expected)
    loaded = load_with_peft(type(model).from_pretrained(path), tmp_path / "again").merge_and_unload()
    assert_same(loaded.state_dict(), type(model).from_pretrained(tmp_path / "merged").state_dict())
    assert_same(loaded.state_dict(), adapted.merge_and_unload().state_dict())


def test_unknown_order_of_unsloth_is_refused(tmp_path):
    path, model = checkpoint("qwen3_moe", tmp_path / "checkpoint")
    adapt(type(model).from_pretrained(path), BY_PARAMETER["only down"]).save_pretrained(tmp_path / "adapter")
    as_by(None, tmp_path / "adapter", lambda a, b: (a, b), "expert_minor")
    with pytest.raises(amc.CheckpointError, match="lora_B_layout: 'expert_minor'"):
        amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")


def checkpoint(name: str, directory: Path, equal: str | None = None) -> tuple[Path, PreTrainedModel]:
    """Write a published checkpoint of a type; return its path and its model."""
    model = build_model(name, equal=equal)
    write_checkpoint(model, directory)
    return directory, model


def module_tree(path: Path, model: PreTrainedModel) -> nn.Module:
    """Return linear layers with the published names and weights of a checkpoint, one for each expert and projection."""
    tensors = tensors_of(path)
    tree = nn.Module()
    for name, (rows, columns) in (expert_modules(tensors) | linear_modules(model, tensors)).items():
        *parents, leaf = name.split(".")
        owner = tree
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(tensors[f"{name}.weight"].clone())
        owner.add_module(leaf, layer)
    return tree


def adapt(model: nn.Module, settings: dict[str, Any]) -> PeftModel:
    """Return a model with an adapter of PEFT and random factors."""
    chosen: dict[str, Any] = {"r": 2, "lora_alpha": 4} | settings
    adapted = get_peft_model(model, LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data.copy_(dyadic(parameter.shape, generator))
    return adapted


def as_by(
    release: str | None,
    adapter: Path,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    order: str | None = None,
) -> None:
    """Change the factors of all experts of an adapter, and state another release of PEFT and Unsloth's order of B."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if release == "0.17.1":  # states no version
        del config["peft_version"]
    elif release is not None:
        config["peft_version"] = release
    if order is not None:
        config["lora_B_layout"] = order
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "experts" in name and ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        tensors[name], tensors[other] = (t.contiguous() for t in change(tensors[name], tensors[other]))
    save_file(tensors, file, metadata={"format": "pt"})


def grouped(b: Tensor, experts: int) -> Tensor:
    """Return a B of PEFT with the columns of each expert next to each other: unslothai/unsloth-zoo#1232."""
    return b.unflatten(1, (-1, experts)).transpose(1, 2).flatten(1)


def exchanged(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the transposed stack: PEFT 0.18.1, ``ParamWrapper`` in ``tuners/lora/layer.py``.

    Each expert's product is transposed, so that its new A is the transpose of its B.
    """
    a_of = a.unflatten(0, (experts, -1))  # [experts, rank, in]
    b_of = b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [experts, out, rank]
    return b_of.transpose(1, 2).flatten(0, 1), a_of.permute(2, 1, 0).flatten(1)
