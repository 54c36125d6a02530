"""Tests of modelopt's checkpoints: published names and configs, algorithms per module, and what can be wrong in them.

The facts of each release (names, dtypes, settings) are those of its files; the values are random.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

from torch.distributed.tensor import Shard

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.config import MODELOPT_NAME
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, tensors_of
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import write_checkpoint
from tests.quantized.producers import (
    PRODUCERS,
    Producer,
    block_wise,
    int8_per_channel,
    modelopt_nvfp4,
    packed_fp4,
    square_blocks,
    weights_only_nvfp4,
)
from tests.quantized.test_converting import config_of
from tests.quantized.test_models import quantized, small_mixtral
from tests.quantized.test_schemes import weight


def exponents(weight):
    """Quantize as DeepSeek-V4's dense weights are: FP8 in blocks of 128 x 128, the scales stored as exponents."""
    stored, _ = block_wise(weight, (128, 128))
    scales = torch.exp2(stored["_scale_inv"].log2().ceil())
    spread = scales.double().repeat_interleave(128, 0)[: weight.shape[0]]
    spread = spread.repeat_interleave(128, 1)[:, : weight.shape[1]]
    codes = (weight.double() / spread).float().to(torch.float8_e4m3fn)
    return {"": codes, ".scale": scales.to(torch.float8_e8m0fnu)}, codes.double() * spread


def with_wider_scales(weight):
    """Quantize in modelopt's NVFP4 with 32 codes for each scale."""
    stored, exact = modelopt_nvfp4(weight, 32)
    return stored, exact


MAKE = {
    "FP8": PRODUCERS["fp8 of modelopt"].make,
    "FP8_PER_CHANNEL_PER_TOKEN": PRODUCERS["fp8 per channel of modelopt"].make,
    "FP8_PB_WO": PRODUCERS["fp8 blocks of modelopt"].make,
    "FP8_BLOCK_SCALES": square_blocks,  # its scales are named _scale_inv
    "MXFP8": PRODUCERS["mxfp8 of modelopt"].make,
    "NVFP4": modelopt_nvfp4,
    "NVFP4 g32": with_wider_scales,
    "W4A16_NVFP4": weights_only_nvfp4,
    "W4A8_MXFP4_FP8": PRODUCERS["mxfp4 of modelopt"].make,
    "W8A16": int8_per_channel,
    "dense of DeepSeek-V4": exponents,
    "experts of DeepSeek-V4": packed_fp4,
}


class Release(NamedTuple):
    """A published checkpoint: how each of its modules is stored, and the settings that describe it."""

    modules: dict[str, str]
    config: dict[str, Any] | None = None
    """``quantization_config`` of config.json."""
    own_file: dict[str, Any] | None = None
    """``quantization`` of hf_quant_config.json."""


CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
OF_NVFP4 = {"config_groups": {"group_0": {"input_activations": GROUP, "weights": GROUP, "targets": ["Linear"]}}}
NVFP4 = OF_NVFP4 | {"quant_algo": "NVFP4", "kv_cache_scheme": CACHE, "quant_method": "modelopt"}
OWN_NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
SIDES = ("gate_proj", "up_proj", "down_proj")


def experts(prefix, algorithm, sides=SIDES, numbers=(0, 1)):
    return {f"{prefix}.experts.{e}.{side}": algorithm for e in numbers for side in sides}


def mixed(modules, **more):
    sizes = {"NVFP4": {"group_size": 16}, "NVFP4 g32": {"group_size": 32}, "W4A16_NVFP4": {"group_size": 16}}
    layers = {name: {"quant_algo": kind.split()[0]} | sizes.get(kind, {}) for name, kind in modules.items()}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, **more}


MINIMAX_M3 = experts("language_model.model.layers.3.block_sparse_moe", "NVFP4", ("w1", "w2", "w3")) | {
    "language_model.model.layers.0.mlp.down_proj": "MXFP8",
    "language_model.model.layers.3.block_sparse_moe.shared_experts.up_proj": "MXFP8",
    "language_model.model.layers.3.self_attn.q_proj": "MXFP8",
}
EVERY_ALGORITHM = {f"model.layers.{n}.mlp.up_proj": kind for n, kind in enumerate(k for k in MAKE if " of " not in k)}

RELEASES = {
    "DeepSeek-V3.1-NVFP4": Release(
        experts("model.layers.3.mlp", "NVFP4") | {"model.layers.3.mlp.shared_experts.up_proj": "NVFP4"},
        own_file=OWN_NVFP4 | {"exclude_modules": ["lm_head", "model.layers.0.self_attn.q_a_proj", "model.layers.61*"]},
    ),
    "Kimi-K2.5-NVFP4": Release(
        experts("language_model.model.layers.1.mlp", "NVFP4"),
        NVFP4 | {"ignore": ["language_model.lm_head", "mm_projector*", "vision_tower*"]},
    ),
    "Gemma-4-26B-A4B-NVFP4": Release(
        experts("model.language_model.layers.0.moe", "NVFP4"),
        NVFP4 | {"ignore": ["lm_head", "model.language_model.layers.0.router*"]},
        OWN_NVFP4,
    ),
    "MiniMax-M2.5-NVFP4": Release(
        experts("model.layers.0.block_sparse_moe", "NVFP4", ("w1", "w2", "w3")), NVFP4, OWN_NVFP4
    ),
    "Nemotron-3-Super-120B-A12B-FP8": Release(
        experts("backbone.layers.1.mixer", "FP8", ("up_proj", "down_proj"))
        | {"backbone.layers.0.mixer.in_proj": "FP8"},
        own_file={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    ),
    "MiniMax-M3-NVFP4": Release(
        MINIMAX_M3, mixed(MINIMAX_M3, quant_method="modelopt", kv_cache_quant_algo=None, exclude_modules=["lm_head"])
    ),
    "MiniMax-M3-NVFP4, described in a file of its own": Release(MINIMAX_M3, own_file=mixed(MINIMAX_M3)),
    "MiniMax-M3-NVFP4 under the names of transformers": Release(
        {name.replace("language_model.model", "model.language_model"): kind for name, kind in MINIMAX_M3.items()},
        mixed(MINIMAX_M3, quant_method="modelopt"),
    ),
    "DeepSeek-V4-Flash-NVFP4": Release(
        experts("layers.0.ffn", "NVFP4", ("w1", "w2", "w3"))
        | {"layers.0.attn.wq_a": "dense of DeepSeek-V4", "layers.0.ffn.shared_experts.w1": "dense of DeepSeek-V4"}
        | experts("mtp.0.ffn", "experts of DeepSeek-V4", ("w1", "w2", "w3"), (0,)),
        OF_NVFP4
        | mixed({"layers.0.ffn.experts": "NVFP4", "layers.1.ffn.experts": "NVFP4"})
        | {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
            "moe_quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        },
        mixed({"layers.0.ffn.experts": "NVFP4"}),
    ),
    "the same without a list of modules": Release(
        experts("layers.0.ffn", "NVFP4", ("w1", "w2", "w3")) | {"layers.0.attn.wq_a": "dense of DeepSeek-V4"},
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
        },
    ),
    "every algorithm": Release(EVERY_ALGORITHM, mixed(EVERY_ALGORITHM, quant_method="modelopt_mixed")),
    "every algorithm, in the form of its own file": Release(
        EVERY_ALGORITHM, {"quant_method": "modelopt", "quantization": mixed(EVERY_ALGORITHM)}
    ),
    "every algorithm but one size, which the tensors alone tell": Release(
        {name: kind for name, kind in EVERY_ALGORITHM.items() if kind != "NVFP4 g32"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
    ),
}


def write(directory, release):
    """Write a release with one plain tensor and scales of a cache; return the values by name, exact in float64."""
    directory.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    for part in ("k_proj.k_scale", "v_proj.v_scale", "k_proj.k_bias", "v_proj.v_bias"):
        tensors[f"model.layers.0.self_attn.{part}"] = torch.tensor(0.5)
    exact = {}
    for n, (module, kind) in enumerate(release.modules.items()):
        stored, exact[f"{module}.weight"] = MAKE[kind](weight(96, 128, seed=n) * (n + 1))
        for suffix, part in stored.items():
            tensors[module + suffix if suffix.startswith(".") else f"{module}.weight{suffix}"] = part.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {} if release.config is None else {"quantization_config": release.config}
    (directory / "config.json").write_text(json.dumps(config))
    if release.own_file is not None:
        own_file = {"producer": {"name": "modelopt", "version": "0.43.0"}, "quantization": release.own_file}
        (directory / MODELOPT_NAME).write_text(json.dumps(own_file))
    return exact


@pytest.mark.parametrize("name", RELEASES)
def test_release_is_decoded_and_rounded_once(tmp_path, name):
    exact = write(tmp_path, RELEASES[name])
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert loaded.keys() == {*exact, "norm.weight"}
    for key, numbers in exact.items():
        assert_bytes_equal(loaded[key], rounded(numbers.numpy(), torch.bfloat16))


@pytest.mark.parametrize("name", RELEASES)
def test_codes_and_configs_are_kept_as_published(tmp_path, name):
    write(tmp_path / "source", RELEASES[name])
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert_same(dict(amc.load_state_dict(tmp_path / "source", rules=[], dequantize=False)), stored)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "kept", rules=[])
    assert_same(tensors_of(tmp_path / "kept"), stored)
    assert config_of(tmp_path / "kept") == config_of(tmp_path / "source")
    own_files = [directory / MODELOPT_NAME for directory in (tmp_path / "source", tmp_path / "kept")]
    assert own_files[0].exists() == own_files[1].exists()
    assert not own_files[0].exists() or own_files[0].read_bytes() == own_files[1].read_bytes()
    amc.save_checkpoint(stored, tmp_path / "saved", rules=[], carry=tmp_path / "source")
    assert_same(tensors_of(tmp_path / "saved"), stored)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "plain", rules=[], dequantize=True)
    assert_same(tensors_of(tmp_path / "plain"), dict(amc.load_state_dict(tmp_path / "source", rules=[])))
    assert "quantization_config" not in config_of(tmp_path / "plain")
    assert not (tmp_path / "plain" / MODELOPT_NAME).exists()


def edited(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory, error: type[amc.ConversionError] = amc.QuantizationError):
    """Return the error of both doors, which is the same and short."""
    texts = []
    for door in (amc.load_state_dict, amc.compile_plan):
        with pytest.raises(error) as caught:
            door(directory, rules=[])
        texts.append(caught.value.args[0].partition("  do:")[0])
    assert texts[0] == texts[1]
    assert len(texts[0]) < 1200
    return texts[0]


def moved(algorithm):
    """Return a change of a config that states another algorithm for all modules."""
    return lambda layers: layers.update({name: {"quant_algo": algorithm} for name in layers})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (moved("MXFP8"), "w1.weight has e2m1 codes; the config states e4m3 for its module; the same for"),
        (moved("NVFP4"), "down_proj.weight has e4m3 codes; the config states e2m1 for its module"),
        (moved("W4A8_MXFP4_FP8"), "weight_scale is F8_E4M3; these e2m1 codes have scales of F8_E8M0, U8; the same for"),
        (moved("FP8"), "weight_scale is U8; these e4m3 codes have scales of BF16, F16, F32"),
        (lambda layers: [layer.update(group_size=32) for layer in layers.values()], "expected [96, 4], found [96, 8]"),
    ],
    ids=["mxfp8", "nvfp4", "mxfp4", "fp8", "groups"],
)
def test_config_that_states_another_algorithm_than_the_tensors_is_one_short_error(tmp_path, change, problem):
    modules = MINIMAX_M3 | experts("language_model.model.layers.4.block_sparse_moe", "NVFP4", ("w1", "w2", "w3"))
    config = mixed(modules, quant_method="modelopt")
    change(config["quantized_layers"])
    write(tmp_path, Release(modules, config))
    assert problem in refused(tmp_path)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2"])
def test_lost_parts_of_all_experts_are_one_short_error(tmp_path, part):
    modules = experts("model.layers.0.mlp", "NVFP4", numbers=range(20))
    write(tmp_path, Release(modules, NVFP4))
    edited(tmp_path, lambda tensors: [tensors.pop(f"{name}.{part}") for name in modules])
    text = refused(tmp_path)
    assert "60 problems" in text
    assert f"no tensor is named model.layers.0.mlp.experts.0.down_proj.{part}" in text
    assert "and 57 more" in text


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("NVFP4", lambda t: t.update({"a.weight_scale_2": torch.ones(96)}), "expected one F32, found F32 [96]"),
        (
            "NVFP4",
            lambda t: t.update({"a.weight_scale_2": t["a.weight_scale_2"].bfloat16()}),
            "expected one F32, found BF16",
        ),
        ("NVFP4", lambda t: t.update({"a.weight_scale": t["a.weight_scale"].float()}), "a.weight_scale is F32"),
        (
            "NVFP4",
            lambda t: t.update({"a.pre_quant_scale": torch.ones(128)}),
            "inputs are multiplied by a scale: a.pre_quant_scale",
        ),
        (
            "NVFP4",
            lambda t: t.update({"a.svdquant_lora_a": torch.ones(4, 128)}),
            "low-rank residual: a.svdquant_lora_a",
        ),
        ("MXFP8", lambda t: t.update({"a.weight_scale_2": torch.ones(())}), "the config has no global scale"),
        ("MXFP8", lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:, :2].clone()}), "found [96, 2]"),
        ("FP8", lambda t: t.update({"a.weight_scale": torch.ones(96)}), "found [96]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", lambda t: t.update({"a.weight_scale": torch.ones(128)}), "found [128]"),
        ("FP8_PB_WO", lambda t: t.update({"a.weight_scale": torch.ones(1, 1, 1)}), "found [1, 1, 1]"),
    ],
)
def test_part_that_does_not_fit_is_named(tmp_path, kind, change, problem):
    write(tmp_path, Release({"a": kind}, {"quant_method": "modelopt", "quant_algo": kind}))
    edited(tmp_path, change)
    assert problem in refused(tmp_path)


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        ("NVFP4_AWQ", "multiplies inputs by a pre_quant_scale"),
        ("W4A8_AWQ", "multiplies inputs by a pre_quant_scale"),
        ("w4a16_awq", "multiplies inputs by a pre_quant_scale"),
        ("NVFP4_SVD", "adds a low-rank residual"),
        ("W8A8_SQ_PER_CHANNEL", "multiplies inputs by a pre_quant_scale"),
        ("Q4_K", ""),
    ],
)
@pytest.mark.parametrize("place", ["all", "one module", "own file"])
def test_algorithm_that_changes_weights_is_refused_by_name(tmp_path, algorithm, why, place):
    config = {"quant_algo": algorithm, "quant_method": "modelopt"}
    if place == "one module":
        config = mixed(MINIMAX_M3, quant_method="modelopt")
        config["quantized_layers"]["model.layers.0.mlp.up_proj"] = {"quant_algo": algorithm, "group_size": 128}
    own_file = config if place == "own file" else None
    write(tmp_path, Release(MINIMAX_M3, None if own_file else config, own_file))
    text = refused(tmp_path, amc.UnsupportedError)
    assert f"modelopt's {algorithm.upper()}" in text
    assert why in text


@pytest.mark.parametrize(
    "layers", [[1], {"a": 1}, {"a": {}}, {"a": {"quant_algo": "NVFP4", "group_size": -1}}, "NVFP4"], ids=str
)
def test_malformed_list_of_modules_is_one_error(tmp_path, layers):
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    write(tmp_path, Release({"a": "NVFP4"}, config))
    assert "the quantization_config of method modelopt is malformed" in refused(tmp_path)


@pytest.mark.parametrize("scales", [(), (1,), (1, 1, 1), (3,), (3, 1), (3, 1, 1)], ids=str)
def test_stack_has_one_scale_or_one_for_each_matrix(tmp_path, scales):
    codes = weight(30, 16).view(3, 10, 16).float().to(torch.float8_e4m3fn)
    factors = torch.arange(1, 4).float()[: max(1, torch.Size(scales).numel())] / 7
    tensors = {"experts.down_proj": codes, "experts.down_proj_weight_scale": factors.view(scales)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    exact = codes.double() * factors.double().view(-1, 1, 1)
    for scratch_bytes in (None, 4096):
        loaded = amc.load_state_dict(tmp_path, rules=[], threads=1, scratch_bytes=scratch_bytes)
        assert_bytes_equal(loaded["experts.down_proj"], rounded(exact.numpy(), torch.bfloat16))
    plan = amc.compile_plan(tmp_path, rules=[])
    assert amc.CopyPlan.from_json(plan.to_json()) == plan


def test_stack_of_one_matrix_may_have_scales_of_a_matrix(tmp_path):
    stored, exact = modelopt_nvfp4(weight(16, 32))
    names = {"": "", "_scale": "_weight_scale", "_scale_2": "_weight_scale_2", ".input_scale": "_input_scale"}
    tensors = {f"experts.down_proj{names[suffix]}": part for suffix, part in stored.items()}
    tensors["experts.down_proj"] = tensors["experts.down_proj"][None]
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    loaded = amc.load_state_dict(tmp_path, rules=[])["experts.down_proj"]
    assert_bytes_equal(loaded, rounded(exact[None].numpy(), torch.bfloat16))


@pytest.fixture(scope="module")
def mixed_mixtral(tmp_path_factory):
    """Write a Mixtral with NVFP4 experts and other algorithms elsewhere, and the same in exact values rounded once."""
    directory = tmp_path_factory.mktemp("mixtral")
    write_checkpoint(small_mixtral(), directory / "plain", 1 << 30)
    plain = load_file(directory / "plain" / "model.safetensors")
    modules, stored = {}, {}
    kinds = {"experts.": "NVFP4", "q_proj": "FP8", "k_proj": "MXFP8", "v_proj": "FP8_PB_WO", "o_proj": "W4A16_NVFP4"}
    for n, (name, tensor) in enumerate(plain.items()):
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is None:
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        modules[module] = kind
        parts, exact = MAKE[kind](tensor * (1 + n % 3))
        plain[name] = rounded(exact.numpy(), torch.bfloat16)
        for suffix, part in parts.items():
            stored[module + suffix if suffix.startswith(".") else name + suffix] = part.contiguous()
    save_file(plain, directory / "plain" / "model.safetensors", metadata={"format": "pt"})
    (directory / "codes").mkdir()
    save_file(stored, directory / "codes" / "model.safetensors", metadata={"format": "pt"})
    config = config_of(directory / "plain") | {"quantization_config": mixed(modules, quant_method="modelopt")}
    (directory / "codes" / "config.json").write_text(json.dumps(config))
    return directory / "codes", directory / "plain"


@pytest.mark.parametrize("layout", [None, "per_expert", "nemo", "vllm", "gpt_oss"])
def test_experts_with_different_global_scales_are_grouped(mixed_mixtral, tmp_path, layout):
    codes, plain = mixed_mixtral
    if layout != "per_expert":
        expected = dict(amc.load_state_dict(plain, layout=layout))
        assert_same(dict(amc.load_state_dict(codes, layout=layout)), expected)
    amc.convert_checkpoint(codes, tmp_path / "made", layout=layout, dequantize=True)
    assert_same(tensors_of(tmp_path / "made"), tensors_of(converted(plain, tmp_path / "also", layout)))


def converted(source, destination, layout):
    amc.convert_checkpoint(source, destination, layout=layout)
    return destination


def test_model_is_filled_and_saved(mixed_mixtral, tmp_path):
    codes, plain = mixed_mixtral
    models = []
    for source in (codes, plain):
        model = small_mixtral()
        report = amc.load_model(model, source)
        assert report.missing_keys == report.unexpected_keys == ()
        models.append(model)
    assert_same(models[0].state_dict(), models[1].state_dict())
    amc.save_checkpoint(models[0], tmp_path / "saved", carry=plain)
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(plain))


def assert_parts_are_decoded_alone(directory, dim, ranks, **options):
    """Check that each rank decodes its part of every stack, divided along a dimension, as the whole is decoded."""
    checkpoint = amc.open_checkpoint(directory)
    whole, plan = amc.load_state_dict(directory, **options), amc.compile_plan(checkpoint, **options)
    stacks = [target for target in plan.targets if len(target.shape) == 3]
    assert stacks
    for rank in range(ranks):
        mine = plan.shard({t.name: placed(t.shape, (ranks,), (rank,), [Shard(dim)]) for t in stacks})
        buffers = allocate(mine.targets)
        for buffer in buffers.values():
            buffer.view(torch.uint8).fill_(0xA5)
        load_to_host(mine, checkpoint, buffers)
        for target in stacks:
            assert_bytes_equal(buffers[target.name], whole[target.name].chunk(ranks, dim)[rank].contiguous())


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rank_decodes_its_part_of_experts_with_different_global_scales(mixed_mixtral, dim):
    codes, _ = mixed_mixtral
    assert_parts_are_decoded_alone(codes, dim, 2)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rank_decodes_its_part_of_a_stack_with_global_scales(tmp_path, dim, ranks):
    stored, _ = modelopt_nvfp4(weight(144, 48).view(6, 24, 48) * torch.arange(1, 7).view(6, 1, 1))
    names = {"": "", "_scale": "_weight_scale", "_scale_2": "_weight_scale_2", ".input_scale": "_input_scale"}
    save_file(
        {f"experts.down_proj{names[suffix]}": part for suffix, part in stored.items()}, tmp_path / "a.safetensors"
    )
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_parts_are_decoded_alone(tmp_path, dim, ranks, rules=[])


def test_packed_codes_are_not_laid_out_anew(mixed_mixtral, tmp_path):
    codes, _ = mixed_mixtral
    with pytest.raises(amc.UnsupportedError, match="codes of the format e2m1 cannot be rearranged"):
        amc.convert_checkpoint(codes, tmp_path / "made", layout="nemo")


def four_dimensional(size):
    """Return FP8 in blocks of ``size`` x ``size``, with a description for each module."""

    def make(weight):
        stored, exact = block_wise(weight, (size, size))
        return {"": stored[""], "_scale": stored["_scale_inv"][:, None, :, None]}, exact

    return Producer({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "group_size": size}, make)


@pytest.mark.parametrize("layout", ["transformers", "vllm", "per_expert"])
def test_scales_of_four_dimensions_are_kept_and_come_back(tmp_path, layout):
    quantized("mixtral", tmp_path / "source", four_dimensional(16), small_mixtral())
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout)
    assert_same(dict(amc.load_state_dict(tmp_path / "made")), dict(amc.load_state_dict(tmp_path / "source")))
    assert config_of(tmp_path / "made")["quantization_config"] == four_dimensional(16).config
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))


def test_scales_of_four_dimensions_are_not_transposed(tmp_path):
    quantized("mixtral", tmp_path / "source", four_dimensional(16), small_mixtral())
    with pytest.raises(amc.UnsupportedError, match="its scales cannot be combined"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")
