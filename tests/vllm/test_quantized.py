"""vLLM's classes with quantized layers: loaded by the load format, they equal those of vLLM's default loader."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm", reason="its models are built and loaded")

import torch
from vllm.config import set_current_vllm_config

from tests.files.support import packed
from tests.vllm import cases
from tests.vllm import quantized_checkpoints as checkpoints
from tests.vllm.cases import MOE
from tests.vllm.engine import every_platform
from tests.vllm.quantized_checkpoints import FORMATS
from tests.vllm.quantized_models import (
    assert_same,
    built,
    engine_config,
    kernels_on_a_cpu,
    load_by_default,
    load_by_plan,
    process,
    ranks,
    tensors_of,
)

_OF_LINEARS = [name for name in FORMATS if name not in ("bfloat16", "mxfp4", "fp8 and mxfp4")]
CASES = [
    *((checkpoints.qwen3_moe, name) for name in _OF_LINEARS if name != "auto-round"),  # experts only of a GPU
    *((checkpoints.qwen3, name) for name in _OF_LINEARS),
    (checkpoints.deepseek_v3, "fp8 per block"),
    (checkpoints.deepseek_v32, "fp8 per block"),
    (checkpoints.deepseek_v4, "fp8 and mxfp4"),
    (checkpoints.kimi_k2, "compressed-tensors w4a16"),
    (checkpoints.gpt_oss, "mxfp4"),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    checkpoints.qwen3_moe(FORMATS["bfloat16"]).write(directory)  # vLLM has groups for experts only if a model has some
    config = engine_config(directory)
    with every_platform(), kernels_on_a_cpu(), ranks(config, directory / "rendezvous"):
        yield config


def _ids(case):
    return f"{case[0].__name__}, {case[1]}"


COMPUTED = {
    # RoutedExperts.weight_loader compares the input scales of gate and up, and a scale with the 1 that is there before.
    (checkpoints.qwen3_moe, "compressed-tensors fp8 per tensor"): r"\.w(13|2)_input_scale$",
    # _try_load_fp8_indexer_wk decodes a matrix, and puts it beside one that is not quantized.
    (checkpoints.deepseek_v32, "fp8 per block"): r"\.indexer\.wk_weights_proj\.weight$",
}
"""Pattern of the parameters that vLLM computes, or whose values it reads, by case."""


def _both(directory, checkpoint, **options):
    """Write a checkpoint; return vLLM's settings, and its models as loaded by default and by plan, with the report."""
    checkpoint.write(directory)
    config = engine_config(directory, **options)
    expected, actual = built(config), built(config)
    load_by_default(config, expected)
    return config, expected, actual, load_by_plan(config, actual)


UNPROCESSED = {
    (checkpoints.qwen3_moe, "compressed-tensors mxfp4"),
    (checkpoints.qwen3_moe, "gptq of 8 bits"),
    (checkpoints.deepseek_v4, "fp8 and mxfp4"),
}
"""Cases whose processing after the load needs compiled kernels, which are absent here."""


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_codes_and_scales_are_those_of_the_default_loader(case, tmp_path):
    architecture, name = case
    config, expected, actual, planned = _both(tmp_path, architecture(FORMATS[name]))
    assert planned is not None
    assert_same(actual, expected)
    computed = re.compile(COMPUTED.get(case, "(?!)"))
    assert {*planned.report.computed} == {name for name in tensors_of(actual) if computed.search(name)}
    if case not in UNPROCESSED:
        process(config, expected)
        process(config, actual)
        assert_same(actual, expected)


KEPT = [case for case in CASES if case not in COMPUTED and case[0] != checkpoints.qwen3]


@pytest.mark.parametrize("case", KEPT, ids=_ids)
def test_loading_code_runs_once_and_not_at_all_for_a_kept_trace(case, tmp_path):
    architecture, name = case
    architecture(FORMATS[name]).write(tmp_path)
    models, runs = [], []
    for config in (engine_config(tmp_path), engine_config(tmp_path)):
        models.append(built(config))
        runs.append(load_by_plan(config, models[-1], tmp_path / "traces").runs)
    assert runs == [1, 0]
    assert_same(*models)


@pytest.mark.parametrize("case", [case for case in CASES if FORMATS[case[1]].cache_scales], ids=_ids)
def test_scales_of_the_cache_are_loaded(case, tmp_path):
    architecture, name = case
    checkpoint = architecture(FORMATS[name])
    _, _, actual, _ = _both(tmp_path, checkpoint)
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        for part in FORMATS[name].cache_scales:
            target = tensors_of(actual)[f"{layer}.attn.{part.rpartition('.')[2]}"]
            assert target.item() == checkpoint.tensors[f"{layer}.{part}"].to(target.dtype).item()


def _unequal_scales(checkpoint):
    checkpoint.tensors["model.layers.0.mlp.experts.1.up_proj.input_scale"] = torch.full((1,), 3.0)


def _unknown_name(checkpoint):
    checkpoint.tensors["model.layers.0.mlp.experts.1.up_proj.other"] = torch.ones(2)


def _wrong_shape(checkpoint):
    checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 5).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("change", [_unequal_scales, _unknown_name, _wrong_shape])
def test_errors_are_those_of_vllm(change, tmp_path):
    checkpoint = checkpoints.qwen3_moe(FORMATS["compressed-tensors fp8 per tensor"])
    change(checkpoint)
    checkpoint.write(tmp_path)
    config = engine_config(tmp_path)
    errors = []
    for load in (load_by_default, load_by_plan):
        with pytest.raises((ValueError, AttributeError, AssertionError, RuntimeError)) as error:
            load(config, built(config))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


ONLINE = ["fp8", "fp8_per_block", "fp8_per_channel", "mxfp8"]


@pytest.mark.parametrize("quantization", ONLINE)
@pytest.mark.parametrize("architecture", [checkpoints.qwen3_moe, checkpoints.qwen3])
def test_models_that_vllm_quantizes_while_it_loads_are_left_to_its_default_loader(architecture, quantization, tmp_path):
    checkpoint = architecture(FORMATS["bfloat16"])
    config, expected, actual, planned = _both(tmp_path, checkpoint, quantization=quantization)
    assert planned is None
    assert_same(actual, expected)
    process(config, expected)
    process(config, actual)
    assert_same(actual, expected)


def test_layers_that_vllm_quantizes_again_are_planned(tmp_path):
    again = {"linear": "fp8_per_tensor"}
    checkpoint = checkpoints.qwen3(FORMATS["modelopt mxfp8"])
    config, expected, actual, planned = _both(tmp_path, checkpoint, quantization_config=again)
    assert planned is not None
    assert planned.report.computed == {}
    assert_same(actual, expected)
    process(config, expected)
    process(config, actual)
    assert_same(actual, expected)


def test_model_of_which_vllm_quantizes_other_layers_is_left_to_its_default_loader(tmp_path):
    checkpoint = checkpoints.kimi_k2(FORMATS["compressed-tensors w4a16"])
    online = {"linear": "fp8_per_tensor"}
    _, expected, actual, planned = _both(tmp_path, checkpoint, quantization_config=online)
    assert planned is None
    assert_same(actual, expected)


def test_tensors_are_loaded_in_the_order_of_the_default_loader(tmp_path):
    checkpoint = checkpoints.qwen3_moe(FORMATS["fp8 per tensor"])  # the scale of the inputs of up replaces that of gate
    checkpoint.write(tmp_path)
    header, data = {}, b""
    for name, tensor in sorted(checkpoint.tensors.items(), reverse=True):
        own = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}[tensor.dtype]
        offsets = [len(data), len(data) + len(own)]
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": offsets}
        data += own
    (tmp_path / "model.safetensors").write_bytes(packed(header, data))
    config = engine_config(tmp_path)
    expected, actual = built(config), built(config)
    load_by_default(config, expected)
    assert load_by_plan(config, actual) is not None
    assert_same(actual, expected)


STACKED = {
    *("AriaForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "GptOssForCausalLM"),
    *("GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM"),
    *("GraniteMoeSharedForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    *("Gemma4UnifiedForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
}
"""Architectures whose checkpoints have one tensor for all experts."""


@pytest.mark.parametrize("architecture", [name for name in MOE if MOE[name].divided is None and name not in STACKED])
def test_quantized_experts_of_each_architecture_are_those_of_the_default_loader(architecture, one_rank, tmp_path):
    with set_current_vllm_config(one_rank):  # once vLLM has loaded a model, transformers may have layers of vLLM
        cases.write(architecture, tmp_path)
    assert checkpoints.quantize_experts(tmp_path)
    config = engine_config(tmp_path)
    expected, actual = built(config), built(config)
    load_by_default(config, expected)
    planned = load_by_plan(config, actual)
    assert planned is not None
    assert_same(actual, expected)
    assert not any(".experts." in name for name in planned.report.computed)
    assert {name for name, tensor in tensors_of(actual).items() if tensor.dtype == torch.float8_e4m3fn}


def test_scales_whose_values_vllm_reads_are_those_of_each_load(tmp_path):
    runs = []
    for seed in (0, 1):
        cases.write("Llama4ForConditionalGeneration", tmp_path)
        checkpoints.quantize_llama4(tmp_path, seed)
        expected, actual = built(engine_config(tmp_path)), built(config := engine_config(tmp_path))
        load_by_default(config, expected)
        planned = load_by_plan(config, actual, tmp_path / "traces")
        assert planned is not None
        assert planned.report.computed == {}
        assert_same(actual, expected)
        runs.append(planned.runs)
    assert runs == [5, 5]  # it reads four kinds of scales, and fills parameters with their values
