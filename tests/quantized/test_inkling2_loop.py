"""Tests of Inkling2Loop's experts, which no config describes: every value, every door, and every part that is wrong."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.operations import OPERATIONS
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.execution.simulated import SimulatedDevice

try:
    from transformers import Inkling2LoopForCausalLM, Inkling2LoopTextConfig
except ImportError:  # before transformers 5.24.0, or without transformers
    Inkling2LoopForCausalLM = None

needs_model = pytest.mark.skipif(
    Inkling2LoopForCausalLM is None or "Inkling2LoopDequantizeExperts" not in OPERATIONS,
    reason="this transformers does not have the model",
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
WEIGHT = "model.layers.0.mlp.experts.w13_weight"
# Factors that no float of 16 bits holds exactly, zero, infinity, NaN, subnormal, too large and negative ones.
QUOTIENTS = [
    (1.2345678, 2688.0),
    (0.0, 2688.0),
    (float("inf"), 1.0),
    (float("nan"), 1.0),
    (1e-40, 1.0),
    (3e38, 1e-3),
    (1.0, 0.0),
    (0.0, 0.0),
    (65537.0, 3.0),
    (-0.7, 7.0),
    (1e-7, 2688.0),
]


def write(directory, tensors, model_type="inkling2_loop"):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


def same_values(actual, expected):
    """Compare bits, except those of NaN, which a conversion does not specify."""
    assert actual.dtype == expected.dtype
    is_nan = expected.isnan()
    assert torch.equal(actual.isnan(), is_nan)
    assert_bytes_equal(actual.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0))


def nvfp4_values(codes, scales, amax, denominator, dtype):
    """Return the values as transformers computes them: in float32, of parts that it has cast to ``dtype``."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    factor = amax.to(dtype).float() / denominator.to(dtype).float()
    blocks = FP4[nibbles].unflatten(-1, (-1, 16)) * scales.float()[..., None]
    return (blocks * factor[:, None, None, None]).flatten(-2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_every_scale_and_quotient_of_nvfp4(tmp_path, dtype):
    """Check rows of 16 codes, one row for each byte of a scale, and an expert for each quotient."""
    experts = len(QUOTIENTS)
    codes = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8)
    parts = {
        "": codes.expand(experts, 256, 8).contiguous(),
        "_scale": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(experts, 256)[..., None],
        "_amax": torch.tensor([amax for amax, _ in QUOTIENTS]),
        "_outer_scale_denominator": torch.tensor([denominator for _, denominator in QUOTIENTS]),
    }
    write(tmp_path, {WEIGHT + suffix: part.contiguous() for suffix, part in parts.items()})
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=dtype)
    assert list(loaded) == [WEIGHT]
    same_values(loaded[WEIGHT], nvfp4_values(*parts.values(), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_every_scale_of_mxfp8(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(256, 1).view(torch.float8_e4m3fn)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(8)
    write(tmp_path, {WEIGHT: codes[None], f"{WEIGHT}_scale": scales[None, :, None].contiguous()})
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=dtype)
    expected = codes.float() * torch.exp2(scales.float() - 127)[:, None]
    same_values(loaded[WEIGHT], expected.to(dtype)[None])


def nvfp4(shape, seed=0):
    """Return the parts of a weight ``[E, rows, columns]``, by suffix."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    scales = torch.rand(experts, rows, columns // 16, generator=generator) * 4
    return {
        "": torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator),
        "_scale": scales.to(torch.float8_e4m3fn),
        "_amax": torch.rand(experts, generator=generator) + 1,
        "_outer_scale_denominator": torch.full((experts,), 2688.0),
    }


def mxfp8(shape, seed=0):
    """Return the parts of a weight ``[E, rows, columns]``, by suffix."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    scales = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    return {"": (torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn), "_scale": scales}


@pytest.mark.parametrize("shape", [(3, 4, 32), (1, 1, 16), (2, 16, 16), (2, 3, 48)], ids=str)
def test_each_expert_has_its_own_quotient(tmp_path, shape):
    parts = nvfp4(shape)
    write(tmp_path, {WEIGHT + suffix: part for suffix, part in parts.items()}, "inkling2_loop_text")
    plan = amc.compile_plan(tmp_path, rules=[])
    for given in ({"rules": []}, {"plan": amc.CopyPlan.from_json(plan.to_json())}):
        loaded = amc.load_state_dict(tmp_path, **given)
        same_values(loaded[WEIGHT], nvfp4_values(*parts.values(), torch.bfloat16))
    stored = amc.load_state_dict(tmp_path, rules=[], dequantize=False)
    assert stored.keys() == {WEIGHT + suffix for suffix in parts}
    for suffix, part in parts.items():
        assert_bytes_equal(stored[WEIGHT + suffix], part)


@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),), (Shard(2),)], ids=str)
@pytest.mark.parametrize("make", [nvfp4, mxfp8], ids=["NVFP4", "MXFP8"])
def test_each_rank_decodes_its_part(tmp_path, make, placements):
    write(tmp_path, {WEIGHT + suffix: part for suffix, part in make((3, 4, 64)).items()})
    whole = amc.load_state_dict(tmp_path, rules=[])[WEIGHT]
    checkpoint = amc.open_checkpoint(tmp_path)
    plan = amc.compile_plan(checkpoint, rules=[])
    parts = []
    for rank in range(2):
        mine = plan.shard({WEIGHT: placed(whole.shape, (2,), (rank,), placements)})
        buffers = allocate(mine.targets)
        load_to_host(mine, checkpoint, buffers)
        parts.append(buffers[WEIGHT])
    assert_bytes_equal(torch.cat(parts, placements[0].dim), whole)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_computes_the_same_quotients(tmp_path, dtype, backend):
    write(tmp_path, {WEIGHT + suffix: part for suffix, part in nvfp4((5, 4, 64)).items()})
    checkpoint = amc.open_checkpoint(tmp_path)
    plan = amc.compile_plan(checkpoint, rules=[], dtype=dtype)
    buffers = allocate(plan.targets)
    load_to_device(plan, checkpoint, buffers, SimulatedDevice(), backend=backend)
    assert_bytes_equal(buffers[WEIGHT], amc.load_state_dict(tmp_path, rules=[], dtype=dtype)[WEIGHT])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"_amax": None}, "w13_weight has no global scale: no tensor is named {}_amax"),
        ({"_outer_scale_denominator": None}, "no divisor of its global scale"),
        ({"_outer_scale_denominator": torch.ones(2)}, "expected F32 [3]"),
        ({"_outer_scale_denominator": torch.ones(3, dtype=torch.bfloat16)}, "found BF16 [3]"),
        ({"_amax": torch.ones(2)}, "w13_weight_amax: expected one F32"),
        ({"_amax": torch.ones(3).half()}, "found F16 [3]"),
        ({"_scale": torch.ones(3, 4, 1).to(torch.float8_e4m3fn)}, "expected [3, 4, 2], found [3, 4, 1]"),
        ({"_scale": torch.ones(3, 4, 2)}, "is F32"),
        ({"_scale": None}, "w13_weight has no scale"),
        ({"": torch.ones(3, 4, 32)}, "not codes"),
    ],
    ids=lambda value: None if isinstance(value, str) else str([*value]),
)
def test_a_wrong_part_is_one_short_error(tmp_path, change, text):
    parts = {suffix: part for suffix, part in (nvfp4((3, 4, 32)) | change).items() if part is not None}
    write(tmp_path, {WEIGHT + suffix: part for suffix, part in parts.items()})
    with pytest.raises(amc.QuantizationError) as error:
        amc.load_state_dict(tmp_path, rules=[])
    assert text.format(WEIGHT) in str(error.value)
    assert "1 problems" in str(error.value)


def test_an_unquantized_checkpoint_stays_as_it_is(tmp_path):
    tensors = {WEIGHT: torch.ones(2, 4, 32, dtype=torch.bfloat16)}
    loaded = amc.load_state_dict(write(tmp_path, tensors), rules=[])
    assert_bytes_equal(loaded[WEIGHT], tensors[WEIGHT])


def test_other_model_types_need_a_config(tmp_path):
    write(tmp_path, {WEIGHT + suffix: part for suffix, part in nvfp4((3, 4, 32)).items()}, "inkling2")
    assert WEIGHT + "_amax" in amc.load_state_dict(tmp_path, rules=[])


@pytest.fixture(scope="module", params=[nvfp4, mxfp8], ids=["NVFP4", "MXFP8"])
def published(request, tmp_path_factory):
    """Return a checkpoint in the published form, and one of the same model that is not quantized."""
    directory, plain = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("plain")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    window = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 16, "sliding_window_size": 8}
    loop = {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_gate_rank": 4,
        "n_layers_per_attn_res_block": 1,
    }
    experts = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 3,
        "num_experts_per_tok": 1,
        "d_rel": 4,
        "rel_extent": 8,
    }
    sizes = {"vocab_size": 40, "unpadded_vocab_size": 37, "hidden_size": 64, "num_hidden_layers": 4, "eos_token_id": 1}
    config = Inkling2LoopTextConfig(**heads, **window, **loop, **experts, **sizes)
    config.architectures = ["Inkling2LoopForCausalLM"]
    torch.manual_seed(0)
    model = Inkling2LoopForCausalLM._from_config(config, dtype=torch.bfloat16)
    for target in (directory, plain):
        model.save_pretrained(target)
    stored = {}
    for number, (name, tensor) in enumerate(load_file(plain / "model.safetensors").items()):
        is_expert = name.endswith((".w13_weight", ".w2_weight"))
        parts = request.param(tensor.shape, number) if is_expert else {"": tensor}
        stored |= {name + suffix: part for suffix, part in parts.items()}
    assert sum(name.endswith("_scale") for name in stored) == 8
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, plain


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(tensors[name], tensor)


@needs_model
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_are_those_of_from_pretrained(published, dtype):
    directory, _ = published
    expected = Inkling2LoopForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
    loaded = amc.load_state_dict(directory, dtype=dtype)
    assert_same(loaded, expected)
    assert not any("experts" in name for name in loaded.report.fallbacks)
    config = Inkling2LoopTextConfig.from_pretrained(directory)
    model = Inkling2LoopForCausalLM._from_config(config, dtype=dtype)
    amc.load_model(model, directory)
    assert_same(model.state_dict(), expected)
    with amc.accelerate_transformers() as record:
        hooked = Inkling2LoopForCausalLM.from_pretrained(directory, dtype=dtype)
    assert_same(hooked.state_dict(), expected)
    [load] = record.loads
    assert sum("experts" in name for name in load.lowered) == 8


@needs_model
def test_the_model_is_saved_and_converted_as_values(published, tmp_path):
    directory, plain = published
    expected = Inkling2LoopForCausalLM.from_pretrained(directory)
    amc.save_checkpoint(expected, tmp_path / "saved", carry=directory)
    amc.convert_checkpoint(directory, tmp_path / "values", dequantize=True)
    amc.convert_checkpoint(directory, tmp_path / "nemo", dequantize=True, layout="nemo")
    names = load_file(plain / "model.safetensors").keys()
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == names
    for result in ("saved", "values"):
        assert_same(Inkling2LoopForCausalLM.from_pretrained(tmp_path / result).state_dict(), expected.state_dict())
    for result in ("saved", "values", "nemo"):
        assert_same(amc.load_state_dict(tmp_path / result), expected.state_dict())
    amc.verify_checkpoint(directory, tmp_path / "nemo", dequantize=True, layout="nemo")
