"""Tests of quantized codes under the hook: never used as values without scales, and valid loads are unchanged."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="hooks from_pretrained of transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitNetQuantConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    conversion_mapping,
    modeling_utils,
)
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.support import assert_same_model, both
from tests.model_zoo import build_model, fill, isolate_registry, write_checkpoint
from tests.quantized.producers import FLOAT8, INT4, compressed, fine_grained

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FP8 = {"quant_method": "fp8", "weight_block_size": None}
ATTENTION = r"self_attn\.[qkvo]_proj\.weight$"
EXPERTS = r"experts\.\d+\.\w+_proj\.weight$"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, **heads), dtype=torch.bfloat16)
    fill(model)
    return model


@pytest.fixture(scope="module")
def qwen():
    return build_model("qwen3_moe")


def scaled(suffix="_scale", dtype=torch.float8_e4m3fn):
    """Return a function that creates codes, one scale of a weight, and the decoded values."""

    def make(weight):
        scale = weight.float().abs().max() / (448 if dtype.is_floating_point else 127)
        codes = weight.float() / scale
        codes = codes.to(dtype) if dtype.is_floating_point else codes.round().to(dtype)
        return {"": codes, suffix: scale}, codes.double() * scale.double()

    return make


def published(model, directory: Path, pattern: str, config=None, make=None, *, grouped=False):
    """Write a checkpoint with some tensors as codes; return the decoded values by name."""
    make = make or scaled()
    write_checkpoint(model, directory, 1 << 30, original_format=not grouped)
    exact = {}

    def change(stored):
        for name in [name for name in stored if re.search(pattern, name)]:
            parts, exact[name] = make(stored.pop(name))
            stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}

    rewrite(directory, change)
    assert exact
    configure(directory, config)
    return exact


def configure(directory: Path, config):
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"quantization_config": dict(config)} if config else {}
    (directory / "config.json").write_text(json.dumps(settings))


def rewrite(directory: Path, change):
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def refused(model_class, path, **options):
    """Return the text of the only error under the hook; check that no report or patch is left."""
    before = vars(modeling_utils).copy()
    with amc.accelerate_transformers() as acceleration, pytest.raises(amc.QuantizationError) as caught:
        model_class.from_pretrained(path, **options)
    assert acceleration.loads == []
    assert vars(modeling_utils) == before
    return str(caught.value)


def cast_error(name, scale=None, dtype="F8_E4M3", wanted="BF16"):
    scale = rf"its scale is {re.escape(scale)} \(F32\)" if scale else "and it has no known scale"
    return re.compile(rf"{re.escape(name)} is {dtype}, {scale}: transformers would cast it for \S+, which is {wanted}")


@pytest.fixture
def keeping(monkeypatch):
    """Let transformers keep FP8 in the model, as it does on a GPU."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)


@pytest.mark.parametrize(
    ("kind", "pattern"), [("llama", ATTENTION), ("qwen", ATTENTION), ("qwen", EXPERTS), ("qwen", "_proj.weight$")]
)
def test_codes_of_a_method_unknown_to_transformers_are_refused_and_decoded_by_load_state_dict(
    request, tmp_path, kind, pattern
):
    model = request.getfixturevalue(kind)
    exact = published(model, tmp_path, pattern, MODELOPT)
    text = refused(type(model), tmp_path)
    listed = [name for name in exact if cast_error(name, f"{name}_scale").search(text)]
    assert len(listed) == (len(exact) if len(exact) <= 20 else 1)
    assert len(exact) <= 20 or f" and {len(exact) - 3} more\n" in text
    assert f"{len(exact)} tensors" in text
    assert "check that config.json has the quantization_config of these files" in text
    assert "give config.json" not in text  # the checkpoint has one
    assert "load_state_dict()" in text
    assert "uninstall()" in text
    loaded = amc.load_state_dict(tmp_path)
    for name in exact.keys() & loaded.keys():
        assert_bytes_equal(loaded[name], exact[name].to(torch.bfloat16))


def test_codes_of_grouped_experts_are_refused(qwen, tmp_path):
    exact = published(qwen, tmp_path, r"experts\.\w+_proj$", MODELOPT, grouped=True)
    text = refused(type(qwen), tmp_path)
    assert all(cast_error(name, f"{name}_scale").search(text) for name in exact)


def test_codes_without_a_quantization_config_are_refused(llama, tmp_path):
    exact = published(llama, tmp_path, ATTENTION, make=scaled("_scale_inv"))
    text = refused(AutoModelForCausalLM, tmp_path)
    assert all(cast_error(name, f"{name}_scale_inv").search(text) for name in exact)
    with pytest.raises(amc.QuantizationError):  # equally an error
        amc.load_state_dict(tmp_path)


@pytest.mark.parametrize(("dtype", "code"), [(torch.int8, "I8"), (torch.float8_e5m2, "F8_E5M2")])
def test_other_codes_are_refused_too(llama, tmp_path, dtype, code):
    exact = published(llama, tmp_path, ATTENTION, make=scaled(dtype=dtype))
    text = refused(type(llama), tmp_path)
    assert all(cast_error(name, f"{name}_scale", code).search(text) for name in exact)


def test_packed_codes_are_refused_before_their_shapes_are_a_mismatch(llama, tmp_path):
    published(llama, tmp_path, ATTENTION, {"quant_method": "modelopt", "quant_algo": "NVFP4"})

    def pack(stored):
        stored[Q_PROJ] = stored[Q_PROJ].view(torch.uint8)[:, ::2].contiguous()
        stored[f"{Q_PROJ}_scale"] = torch.ones(16, 1).to(torch.float8_e4m3fn)

    rewrite(tmp_path, pack)
    text = refused(type(llama), tmp_path, ignore_mismatched_sizes=True)
    assert f"{Q_PROJ} is U8, its scale is {Q_PROJ}_scale (F8_E4M3)" in text


def test_scale_in_another_file_is_detected(llama, tmp_path):
    published(llama, tmp_path, ATTENTION, MODELOPT)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {False: "model-00001-of-00002.safetensors", True: "model-00002-of-00002.safetensors"}
    for scales, file in files.items():
        part = {name: tensor for name, tensor in stored.items() if name.endswith("_scale") is scales}
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[name.endswith("_scale")] for name in stored}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(refused(type(llama), tmp_path))


def test_renamed_codes_are_detected(llama, tmp_path):
    published(llama, tmp_path, ATTENTION, MODELOPT)

    def rename(stored):
        for name in list(stored):
            stored[f"odd.{name}"] = stored.pop(name)

    rewrite(tmp_path, rename)
    text = refused(type(llama), tmp_path, key_mapping={r"^odd\.": ""})
    assert cast_error(f"odd.{Q_PROJ}", f"odd.{Q_PROJ}_scale").search(text)
    assert f"for {Q_PROJ}," in text


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16], ids=str)
def test_codes_are_refused_for_every_floating_dtype(llama, tmp_path, wanted):
    published(llama, tmp_path, ATTENTION, MODELOPT)
    code = {torch.float32: "F32", torch.float16: "F16"}[wanted]
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale", wanted=code).search(refused(type(llama), tmp_path, dtype=wanted))


def test_codes_in_memory_and_in_pickles_are_detected(llama, tmp_path):
    published(llama, tmp_path / "published", ATTENTION, MODELOPT)
    stored = load_file(tmp_path / "published" / "model.safetensors")
    text = refused(type(llama), None, config=llama.config, state_dict=dict(stored))
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(text)
    (tmp_path / "published" / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "published" / "pytorch_model.bin")
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(refused(type(llama), tmp_path / "published"))


def test_a_base_model_refuses_its_own_codes(llama, tmp_path):
    published(llama, tmp_path, ATTENTION, MODELOPT)
    text = refused(AutoModel, tmp_path)
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(text)
    assert f"for {Q_PROJ.removeprefix('model.')}," in text


def test_codes_are_refused_if_they_would_be_quantized_again(llama, tmp_path):
    published(llama, tmp_path, ATTENTION)
    from torchao.quantization import Int8WeightOnlyConfig

    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(refused(type(llama), tmp_path, **options))


def test_codes_are_refused_if_they_would_get_another_scale(keeping, llama, tmp_path):
    published(llama, tmp_path, ATTENTION)
    options = {"quantization_config": FineGrainedFP8Config(weight_block_size=(16, 16))}
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale", wanted="F8_E4M3").search(refused(type(llama), tmp_path, **options))


def test_loads_after_a_refusal_and_in_other_threads_succeed(llama, qwen, tmp_path):
    published(llama, tmp_path / "codes", ATTENTION, MODELOPT)
    write_checkpoint(qwen, tmp_path / "numbers")
    ends, one_load = [], threading.Lock()

    def refuse():
        # transformers sets torch's default dtype for the whole process while it builds a model.
        with amc.accelerate_transformers(), one_load, pytest.raises(amc.QuantizationError):
            type(llama).from_pretrained(tmp_path / "codes")
        ends.append(None)

    with amc.accelerate_transformers() as acceleration:
        threads = [threading.Thread(target=refuse) for _ in range(4)]
        for thread in threads:
            thread.start()
        with one_load:
            hooked = type(qwen).from_pretrained(tmp_path / "numbers")
        for thread in threads:
            thread.join()
        refuse()
    assert len(ends) == 5
    [load] = acceleration.loads
    assert load.lowered
    assert_same_model(hooked, qwen)


def lose(scale):
    return lambda stored: stored.pop(scale)


def test_lost_scale_is_named_if_transformers_dequantizes_or_lacks_the_method(llama, tmp_path):
    for config, suffix in ((FP8, "_scale_inv"), (MODELOPT, "_scale")):
        directory = tmp_path / config["quant_method"]
        published(llama, directory, r"_proj\.weight$", config, scaled(suffix))
        rewrite(directory, lose(Q_PROJ + suffix))
        assert cast_error(Q_PROJ).search(refused(type(llama), directory))
        with pytest.raises(amc.QuantizationError, match=re.escape(Q_PROJ)):
            amc.load_state_dict(directory)


def test_lost_scale_is_named_if_the_model_keeps_codes(keeping, llama, tmp_path):
    published(llama, tmp_path, r"_proj\.weight$", FP8, scaled("_scale_inv"))
    rewrite(tmp_path, lose(f"{Q_PROJ}_scale_inv"))
    text = refused(type(llama), tmp_path)
    why = f"transformers would initialize {Q_PROJ}_scale_inv instead of loading it"
    assert f"{Q_PROJ} is F8_E4M3, and it has no known scale: {why}" in text
    assert "1 tensors" in text


@pytest.mark.parametrize("scale", ["_scale_2", ".scale", "_scale_of_mine"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_codes_next_to_a_scale_of_any_name_are_refused_without_a_config(llama, tmp_path, scale, dtype):
    published(llama, tmp_path, re.escape(Q_PROJ), make=scaled(scale, dtype))
    assert f"its scale is {Q_PROJ}{scale}" in refused(LlamaForCausalLM, tmp_path, dtype=torch.bfloat16)


def test_float8_next_to_scales_of_a_kv_cache_is_cast(llama, tmp_path):
    def make(weight):
        codes = weight.to(torch.float8_e4m3fn)
        return {"": codes}, codes.double()

    published(llama, tmp_path, r"k_proj\.weight$", make=make)
    rewrite(tmp_path, lambda stored: stored.update({"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5)}))
    both(LlamaForCausalLM, tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", ["_scale_of_mine", ".scale"])
def test_codes_of_an_unknown_method_are_refused_with_any_scale_name(llama, tmp_path, scale):
    exact = published(llama, tmp_path, ATTENTION, {"quant_method": "mine"}, scaled(scale))
    text = refused(type(llama), tmp_path)
    assert all(cast_error(name, name + scale).search(text) for name in exact)


def test_codes_of_a_module_excluded_by_the_config_are_refused(keeping, llama, tmp_path):
    config = FP8 | {"modules_to_not_convert": ["q_proj", "lm_head"]}
    published(llama, tmp_path, r"_proj\.weight$", config, scaled("_scale_inv"))
    text = refused(type(llama), tmp_path)
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale_inv").search(text)
    assert f"{llama.config.num_hidden_layers} tensors" in text


def test_codes_of_a_module_that_compressed_tensors_ignores_are_refused(llama, tmp_path):
    producer = compressed("float-quantized", **FLOAT8, strategy="tensor")
    ignoring = {"quantization_status": "compressed", "ignore": ["lm_head", "re:.*q_proj"]}
    published(llama, tmp_path, r"_proj\.weight$", dict(producer.config) | ignoring)
    text = refused(type(llama), tmp_path)
    assert cast_error(Q_PROJ, f"{Q_PROJ}_scale").search(text)
    assert f"{llama.config.num_hidden_layers} tensors" in text


def test_codes_without_a_parameter_are_accepted(llama, tmp_path, monkeypatch):
    """Test a head that a base model leaves out, and layers that a model ignores."""
    published(llama, tmp_path, r"lm_head\.weight$", MODELOPT)
    stock, _, _ = both(AutoModel, tmp_path)
    assert not any("lm_head" in name for name in stock.state_dict())

    def ignored(stored):
        stored["lm_head.weight"] = llama.lm_head.weight.data
        for name in ("self_attn.q_proj.weight", "eh_proj.weight"):
            parts, _ = scaled()(torch.ones(16, 16))
            stored |= {f"model.layers.2.{name}{suffix}": part for suffix, part in parts.items()}

    rewrite(tmp_path, ignored)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\."])
    both(type(llama), tmp_path)


def test_scales_of_a_kv_cache_next_to_values_are_accepted(llama, tmp_path):
    write_checkpoint(llama, tmp_path, 1 << 30)

    def add(stored):
        for side in "kv":
            stored[f"model.layers.0.self_attn.{side}_proj.{side}_scale"] = torch.tensor(0.5)
            stored[f"model.layers.0.self_attn.{side}_scale"] = torch.tensor(0.5)

    rewrite(tmp_path, add)
    configure(tmp_path, MODELOPT)
    hooked = both(type(llama), tmp_path)[1]
    assert_same_model(hooked, llama)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_float8_without_any_scale_or_config_is_cast(request, tmp_path, kind):
    model = request.getfixturevalue(kind)
    write_checkpoint(model, tmp_path, 1 << 30)

    def narrow(stored):
        stored |= {n: t.to(torch.float8_e4m3fn) for n, t in stored.items() if n.endswith("_proj.weight")}

    rewrite(tmp_path, narrow)
    hooked = both(type(model), tmp_path)[1]
    expected = model.state_dict()[Q_PROJ].to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert_bytes_equal(hooked.state_dict()[Q_PROJ], expected)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_model_that_keeps_codes_and_scales_is_loaded(keeping, request, tmp_path, kind):
    model, producer = request.getfixturevalue(kind), fine_grained((2, 2))
    published(model, tmp_path, r"_proj\.weight$", producer.config, producer.make)
    hooked = both(type(model), tmp_path)[1]
    assert hooked.state_dict()[Q_PROJ].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(
    "producer",
    [
        compressed("float-quantized", **FLOAT8, strategy="channel"),
        compressed("pack-quantized", **INT4, strategy="group", group_size=16),
    ],
    ids=["fp8", "int4"],
)
def test_codes_that_compressed_tensors_accepts_are_loaded(llama, tmp_path, producer, dequantize):
    if dequantize and not hasattr(HfQuantizer, "serialized_names"):
        pytest.skip("this transformers does not decode them")
    config = dict(producer.config) | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    published(llama, tmp_path, r"_proj\.weight$", config, producer.make)
    both(type(llama), tmp_path, quantization_config=CompressedTensorsConfig(dequantize=dequantize))


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_codes_that_bitnet_accepts_are_loaded(llama, tmp_path, linear):
    """Test an operation that torch compiles, which is slow and changes nothing here."""

    def make(weight):
        packed = torch.full((weight.shape[0] // 4, weight.shape[1]), 0b01_10_00_01, dtype=torch.uint8)
        return {"": packed, "_scale": torch.tensor([0.5], dtype=torch.bfloat16)}, None

    settings = {"linear_class": linear, "quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]}
    published(llama, tmp_path, r"_proj\.weight$", BitNetQuantConfig(**settings).to_dict(), make)
    with torch.compiler.set_stance("force_eager"):
        both(type(llama), tmp_path)


class Own(ConversionOps):
    """An operation with a constant scale."""

    def convert(self, input_dict, *args, full_layer_name, **kwargs):
        [[codes]] = input_dict.values()
        return {full_layer_name: codes * 2}

    @property
    def reverse_op(self):
        return self


def test_codes_that_an_operation_of_a_user_accepts_are_loaded(llama, tmp_path, monkeypatch):
    published(llama, tmp_path, r"q_proj\.weight$")
    isolate_registry(monkeypatch)
    rule = WeightConverter("q_proj.weight$", "q_proj.weight", operations=[Own()])
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [rule], overwrite=True)
    codes = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    hooked = both(type(llama), tmp_path)[1]
    assert_bytes_equal(hooked.state_dict()[Q_PROJ], codes.to(torch.bfloat16) * 2)


def test_codes_that_torchao_accepts_are_loaded(llama, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    write_checkpoint(llama, tmp_path / "numbers")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))}
    with amc.accelerate_transformers():
        quantized = type(llama).from_pretrained(tmp_path / "numbers", **options)
    quantized.save_pretrained(tmp_path / "codes")
    stored = load_file(tmp_path / "codes" / "model.safetensors")
    assert any(tensor.dtype == torch.int8 for tensor in stored.values())
    stock = type(llama).from_pretrained(tmp_path / "codes")
    with amc.accelerate_transformers():
        hooked = type(llama).from_pretrained(tmp_path / "codes")
    for name, tensor in stock.state_dict().items():
        loaded = hooked.state_dict()[name]
        assert type(loaded) is type(tensor)
        loaded, tensor = (t.dequantize() if hasattr(t, "qdata") else t for t in (loaded, tensor))
        assert torch.equal(loaded, tensor)
