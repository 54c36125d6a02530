"""Tests of ``dtype=`` as a name and as "auto", in every public function that has it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal

CONFIG = {"dtype": "bfloat16"}
MERGED = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("a", nn.Parameter(torch.zeros(3, 2)))


@pytest.fixture
def source(tmp_path):
    """A checkpoint of float32 whose config states bfloat16."""
    directory = tmp_path / "source"
    directory.mkdir()
    save_file({"a": torch.arange(6.0).reshape(3, 2) / 7, "steps": torch.ones(1)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def loaded(source, dtype, out):
    return dict(amc.load_state_dict(source, rules=[], dtype=dtype))


def planned_and_loaded(source, dtype, out):
    return dict(amc.load_state_dict(source, rules=[], plan=amc.compile_plan(source, rules=[], dtype=dtype)))


def loaded_into_a_model(source, dtype, out):
    model = Model()
    amc.load_model(model, source, strict=False, dtype=dtype)
    return model.state_dict()


def converted(source, dtype, out):
    amc.convert_checkpoint(source, out, rules=[], dtype=dtype)
    amc.verify_checkpoint(source, out, rules=[], dtype=dtype)
    return load_file(out / "model.safetensors")


DOORS = [loaded, loaded_into_a_model, converted]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", "auto"])
def test_a_name_and_auto_are_the_same_as_the_dtype(source, tmp_path, door, dtype):
    expected = door(source, torch.bfloat16, tmp_path / "dtype")
    found = door(source, dtype, tmp_path / "name")
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        assert_bytes_equal(tensor, expected[name])


def test_plans_take_names_too(source):
    plans = [amc.compile_plan(source, rules=[], dtype=dtype) for dtype in (torch.float16, "float16", "auto")]
    assert plans[0] == plans[1]
    assert {target.dtype for target in plans[2].targets} == {"BF16"}


@pytest.mark.parametrize(("dtype", "expected"), [("float16", torch.float16), ("auto", torch.float32)])
def test_saves_take_names_too(tmp_path, dtype, expected):
    report = amc.save_checkpoint(Model(), tmp_path / "saved", dtype=dtype)
    assert load_file(tmp_path / "saved" / report.files[0])["a"].dtype == expected
    assert dict(amc.published_tensors(Model(), dtype=dtype))["a"].dtype == expected


@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_merges_take_names_too(source, tmp_path, dtype):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {
        f"base_model.model.proj.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (1, 2)), ("B", (3, 1)))
    }
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(MERGED | {"target_modules": ["proj"]}))
    save_file({"proj.weight": torch.zeros(3, 2)}, source / "model.safetensors")
    amc.merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    wanted = {"float16": torch.float16, "auto": torch.bfloat16}[dtype]
    assert_bytes_equal(load_file(tmp_path / "merged" / "model.safetensors")["proj.weight"], torch.ones(3, 2).to(wanted))


def test_a_name_continues_the_conversion_to_its_dtype(source, tmp_path):
    amc.convert_checkpoint(source, tmp_path / "out", rules=[], dtype=torch.float16)
    report = amc.convert_checkpoint(source, tmp_path / "out", rules=[], dtype="float16")
    assert report.bytes_written == 0
    assert report.files_resumed == 1


@pytest.mark.parametrize("door", [*DOORS, planned_and_loaded])
def test_a_wrong_name_is_one_error_with_a_similar_one(source, tmp_path, door):
    with pytest.raises(amc.UnsupportedError, match=r'(?s)not a floating dtype.*write "bfloat16"'):
        door(source, "bf16", tmp_path / "out")
    with pytest.raises(amc.UnsupportedError, match='write "bfloat16"'):
        amc.save_checkpoint(Model(), tmp_path / "saved", dtype="bf16")


def test_auto_of_a_model_without_a_dtype_in_its_config_is_that_of_the_tensors(source):
    (source / "config.json").write_text("{}")
    assert loaded(source, "auto", None)["a"].dtype == torch.float32
