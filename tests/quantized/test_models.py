"""Models of quantized checkpoints: as upstream loads them, as the exact numbers rounded once, whole and in parts."""

import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the models, and what they are compared with, are transformers'")

from torch.distributed.tensor import Replicate, Shard
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.cpu import load_files
from automodel_conv.planning.sharding import placed, shard_plan
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.support import assert_same_model
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import build_model, write_checkpoint
from tests.quantized.producers import fine_grained

QUANTIZED = re.compile(r"(proj|w[123])\.weight$")
# Divides what transformers decodes; it would take the scales of others for those of equal blocks.
DIVIDING = fine_grained((2, 2))


def quantized(name, directory, producer=DIVIDING):
    """A checkpoint of the zoo with its projections quantized, and what those are exactly, by name."""
    model = build_model(name)
    write_checkpoint(model, directory, 1 << 30)
    stored, exact = {}, {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        if tensor.dim() != 2 or not QUANTIZED.search(key):
            stored[key] = tensor
            continue
        parts, exact[key] = producer.make(tensor)
        stored |= {key + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": dict(producer.config)}))
    return type(model), exact


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_under_the_hook_fp8_models_load_as_without(tmp_path, name):
    model_class, _ = quantized(name, tmp_path / "published")
    stock = model_class.from_pretrained(tmp_path / "published")
    with amc.accelerate_transformers() as acceleration:
        hooked = model_class.from_pretrained(tmp_path / "published")
    [load] = acceleration.loads
    assert load.left == {}
    assert any("experts" in target for target in load.lowered)
    assert any("self_attn" in target for target in load.lowered)
    assert_same_model(hooked, stock)
    for model in (hooked, stock):  # transformers has no way back from what it has dequantized, and tells only here
        with pytest.raises(ValueError, match="Undefined Operation"):
            model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("block", [(2, 2), (7, 20)], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_fp8_models_are_the_exact_numbers_rounded_once(tmp_path, name, block):
    model_class, exact = quantized(name, tmp_path / "quantized", fine_grained(block))
    plain = tmp_path / "plain"
    plain.mkdir()
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    kept = {key: tensor for key, tensor in stored.items() if key.removesuffix("_scale_inv") not in exact}
    numbers = {key: rounded(value.numpy(), torch.bfloat16) for key, value in exact.items()}
    save_file(kept | numbers, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    expected = model_class.from_pretrained(plain, dtype="auto").state_dict()
    loaded = amc.load_state_dict(tmp_path / "quantized")
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, expected[key])


def gpt_oss(directory):
    """A gpt-oss with blocks and scales of random bits, but no exponents that bfloat16 cannot hold."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        stored[name + "_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        stored[name + "_scales"] = torch.randint(100, 140, shape[:-1], dtype=torch.uint8, generator=generator)
    directory.mkdir()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))


def test_gpt_oss_in_mxfp4_is_what_transformers_dequantizes(tmp_path):
    gpt_oss(tmp_path / "published")
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "published", **settings).state_dict()
    loaded = amc.load_state_dict(tmp_path / "published")
    assert loaded.keys() == stock.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, stock[key])


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_quantized_experts_come_in_every_layout(tmp_path, layout):
    quantized("qwen3_moe", tmp_path, fine_grained((7, 20)))
    plain = amc.load_state_dict(tmp_path)
    wanted = amc.load_state_dict(tmp_path, layout=layout)
    expected = amc.convert_state_dict(dict(plain), rules=[], source_layout="transformers", layout=layout)
    assert wanted.keys() == expected.keys()
    for key, tensor in wanted.items():
        assert_bytes_equal(tensor, expected[key])


PLACEMENTS = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(2)), (Shard(2), Replicate())]


@pytest.mark.parametrize("scratch_bytes", [None, 40_000], ids=["", "little scratch"])
@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_rank_decodes_what_it_holds_also_where_blocks_are_cut(tmp_path, name, placements, scratch_bytes):
    if name == "fp8":
        quantized("deepseek_v3", tmp_path / "published", fine_grained((7, 20)))
    else:
        gpt_oss(tmp_path / "published")
    checkpoint = amc.open_checkpoint(tmp_path / "published")
    plan = amc.compile_plan(checkpoint)
    whole = amc.load_state_dict(tmp_path / "published")
    experts = [t for t in plan.targets if t.name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert experts
    for coordinate in itertools.product(range(3), range(2)):
        regions = {t.name: placed(t.shape, (3, 2), coordinate, placements) for t in experts}
        mine = shard_plan(plan, regions)
        buffers = allocate(mine.targets)
        for buffer in buffers.values():
            buffer.view(torch.uint8).fill_(0xA5)
        load_files(mine, checkpoint, buffers, threads=2, scratch_bytes=scratch_bytes)
        for target in experts:
            part = whole[target.name]
            for dim, runs in enumerate(regions[target.name].runs):
                index = [at for start, length in runs for at in range(start, start + length)]
                part = part.index_select(dim, torch.tensor(index, dtype=torch.int64))
            assert_bytes_equal(buffers[target.name], part)


def test_under_the_hook_gpt_oss_in_mxfp4_loads_as_without(tmp_path):
    gpt_oss(tmp_path / "published")
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "published", **settings)
    with amc.accelerate_transformers() as acceleration:
        hooked = AutoModelForCausalLM.from_pretrained(tmp_path / "published", **settings)
    [load] = acceleration.loads
    assert load.left == {}
    assert len(load.lowered) == 4
    assert_same_model(hooked, stock)
