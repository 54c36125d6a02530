"""Conversions planned from headers: what is written, what is carried, what is left out, and in which files."""

import json

import pytest
import torch

from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.files import system
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.layouts import PER_EXPERT
from automodel_conv.publishing.conversion import compile_conversion
from tests.execution.support import write_checkpoint

GROUPED = {
    "layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 6),
    "layers.0.mlp.experts.down_proj": torch.ones(2, 6, 4),
    "norm.weight": torch.ones(6),
}


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path, {"a.safetensors": GROUPED})


def shapes(conversion):
    return {target.name: target.shape for target in conversion.plan.targets}


def test_without_rules_names_and_bytes_stay_and_files_are_divided_anew(source):
    conversion = compile_conversion(source, rules=[], max_shard_size=400)
    assert shapes(conversion) == {name: tuple(tensor.shape) for name, tensor in GROUPED.items()}
    assert [shard.name for shard in conversion.shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert conversion.bytes_needed == sum(shard.nbytes for shard in conversion.shards)
    assert (conversion.carried, conversion.left_out) == ((), ())


def test_a_layout_renames_and_transposes_grouped_experts(source):
    conversion = compile_conversion(source, rules=[], source_layout="transformers", layout="nemo")
    assert shapes(conversion) == {
        "layers.0.mlp.experts.gate_and_up_projs": (2, 6, 8),
        "layers.0.mlp.experts.down_projs": (2, 4, 6),
        "norm.weight": (6,),
    }
    assert conversion.naming.layout == "nemo"


def test_nothing_but_headers_is_read(source, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("data was read")

    monkeypatch.setattr(system, "preadv", refuse)
    assert compile_conversion(source, rules=[]).bytes_needed > 0


def test_a_dtype_casts_floating_tensors_alone(tmp_path):
    source = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.ones(2), "steps": torch.ones(2).long()}})
    conversion = compile_conversion(source, rules=[], dtype=torch.bfloat16)
    assert {t.name: t.dtype for t in conversion.plan.targets} == {"a": "BF16", "steps": "I64"}
    with pytest.raises(UnsupportedError):
        compile_conversion(source, rules=[], dtype=torch.int8)


@pytest.mark.parametrize("drop", ["norm.*", ["norm.weight"], ["*.weight", "norm.weight"]], ids=str)
def test_dropped_tensors_are_left_out(source, drop):
    conversion = compile_conversion(source, rules=[], drop=drop)
    assert "norm.weight" not in shapes(conversion)
    assert conversion.left_out == ("norm.weight",)


def test_a_pattern_that_matches_nothing_and_an_unknown_layout_are_refused(source):
    with pytest.raises(UnsupportedError, match=r"(?s)to drop.*mtp\.\*"):
        compile_conversion(source, rules=[], drop="mtp.*")
    with pytest.raises(UnsupportedError, match="numo"):
        compile_conversion(source, rules=[], layout="numo")
    with pytest.raises(UnsupportedError, match="size"):
        compile_conversion(source, rules=[], max_shard_size="many")


def test_grouped_experts_that_no_rule_splits_are_refused(source):
    with pytest.raises(UnsupportedError, match="gate_up_proj"):
        compile_conversion(source, rules=[], layout=PER_EXPERT)


def test_codes_that_no_config_describes_are_refused(tmp_path):
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1)}
    source = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    with pytest.raises((QuantizationError, UnsupportedError), match=r"a\.weight"):
        compile_conversion(source, rules=[], dequantize=True)
    assert shapes(compile_conversion(source, rules=[])) == {"a.weight": (4, 4), "a.weight_scale_inv": (1, 1)}


def test_codes_are_decoded_if_that_is_asked_for_and_kept_otherwise(tmp_path):
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path, {"a.safetensors": {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1)}})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = compile_conversion(open_checkpoint(tmp_path), rules=[])
    assert {t.name: t.dtype for t in kept.plan.targets} == {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"}
    decoded = compile_conversion(str(tmp_path), rules=[], dequantize=True, dtype=torch.float32)
    assert {t.name: t.dtype for t in decoded.plan.targets} == {"a.weight": "F32"}
