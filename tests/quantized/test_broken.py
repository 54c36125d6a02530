"""Tests of broken quantized checkpoints: one error from each load, and no byte written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", reason="needs models and quantizers of transformers")

from transformers import GptOssConfig, GptOssForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter

import automodel_conv as amc
from tests.quantized.producers import FLOAT4, FLOAT8, INT4, compressed, fine_grained
from tests.quantized.test_models import gpt_oss, quantized, small_mixtral

POISON = 0xA5
W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
PRODUCERS = {
    "fp8": fine_grained((2, 2)),
    "fp8 ue8m0": fine_grained((32, 32), "ue8m0"),
    "fp8 per channel": compressed("float-quantized", **FLOAT8, strategy="channel"),
    "int4": compressed("pack-quantized", **INT4, strategy="group", group_size=32),
    "int4 with zero points": compressed("pack-quantized", **INT4, strategy="group", group_size=32, symmetric=False),
    "nvfp4": compressed("nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16),
}
every_producer = pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)


def poisoned(model):
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).fill_(POISON)
    return model


def mixtral(directory, producer):
    """Write a quantized checkpoint; return a poisoned model to load it into."""
    quantized("mixtral", directory, producer, small_mixtral())
    return poisoned(small_mixtral())


def mxfp4(directory):
    gpt_oss(directory)
    return poisoned(GptOssForCausalLM._from_config(GptOssConfig.from_pretrained(directory), dtype=torch.bfloat16))


def edit(directory, change):
    """Apply ``change`` to the stored tensors, which it receives by name."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def assert_refused(directory, model, error, *texts, **options):
    """Check that both loads raise ``error`` with all of ``texts``, and that ``model`` is unchanged."""
    for door in (
        lambda: amc.load_model(model, directory, **options),
        lambda: amc.load_state_dict(directory, model, **options),
    ):
        with pytest.raises(error) as caught:
            door()
        assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert all((tensor.view(torch.uint8) == POISON).all() for tensor in model.state_dict().values())


@every_producer
def test_missing_scale_is_named(tmp_path, producer):
    model = mixtral(tmp_path, producer)
    lost = W2 + ("_scale_inv" if producer.config["quant_method"] == "fp8" else "_scale")
    edit(tmp_path, lambda tensors: tensors.pop(lost))
    assert_refused(tmp_path, model, amc.QuantizationError, "1 problems", f"no tensor is named {lost}")


def test_missing_scale_of_blocks_is_named(tmp_path):
    model = mxfp4(tmp_path / "broken")
    lost = "model.layers.1.mlp.experts.down_proj_scales"
    edit(tmp_path / "broken", lambda tensors: tensors.pop(lost))
    assert_refused(tmp_path / "broken", model, amc.QuantizationError, "1 problems", f"no tensor is named {lost}")


@pytest.mark.parametrize("part", ["_zero_point", "_global_scale"])
def test_missing_other_part_is_named(tmp_path, part):
    model = mixtral(tmp_path, PRODUCERS["nvfp4" if part == "_global_scale" else "int4 with zero points"])
    edit(tmp_path, lambda tensors: tensors.pop(W2 + part))
    assert_refused(tmp_path, model, amc.QuantizationError, "1 problems", f"no tensor is named {W2}{part}")


@every_producer
def test_scale_under_a_wrong_name_is_named(tmp_path, producer):
    model = mixtral(tmp_path, producer)
    scale = W2 + ("_scale_inv" if producer.config["quant_method"] == "fp8" else "_scale")
    edit(tmp_path, lambda tensors: tensors.update({W2 + ".scales": tensors.pop(scale)}))
    assert_refused(tmp_path, model, amc.QuantizationError, f"no tensor is named {scale}")


@pytest.mark.parametrize("change", ["transposed", "a row less", "flat"])
@every_producer
def test_scale_of_a_wrong_shape_is_named(tmp_path, producer, change):
    model = mixtral(tmp_path, producer)
    scale = W2 + ("_scale_inv" if producer.config["quant_method"] == "fp8" else "_scale")
    shapes = {}

    def spoil(tensors):
        right = tensors[scale]
        wrong = {"transposed": right.t(), "a row less": right[:-1], "flat": right.reshape(1, -1)}[change]
        shapes.update(right=list(right.shape), wrong=list(wrong.shape))
        tensors[scale] = wrong

    edit(tmp_path, spoil)
    text = f"expected {shapes['right']}, found {shapes['wrong']}"
    assert_refused(tmp_path, model, amc.QuantizationError, "1 problems", scale, text)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_truncated_block_tensor_is_named(tmp_path, dim):
    model = mxfp4(tmp_path / "broken")
    blocks = "model.layers.1.mlp.experts.down_proj_blocks"
    edit(tmp_path / "broken", lambda tensors: tensors.update({blocks: tensors[blocks].narrow(dim, 0, 1)}))
    name = blocks if dim == 3 else blocks.replace("_blocks", "_scales")
    assert_refused(tmp_path / "broken", model, amc.QuantizationError, "1 problems", name)


@every_producer
def test_truncated_codes_are_named(tmp_path, producer):
    model = mixtral(tmp_path, producer)
    packed = {"int4": "_packed", "int4 with zero points": "_packed", "nvfp4": "_packed"}
    codes = W2 + next((suffix for name, suffix in packed.items() if PRODUCERS[name] is producer), "")
    edit(tmp_path, lambda tensors: tensors.update({codes: tensors[codes][:8]}))
    assert_refused(tmp_path, model, amc.QuantizationError, "1 problems", W2)


def test_file_that_ends_within_codes_is_one_error(tmp_path):
    model = mxfp4(tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-16])
    assert_refused(tmp_path / "broken", model, amc.CheckpointError, "model.safetensors")


@every_producer
def test_codes_without_a_config_are_one_error(tmp_path, producer):
    model = mixtral(tmp_path, producer)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, model, amc.QuantizationError, "no config describes how to decode them")
    (tmp_path / "config.json").unlink()
    assert_refused(tmp_path, model, amc.QuantizationError, "no config describes how to decode them")


def test_blocks_without_a_config_are_one_error(tmp_path):
    model = mxfp4(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").unlink()
    assert_refused(tmp_path / "broken", model, amc.QuantizationError, "no config describes how to decode them")


@pytest.mark.parametrize("method", ["hqq", "bitsandbytes", "torchao"])
def test_methods_that_are_not_decoded_are_named(tmp_path, method):
    model = mixtral(tmp_path, PRODUCERS["fp8"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    assert_refused(tmp_path, model, amc.UnsupportedError, repr(method))


def test_config_of_another_checkpoint_is_one_error(tmp_path):
    model = mixtral(tmp_path, PRODUCERS["fp8 per channel"])
    config = json.loads((tmp_path / "config.json").read_text())
    other = {"quantization_config": dict(PRODUCERS["int4"].config)}
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    assert_refused(tmp_path, model, amc.QuantizationError, "e4m3 codes, which the config does not describe")


class Linear(nn.Module):
    def __init__(self, rows, columns, dtype=torch.bfloat16):
        super().__init__()
        self.a = nn.Linear(columns, rows, bias=False, dtype=dtype)


def checkpoint(directory, config, **parts):
    """Write a weight ``a.weight`` with parts by their suffixes."""
    save_file({f"a.weight{suffix}": part.contiguous() for suffix, part in parts.items()}, directory / "a.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return directory / "a.safetensors"


class Twice(ConversionOps):
    """An operation that is not transformers', so that its own code has to run."""

    def convert(self, input_dict, **kwargs):
        return {name: value[0].float() * 2 for name, value in input_dict.items()}


def test_codes_are_not_passed_to_operations_that_are_not_lowered(tmp_path):
    codes = torch.randn(4, 6).to(torch.float8_e4m3fn)
    path = checkpoint(tmp_path, {"quant_method": "fp8"}, **{"": codes, "_scale_inv": torch.rand(1, 1)})
    rules = [WeightConverter(["a.weight"], ["a.weight"], operations=[Twice()])]
    text = "a.weight would be filled by transformers' own code from a quantized tensor"
    assert_refused(path, poisoned(Linear(4, 6)), amc.UnsupportedError, text, rules=rules)


def test_unsupported_decoded_dtype_is_refused_before_anything_is_written(tmp_path):
    codes = torch.randn(4, 6).to(torch.float8_e4m3fn)
    path = checkpoint(tmp_path, {"quant_method": "fp8"}, **{"": codes, "_scale_inv": torch.rand(1, 1)})
    model = poisoned(Linear(4, 6, torch.float64))
    assert_refused(path, model, amc.UnsupportedError, "a.weight cannot be decoded to the dtype", "F64", rules=[])


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        (torch.tensor([16, 105]), "[16, 105]"),
        (torch.tensor([16, 96]), "[16, 96]"),
        (torch.tensor([15, 100]), "[15, 100]"),
        (torch.tensor([16, 0]), "[16, 0]"),
        (torch.tensor([16, 99.5]), "[16.0, 99.5]"),
        (torch.tensor([16]), "(1,)"),
        (torch.zeros(1 << 20), "(1048576,)"),  # too large, so it is not read
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_true_shape_that_does_not_fit_packed_rows_is_named(tmp_path, shape, found):
    producer = compressed("pack-quantized", **INT4, strategy="channel")
    parts, _ = producer.make(torch.randn(16, 100))
    path = checkpoint(tmp_path, producer.config, **parts | {"_shape": shape})
    texts = "a.weight_shape does not fit", "a.weight_packed", "expected: [16, 97 to 104]", found
    assert_refused(path, poisoned(Linear(16, 104)), amc.QuantizationError, *texts, rules=[])
