"""Tests of dtypes in a rule: where ``from_pretrained`` casts, and the dtype of the result in every public function."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", reason="the models and their references are those of transformers")

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers import conversion_mapping as registry
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader
from automodel_conv.testing import assert_bytes_equal
from tests.model_zoo import isolate_registry

pytestmark = pytest.mark.filterwarnings("ignore")

LAYER = "model.layers.0."
GATE = f"{LAYER}mlp.gate.weight"
NORMS = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"


class FunctionOperation(ConversionOps):
    """An operation that passes all sources to a function and returns its results as all targets."""

    def __init__(self, make):
        self.make = make

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = [input_dict[p][0] if isinstance(input_dict[p], list) else input_dict[p] for p in source_patterns]
        results = self.make(*tensors)
        return dict(zip(target_patterns, results if isinstance(results, tuple) else (results,), strict=True))

    @property
    def reverse_op(self):
        return self


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Return a function that registers a rule, and writes a checkpoint with its sources in place of its targets."""

    def write(sources, targets, operation, tensors):
        rules = deepcopy(registry.get_checkpoint_conversion_mapping("qwen3_moe"))
        rules.append(WeightConverter(list(sources), list(targets), operations=[operation]))
        isolate_registry(monkeypatch)
        config = Qwen3MoeConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        stored = {n: t for n, t in stored.items() if not any(n.endswith(target) for target in targets)}
        stored |= {LAYER + name: tensor for name, tensor in zip(sources, tensors, strict=True)}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        registry.register_checkpoint_conversion_mapping("qwen3_moe", rules, overwrite=True)
        return tmp_path

    return write


def on_meta(path):
    with torch.device("meta"):
        return Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig.from_pretrained(path), dtype=torch.bfloat16)


def through_all_doors(path):
    """Return the result of each public function, by its name."""
    stored = load_file(path / "model.safetensors")
    model = on_meta(path)
    amc.load_model(model, path)
    with amc.accelerate_transformers():
        hooked = Qwen3MoeForCausalLM.from_pretrained(path)
    return {
        "load_state_dict": amc.load_state_dict(path),
        "load_state_dict of a model": amc.load_state_dict(path, on_meta(path)),
        "load_model": model.state_dict(),
        "convert_state_dict": amc.convert_state_dict(stored, on_meta(path)),
        "from_pretrained under the hook": hooked.state_dict(),
    }


def assert_as_upstream(path):
    expected = Qwen3MoeForCausalLM.from_pretrained(path).state_dict()
    for door, state in through_all_doors(path).items():
        assert state.keys() == expected.keys(), door
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype, (door, name)
            assert_bytes_equal(state[name], tensor)
    return expected


def parts(dtype=torch.float32, factor=(4, 1)):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(4, 16, generator=generator) * 40
    return codes.to(dtype), torch.rand(factor, generator=generator)


@pytest.mark.parametrize(
    ("make", "tensors", "dtype"),
    [
        (lambda codes, factor: codes * factor, parts(), torch.bfloat16),
        (lambda codes, factor: codes + factor, parts(), torch.bfloat16),
        (lambda codes, factor: codes * factor, parts(factor=()), torch.bfloat16),
        (lambda codes, factor: codes * factor, parts(torch.int32), torch.bfloat16),
        (lambda codes, factor: codes * factor, parts(torch.uint8), torch.bfloat16),
        (lambda codes, factor: codes * factor, parts(torch.float8_e4m3fn), torch.bfloat16),
        (lambda codes, factor: codes.float() * factor.float(), parts(), torch.float32),
        (lambda codes, factor: codes * factor.mean().item(), parts(), torch.bfloat16),
    ],
    ids=["product", "sum", "scalar", "integers", "bytes", "float8", "created in float32", "wants values"],
)
def test_operation_gets_cast_sources_and_its_result_is_kept(checkpoint, make, tensors, dtype):
    path = checkpoint(["mlp.gate.codes", "mlp.gate.factor"], ["mlp.gate.weight"], FunctionOperation(make), tensors)
    expected = assert_as_upstream(path)
    assert expected[GATE].dtype == dtype
    assert amc.load_state_dict(path).report.fallbacks == (GATE,)
    codes, factor = (tensor.float() for tensor in tensors)
    assert not torch.equal(make(codes, factor).to(dtype), expected[GATE])  # a cast at the end would give other values


@pytest.mark.parametrize("lowered", [True, False], ids=["by plan", "by an operation of a user"])
@pytest.mark.parametrize("kept", range(2), ids=["the first is kept in float32", "the second is kept in float32"])
def test_several_targets_get_the_dtype_of_the_first(checkpoint, monkeypatch, kept, lowered):
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", [NORMS[kept].split(".")[-2]])
    operation = Chunk(dim=0) if lowered else FunctionOperation(lambda both: both.chunk(2))
    targets = [name.removeprefix(LAYER) for name in NORMS]
    both = torch.randn(32, generator=torch.Generator().manual_seed(1))
    path = checkpoint(["both_norms.weight"], targets, operation, [both])
    expected = assert_as_upstream(path)
    wanted = torch.float32 if kept == 0 else torch.bfloat16
    assert [expected[name].dtype for name in NORMS] == [wanted] * 2
    assert bool(amc.load_state_dict(path).report.fallbacks) is not lowered


@pytest.mark.parametrize("lowered", [True, False], ids=["by plan", "by an operation of a user"])
def test_existing_parameters_keep_their_dtype(checkpoint, lowered):
    operation = Chunk(dim=0) if lowered else FunctionOperation(lambda both: both.chunk(2))
    targets = [name.removeprefix(LAYER) for name in NORMS]
    both = torch.randn(32, generator=torch.Generator().manual_seed(1))
    path = checkpoint(["both_norms.weight"], targets, operation, [both])
    model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig.from_pretrained(path), dtype=torch.bfloat16)
    model.get_submodule(NORMS[1].removesuffix(".weight")).to(torch.float32)
    parameter = model.get_parameter(NORMS[1])
    amc.load_model(model, path)
    assert model.get_parameter(NORMS[1]) is parameter
    # A plan casts once; an operation receives the same inputs as in transformers.
    second = both[16:] if lowered else both[16:].bfloat16().float()
    assert_bytes_equal(model.get_parameter(NORMS[0]).detach(), both[:16].bfloat16())
    assert_bytes_equal(parameter.detach(), second)


def test_results_of_an_operation_can_be_read_through_dcp(checkpoint):
    path = checkpoint(
        ["mlp.gate.codes", "mlp.gate.factor"],
        ["mlp.gate.weight"],
        FunctionOperation(lambda codes, factor: codes * factor),
        parts(),
    )
    model = Qwen3MoeForCausalLM.from_pretrained(path)
    state = {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}
    dcp.load(state, storage_reader=HuggingFaceReader(path, model))
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(state[name], tensor)
