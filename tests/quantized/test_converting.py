"""Tests of converting quantized checkpoints: decoded in every layout, or with unchanged codes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import automodel_conv as amc
from automodel_conv.cli.app import app
from automodel_conv.publishing.conversion import compile_conversion
from tests.comparing import assert_same, tensors_of
from tests.quantized.producers import FLOAT4, INT4, compressed, fine_grained
from tests.quantized.test_models import gpt_oss, quantized, small_mixtral


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("layout", [None, "transformers", "nemo", "gpt_oss", "vllm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_decoded_files_equal_a_decoded_load(tmp_path, name, layout):
    quantized(name, tmp_path / "quantized", fine_grained((7, 20)))
    report = amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", layout=layout, dequantize=True)
    assert report.left_out == ()
    assert_same(tensors_of(tmp_path / "plain"), dict(amc.load_state_dict(tmp_path / "quantized", layout=layout)))


@pytest.mark.parametrize("layout", ["nemo", "per_expert"])
def test_decoded_files_of_a_float16_model_are_rounded_once(tmp_path, layout):
    quantized("qwen3_moe", tmp_path / "quantized", fine_grained((7, 20)))
    config = {key: value for key, value in config_of(tmp_path / "quantized").items() if key != "torch_dtype"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    direct = decoded_experts(tmp_path / "quantized")
    assert {tensor.dtype for tensor in direct.values()} == {torch.float16}
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", layout=layout, dequantize=True)
    assert_same(decoded_experts(tmp_path / "plain"), direct)


def decoded_experts(path):
    return {name: tensor for name, tensor in amc.load_state_dict(path).items() if ".experts." in name}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scratch_bytes", [1 << 17, None])
def test_transformers_loads_a_decoded_checkpoint(tmp_path, scratch_bytes, threads):
    """Check names, shapes and config of the original release, in bfloat16."""
    model_class, exact = quantized("deepseek_v3", tmp_path / "quantized", fine_grained((2, 2)))
    plain = tmp_path / "plain"
    what = {"layout": "per_expert", "dequantize": True}
    amc.convert_checkpoint(tmp_path / "quantized", plain, **what, threads=threads, scratch_bytes=scratch_bytes)
    config = config_of(tmp_path / "quantized")
    del config["quantization_config"]
    assert config_of(plain) == config
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert tensors_of(plain).keys() == {name.removesuffix("_scale_inv") for name in stored}
    assert tensors_of(plain)[next(iter(exact))].dtype == torch.bfloat16
    loaded = model_class.from_pretrained(plain, dtype="auto").state_dict()
    assert_same(loaded, dict(amc.load_state_dict(tmp_path / "quantized")))
    assert amc.verify_checkpoint(tmp_path / "quantized", plain, **what)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_codes_of_single_experts_are_unchanged(tmp_path, name):
    quantized(name, tmp_path / "quantized", fine_grained((7, 20)))
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "made", layout="per_expert", max_shard_size="6KB")
    assert_same(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "quantized"))
    assert amc.verify_checkpoint(tmp_path / "quantized", tmp_path / "made") > 0


@pytest.mark.parametrize("layout", [None, "nemo", "per_expert"])
def test_report_counts_tensors_that_stay_codes(tmp_path, layout):
    """Check that a conversion with a dtype and without ``dequantize`` does not keep codes silently."""
    quantized("qwen3_moe", tmp_path / "quantized")
    what = {"layout": layout, "dtype": torch.bfloat16}
    report = amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "made", **what)
    made = tensors_of(tmp_path / "made")
    codes = {name for name, tensor in made.items() if tensor.dtype == torch.float8_e4m3fn}
    assert set(report.kept_codes) == codes
    assert re.search(rf"^kept as codes +{len(codes)}$", str(report), re.MULTILINE)
    assert amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "made", **what).kept_codes == report.kept_codes
    report = amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", **what, dequantize=True)
    assert report.kept_codes == ()
    assert "kept as codes" not in str(report)


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_command_states_that_codes_are_not_cast(tmp_path, dry_run):
    quantized("qwen3_moe", tmp_path / "quantized")
    command = ["convert", str(tmp_path / "quantized"), str(tmp_path / "made"), "--layout", "per_expert", *dry_run]
    result = CliRunner().invoke(app, [*command, "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert re.search(r"kept as codes +│ +[1-9]\d*", result.stdout)
    assert "--dtype casts neither codes nor their scales: --dequantize decodes them" in result.stdout
    assert "grouped experts" not in result.stdout
    as_json = CliRunner().invoke(app, [*command, "--dtype", "bfloat16", "--json"])
    assert "--dtype casts neither codes nor their scales" in as_json.stderr
    assert len(json.loads(as_json.stdout)["result"]["kept_codes"]) > 1
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "--dtype" not in result.stdout


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_command_states_that_a_type_is_published_with_grouped_experts(tmp_path, dry_run):
    gpt_oss(tmp_path / "quantized")
    command = ["convert", str(tmp_path / "quantized"), str(tmp_path / "made"), "--dequantize", *dry_run]
    result = CliRunner().invoke(app, [*command, "--layout", "per_expert"])
    assert result.exit_code == 0, result.output
    assert "gpt_oss is published with grouped experts: per_expert leaves them grouped" in result.stdout
    as_json = CliRunner().invoke(app, [*command, "--layout", "per_expert", "--json"])
    assert "gpt_oss is published with grouped experts: per_expert leaves them grouped" in as_json.stderr
    assert as_json.stdout.count("\n") == 1


@pytest.mark.parametrize("layout", [None, "per_expert"])
@pytest.mark.parametrize("decoded", [False, True])
def test_verifying_with_other_options_suggests_to_decode(tmp_path, decoded, layout):
    quantized("qwen3_moe", tmp_path / "quantized")
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "made", layout=layout, dequantize=decoded)
    with pytest.raises(amc.VerificationError) as error:
        amc.verify_checkpoint(tmp_path / "quantized", tmp_path / "made", layout=layout, dequantize=not decoded)
    found = "BF16 instead of codes suggests" if decoded else "codes instead of values suggest"
    assert f"drop=; {found} dequantize={decoded}\n" in str(error.value)
    command = ["verify", str(tmp_path / "quantized"), str(tmp_path / "made"), *(["--layout", layout] if layout else [])]
    result = CliRunner().invoke(app, [*command, *([] if decoded else ["--dequantize"])])
    assert result.exit_code == 1
    options = "--no-model or --recipe, --layout, --dtype, --dequantize, --drop"
    option = "--dequantize" if decoded else "leaving --dequantize out"
    assert f"do:       pass the options of the conversion: {options}; {found} {option}\n" in result.stderr


def test_wrong_value_is_detected(tmp_path):
    quantized("qwen3_moe", tmp_path / "quantized")
    what = {"layout": "per_expert", "dequantize": True}
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", **what)
    file = tmp_path / "plain" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(amc.VerificationError, match="does not match its source"):
        amc.verify_checkpoint(tmp_path / "quantized", tmp_path / "plain", **what)


@pytest.mark.parametrize("layout", [None, "nemo", "vllm"])
def test_gpt_oss_in_mxfp4_is_decoded_in_the_right_order(tmp_path, layout):
    gpt_oss(tmp_path / "quantized")
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", layout=layout, dequantize=True)
    assert_same(tensors_of(tmp_path / "plain"), dict(amc.load_state_dict(tmp_path / "quantized", layout=layout)))


@pytest.mark.parametrize(
    "producer",
    [
        compressed("pack-quantized", **INT4, strategy="group", group_size=16),
        compressed("nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16),
    ],
    ids=["int4", "nvfp4"],
)
def test_packed_codes_are_decoded(tmp_path, producer):
    quantized("mixtral", tmp_path / "quantized", producer, small_mixtral())
    what = {"rules": [], "dequantize": True}
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", **what, dtype=torch.float32)
    expected = amc.load_state_dict(tmp_path / "quantized", rules=[], dtype=torch.float32)
    assert_same(tensors_of(tmp_path / "plain"), dict(expected))


@pytest.mark.parametrize("layout", [None, "nemo", "gpt_oss", "vllm"])
def test_scales_of_decoded_grouped_experts_are_not_written(tmp_path, layout):
    codes = {"experts.gate_up_proj": torch.randn(2, 8, 6), "experts.down_proj": torch.randn(2, 6, 4)}
    stored = {name: numbers.to(torch.float8_e4m3fn) for name, numbers in codes.items()}
    scales = {name: torch.tensor([0.5, 4.0]).reshape(2, 1, 1) for name in codes}
    (tmp_path / "quantized").mkdir()
    tensors = stored | {name + "_scale_inv": scale for name, scale in scales.items()}
    save_file(tensors, tmp_path / "quantized" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    what = {"rules": [], "source_layout": "transformers", "layout": layout}
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", **what, dequantize=True)
    exact = {name: (stored[name].float() * scales[name]).bfloat16() for name in codes}  # powers of two
    expected = amc.convert_state_dict(exact, rules=[], source_layout="transformers", layout=layout)
    assert_same(tensors_of(tmp_path / "plain"), expected)


@pytest.mark.parametrize("dequantize", [True, False])
def test_quantization_config_is_copied_only_with_codes(tmp_path, dequantize):
    codes = torch.randn(8, 6).to(torch.float8_e4m3fn)
    (tmp_path / "quantized").mkdir()
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.tensor([[0.5]])}
    save_file(tensors, tmp_path / "quantized" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    for name, content in (("config.json", config), ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})):
        (tmp_path / "quantized" / name).write_text(json.dumps(content))
    report = amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "made", rules=[], dequantize=dequantize)
    assert report.files_copied == ("config.json",) + (() if dequantize else ("hf_quant_config.json",))
    assert sorted(path.name for path in (tmp_path / "made").glob("*.json")) == list(report.files_copied)
    assert config_of(tmp_path / "made") == ({} if dequantize else config)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}], ids=str)
def test_a_config_under_its_older_name_is_read(tmp_path, config):
    codes = torch.randn(8, 6).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.tensor([[0.5]])}, tmp_path / "model.safetensors")
    config = config | {"compression_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert_same(dict(loaded), {"a.weight": (codes.float() / 2).bfloat16()})


def test_the_command_line_decodes_and_verifies(tmp_path):
    quantized("qwen3_moe", tmp_path / "quantized")
    both = [str(tmp_path / "quantized"), str(tmp_path / "plain"), "--layout", "per_expert", "--dequantize"]
    for command in ("convert", "verify"):
        result = CliRunner().invoke(app, [command, *both])
        assert result.exit_code == 0, result.output
    loaded = dict(amc.load_state_dict(tmp_path / "plain"))
    assert_same(loaded, dict(amc.load_state_dict(tmp_path / "quantized")))


def test_codes_are_kept_by_default(tmp_path):
    quantized("qwen3_moe", tmp_path / "quantized")
    amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "copied", rules=[])
    assert_same(tensors_of(tmp_path / "copied"), tensors_of(tmp_path / "quantized"))
    assert config_of(tmp_path / "copied") == config_of(tmp_path / "quantized")


def test_codes_without_a_config_are_one_error_and_nothing_is_written(tmp_path):
    quantized("qwen3_moe", tmp_path / "quantized")
    config = config_of(tmp_path / "quantized")
    del config["quantization_config"]
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.QuantizationError, match="no config describes how to decode them"):
        compile_conversion(tmp_path / "quantized", rules=[], dequantize=True)
    with pytest.raises(amc.QuantizationError, match="no config describes how to decode them"):
        amc.convert_checkpoint(tmp_path / "quantized", tmp_path / "plain", dequantize=True)
    assert not (tmp_path / "plain").exists()


def test_saved_decoded_model_has_no_quantization_config(tmp_path):
    model_class, _ = quantized("qwen3_moe", tmp_path / "quantized")
    model = model_class(model_class.config_class.from_pretrained(tmp_path / "quantized"))
    assert hasattr(model.config, "quantization_config")
    amc.load_model(model, tmp_path / "quantized")
    amc.save_checkpoint(model, tmp_path / "saved")
    assert "quantization_config" not in config_of(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(dict(reloaded.state_dict()), dict(model.state_dict()))


@pytest.fixture
def with_more(tmp_path):
    """Write quantized experts, a quantized prediction layer, and the scale of an activation."""
    _, exact = quantized("qwen3_moe", tmp_path / "source", fine_grained((7, 20)))
    file = tmp_path / "source" / "model.safetensors"
    stored = load_file(file)
    name = next(iter(exact))
    codes, scales = stored[name].clone(), stored[f"{name}_scale_inv"].clone()
    more = {"mtp.fc.weight": codes, "mtp.fc.weight_scale_inv": scales}
    more |= {"mtp.norm.weight": torch.ones(3), "draft.d2t": torch.arange(4)}
    scale = f"{name.removesuffix('.weight')}.input_scale"
    save_file(stored | more | {scale: torch.ones(())}, file)
    return tmp_path / "source", more, exact[name], scale


def test_carried_tensors_are_decoded_with_the_rest(with_more, tmp_path):
    source, more, exact, scale = with_more
    report = amc.convert_checkpoint(source, tmp_path / "plain", layout="nemo", dequantize=True)
    assert report.left_out == (scale,)
    extra = {name: tensor for name, tensor in tensors_of(tmp_path / "plain").items() if name in more}
    decoded = {name: tensor for name, tensor in more.items() if name != "mtp.fc.weight_scale_inv"}
    assert_same(extra, decoded | {"mtp.fc.weight": exact.to(torch.bfloat16)})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    loaded = amc.load_model(model, source, strict=False)
    assert sorted(loaded.left_out) == sorted([*more, scale])
    report = amc.save_checkpoint(model, tmp_path / "saved", carry=source)
    assert report.left_out == (scale,)
    saved = {name: tensor for name, tensor in tensors_of(tmp_path / "saved").items() if name in more}
    assert_same(saved, extra)
    assert amc.load_state_dict(tmp_path / "saved", strict=False).report.missing_keys == ()


def test_codes_are_carried_as_codes_with_the_rest(with_more, tmp_path):
    source, more, _, scale = with_more
    amc.convert_checkpoint(source, tmp_path / "made", layout="per_expert")
    assert_same(tensors_of(tmp_path / "made"), tensors_of(source))
    kept = {name: tensor for name, tensor in tensors_of(source).items() if name not in more and name != scale}
    report = amc.save_checkpoint(kept, tmp_path / "saved", rules=[], carry=source)
    assert sorted(report.carried) == sorted([*more, scale])
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(source))


@pytest.mark.parametrize("layout", [None, "nemo"])
@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("mtp.fc.weight", "mtp.fc.weight_scale_inv"),
        ("mtp.fc.weight_scale_inv", "mtp.fc.weight"),
        ("*.1.mlp.experts.2.up_proj.weight_scale_inv", "model.layers.1.mlp.experts.2.up_proj.weight"),
    ],
)
def test_codes_are_not_dropped_without_their_scales(tmp_path, layout, pattern, left):
    quantized("qwen3_moe", tmp_path / "source", fine_grained((4, 4)))
    file = tmp_path / "source" / "model.safetensors"
    stored = load_file(file)
    like = next(name for name in stored if name.endswith("up_proj.weight_scale_inv")).removesuffix("_scale_inv")
    more = {f"mtp.fc.weight{suffix}": stored[f"{like}{suffix}"].clone() for suffix in ("", "_scale_inv")}
    save_file(stored | more, file)
    with pytest.raises(amc.UnsupportedError, match="cannot be used without the tensors") as caught:
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout, drop=[pattern])
    assert f"    {left}\n" in str(caught.value)
    assert not (tmp_path / "made").exists()
    report = amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout, drop=["mtp.fc.weight*"])
    assert sorted(report.left_out) == sorted(more)
    assert report.carried == ()
    assert more.keys().isdisjoint(tensors_of(tmp_path / "made"))
