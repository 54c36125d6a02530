"""Tests of quantized models: equal to transformers' loads and to exact values rounded once, whole and in parts."""

import itertools
import json
import re

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

import transformers
from torch.distributed.tensor import Replicate, Shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Mxfp4Config,
    core_model_loading,
    modeling_utils,
)
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.layouts import LAYOUTS
from automodel_conv.planning.methods.method import part_name
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.registry import model_rules
from tests.comparing import assert_same_in_order, contents
from tests.doors.layouts_on_disk.support import config_of
from tests.integrations.support import assert_same_model
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import build_model, fill, write_checkpoint
from tests.planning.element_maps import assert_same_target, assert_same_targets
from tests.quantized.producers import FLOAT4, FLOAT8, INT4, compressed, fine_grained

QUANTIZED = re.compile(r"(proj(_with_mqa)?|w[123])\.weight$")
# Divides the shapes, as transformers requires; it would read other scales as those of equal blocks.
DIVIDING = fine_grained((2, 2))


def quantized(name, directory, producer=DIVIDING, model=None):
    """Write a checkpoint of the zoo with quantized projections; return its model class and exact values by name."""
    model = model or build_model(name)
    write_checkpoint(model, directory, 1 << 30)
    stored, exact = {}, {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        if tensor.dim() != 2 or not QUANTIZED.search(key):
            stored[key] = tensor
            continue
        parts, exact[key] = producer.make(tensor)
        stored |= {part_name(key, suffix): part.contiguous() for suffix, part in parts.items()}
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
    if hasattr(stock, "_weight_conversions"):  # before 5.24, transformers cannot revert dequantized weights
        for model in (hooked, stock):
            with pytest.raises(ValueError, match="Undefined Operation"):
                model.save_pretrained(tmp_path / "saved")
        return
    stock.save_pretrained(tmp_path / "stock")
    hooked.save_pretrained(tmp_path / "hooked")
    amc.save_checkpoint(hooked, tmp_path / "ours")
    assert contents(tmp_path / "hooked") == contents(tmp_path / "ours") == contents(tmp_path / "stock")


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v3", "mixtral"])
def test_unquantized_weights_have_the_dtype_of_from_pretrained(tmp_path, name):
    """Check that weights keep the dtype of the file or get that of the model; releases differ in which."""
    model_class, _ = quantized(name, tmp_path)
    file = tmp_path / "model.safetensors"
    plain = {n: t for n, t in load_file(file).items() if t.element_size() > 1 and not n.endswith("_scale_inv")}
    bare = {n: t.to(torch.bfloat16) for n, t in plain.items() if t.dtype == torch.float32}
    wide = {n: t.float() for n, t in plain.items() if n.endswith(("gate.weight", ".bias"))}
    save_file(load_file(file) | bare | wide, file, metadata={"format": "pt"})
    stock = model_class.from_pretrained(tmp_path).state_dict()
    with amc.accelerate_transformers():
        hooked = model_class.from_pretrained(tmp_path).state_dict()
    for tensors in (amc.load_state_dict(tmp_path), hooked):
        assert tensors.keys() == stock.keys()
        for key, tensor in stock.items():
            assert tensors[key].dtype == tensor.dtype, key
            assert_bytes_equal(tensors[key], tensor)
    if "model.layers.0.attn_norm.weight" in plain:  # 5.12 saves the model's name
        casts = Version(transformers.__version__) >= Version("5.24")
        norm = stock["model.layers.0.input_layernorm.weight"]
        assert norm.dtype == (torch.float32 if casts else torch.bfloat16)


@pytest.mark.parametrize("block", [(2, 2), (7, 20)], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_fp8_models_are_exact_values_rounded_once(tmp_path, name, block):
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
    """Write a gpt-oss with random blocks and scales, without exponents that bfloat16 cannot hold."""
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


def test_gpt_oss_in_mxfp4_equals_that_of_transformers(tmp_path):
    gpt_oss(tmp_path / "published")
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "published", **settings).state_dict()
    loaded = amc.load_state_dict(tmp_path / "published")
    assert loaded.keys() == stock.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, stock[key])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "transformers"])
def test_quantized_experts_load_in_every_layout(tmp_path, layout):
    config = config_of("qwen3_moe", 3, 100 if layout == "vllm_trtllm_padded" else 128, 64)
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    fill(model)
    quantized("", tmp_path, fine_grained((7, 20)), model)
    plain = amc.load_state_dict(tmp_path)
    wanted = amc.load_state_dict(tmp_path, layout=layout)
    expected = amc.convert_state_dict(dict(plain), rules=[], source_layout="transformers", layout=layout)
    assert wanted.keys() == expected.keys()
    for key, tensor in wanted.items():
        assert_bytes_equal(tensor, expected[key])


PLACEMENTS = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(2)), (Shard(2), Replicate())]


@pytest.mark.parametrize("scratch_bytes", [None, 40_000], ids=["default scratch", "little scratch"])
@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_rank_decodes_its_part_even_across_blocks(tmp_path, name, placements, scratch_bytes):
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
        mine = plan.shard(regions)
        buffers = allocate(mine.targets)
        for buffer in buffers.values():
            buffer.view(torch.uint8).fill_(0xA5)
        load_to_host(mine, checkpoint, buffers, threads=2, scratch_bytes=scratch_bytes)
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


def keeping(directory, model_class):
    """Return the model of a quantized checkpoint on the meta device, with codes and scales as parameters."""
    config = AutoConfig.from_pretrained(directory)
    quantizer = AutoHfQuantizer.from_config(dict(config.quantization_config), pre_quantized=True)
    quantizer.quantization_config.dequantize = False
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
        quantizer.preprocess_model(model=model, device_map=None, dtype=torch.bfloat16, checkpoint_files=None)
    model.hf_quantizer = quantizer
    return model


def not_decoded(plan, checkpoint):
    """Return the targets of a plan that no decoded source fills, by name, with the rows of the checkpoint."""
    row = {name: row for row, name in enumerate(checkpoint.names)}
    plain = [target for target in plan.targets if plan.sources.decodes.keys().isdisjoint(target.sources)]
    return {t.name: t._replace(sources=tuple(row[plan.sources.names[r]] for r in t.sources)) for t in plain}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_traced_loader_of_transformers_computes_what_is_decoded_and_copies_the_rest(tmp_path, name):
    if name == "gpt_oss":
        gpt_oss(tmp_path / "published")
        model_class, settings = GptOssForCausalLM, {"quantization_config": Mxfp4Config(dequantize=True)}
    else:
        model_class, _ = quantized(name, tmp_path / "published")
        settings = {}

    def load(tensors):
        config = AutoConfig.from_pretrained(tmp_path / "published")
        return model_class.from_pretrained(None, config=config, state_dict=tensors, **settings).state_dict()

    checkpoint = amc.open_checkpoint(tmp_path / "published")
    plan = amc.compile_plan(checkpoint)
    planned = not_decoded(plan, checkpoint)
    loaded = amc.load_with(load, tmp_path / "published", calls="dict")
    assert loaded.report.computed.keys() == {target.name for target in plan.targets} - planned.keys()
    copied = not_decoded(amc.trace_loader(load, checkpoint, calls="dict"), checkpoint)
    assert copied.keys() == planned.keys()
    for key, target in copied.items():
        assert_same_target(target, planned[key])
    stock = model_class.from_pretrained(tmp_path / "published", **settings).state_dict()
    assert_same_in_order(loaded, stock)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="its loader has other arguments")
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_traced_loader_of_a_model_that_keeps_codes_copies_what_is_planned(tmp_path, name):
    model_class, _ = quantized(name, tmp_path)
    model = keeping(tmp_path, model_class)
    quantizer = model.hf_quantizer

    def load(tensors):
        config = modeling_utils.LoadStateDictConfig(
            dtype=torch.bfloat16,
            dtype_plan=model._get_dtype_plan(torch.bfloat16),
            hf_quantizer=quantizer,
            weight_mapping=model_rules(model, None, quantizer),
        )
        core_model_loading.convert_and_load_state_dict_in_model(model, tensors, config)

    trace = amc.trace_loader(load, tmp_path, model, calls="dict")
    assert_same_targets(trace, amc.compile_plan(tmp_path, keeping(tmp_path, model_class), dequantize=False))


@pytest.mark.parametrize("layout", [None, "nemo", "vllm"])
def test_codes_and_scales_are_grouped_the_same_for_a_model_that_keeps_them(tmp_path, layout):
    model_class, _ = quantized("qwen3_moe", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    loaded = amc.load_state_dict(tmp_path, keeping(tmp_path, model_class), layout=layout, dequantize=False)
    experts = model_class.config_class.from_pretrained(tmp_path).num_experts
    names = {"nemo": "gate_and_up_projs", "vllm": "w13_weight"}
    for suffix in ("", "_scale_inv"):
        both = [
            torch.cat([stored[f"model.layers.1.mlp.experts.{e}.{side}_proj.weight{suffix}"] for side in ("gate", "up")])
            for e in range(experts)
        ]
        expected = torch.stack(both)
        if layout == "nemo":
            expected = expected.transpose(1, 2).contiguous()
        grouped = loaded[f"model.layers.1.mlp.experts.{names.get(layout, 'gate_up_proj')}{suffix}"]
        assert_bytes_equal(grouped, expected)


def test_gate_and_up_that_share_scales_do_not_alternate(tmp_path):
    model_class, _ = quantized("qwen3_moe", tmp_path)
    with pytest.raises(amc.UnsupportedError, match="cannot be separated"):
        amc.load_state_dict(tmp_path, keeping(tmp_path, model_class), layout="gpt_oss", dequantize=False)


def test_a_model_that_keeps_codes_is_filled_in_place(tmp_path):
    model_class, _ = quantized("deepseek_v3", tmp_path)
    model = keeping(tmp_path, model_class)
    report = amc.load_model(model, tmp_path, dequantize=False)
    assert report.missing_keys == report.unexpected_keys == ()
    stored = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert state["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    for key in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv"):
        assert_bytes_equal(state[key], stored[key])
    with pytest.raises(amc.UnsupportedError, match="dequantize=False keeps them"):
        amc.load_model(keeping(tmp_path, model_class), tmp_path)


def test_codes_without_a_config_are_one_error(tmp_path):
    model_class, _ = quantized("mixtral", tmp_path)
    with torch.device("meta"):
        model = model_class(AutoConfig.from_pretrained(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(amc.QuantizationError, match=r"w1\.weight has the form of quantized codes"):
        amc.load_model(model, tmp_path)


def test_a_lost_scale_is_named_and_nothing_written(tmp_path):
    _, exact = quantized("mixtral", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = next(iter(exact)) + "_scale_inv"
    del stored[lost]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(amc.QuantizationError, match=re.escape(lost)):
        amc.load_state_dict(tmp_path)


def test_too_little_scratch_is_refused_before_anything_is_read(tmp_path):
    quantized("mixtral", tmp_path)
    with pytest.raises(amc.ConversionError, match="too small to decode"):
        amc.load_state_dict(tmp_path, threads=1, scratch_bytes=4096)


def small_mixtral(intermediate=96):
    config = MixtralConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=intermediate,
        num_local_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model


@pytest.mark.skipif(not hasattr(HfQuantizer, "serialized_names"), reason="this transformers does not decode them")
@pytest.mark.parametrize(
    ("producer", "intermediate", "by_plan"),
    [
        (compressed("pack-quantized", **INT4, strategy="group", group_size=16), 96, True),
        (compressed("pack-quantized", **INT4, strategy="channel"), 100, True),
        (compressed("float-quantized", **FLOAT8, strategy="channel"), 96, True),
        (compressed("nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16), 96, False),
    ],
    ids=["int4", "int4, padded", "fp8", "nvfp4, which transformers rounds in bfloat16 on the way"],
)
def test_under_the_hook_compressed_tensors_load_as_without(tmp_path, producer, intermediate, by_plan):
    settings = {"quantization_status": "compressed", "ignore": ["lm_head"]}
    producer = producer._replace(config=dict(producer.config) | settings)
    quantized("mixtral", tmp_path, producer, small_mixtral(intermediate))
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    stock = MixtralForCausalLM.from_pretrained(tmp_path, **options)
    with amc.accelerate_transformers() as acceleration:
        hooked = MixtralForCausalLM.from_pretrained(tmp_path, **options)
    [load] = acceleration.loads
    assert bool(load.lowered) is by_plan
    assert bool(load.left) is not by_plan
    assert_same_model(hooked, stock)


def test_int4_with_zero_points_is_loaded(tmp_path):
    producer = compressed("pack-quantized", **INT4, strategy="group", group_size=16, symmetric=False)
    _, exact = quantized("mixtral", tmp_path, producer, small_mixtral())
    loaded = amc.load_state_dict(tmp_path)
    expected = [exact[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"].numpy() for e in range(4)]
    experts = loaded["model.layers.1.mlp.experts.down_proj"]
    for expert, numbers in zip(experts, expected, strict=True):
        assert_bytes_equal(expert.clone(), rounded(numbers, torch.bfloat16))
