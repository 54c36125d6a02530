"""Tests of advice in errors: only arguments that the called function has, and only if they change something."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.distributed import collectives
from automodel_conv.doors import at_door
from automodel_conv.errors import ConversionError, NameProblems, UnsupportedError, message
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.upstream.registry import transformers_available

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="uses rules of transformers")


def text_at(arguments, do):
    with pytest.raises(UnsupportedError) as error, at_door("testing", lambda: arguments):
        raise UnsupportedError(message("it does not fit", found="{strict=False}", do=do))
    return error.value.args[0]


@pytest.mark.parametrize(
    ("arguments", "do", "expected"),
    [
        ({"strict": True}, "{strict=False} takes what fits", "strict=False takes what fits"),
        ({"strict": False}, "{strict=False} takes what fits", None),
        ({}, "{strict=False} takes what fits", None),
        ({}, ["look at it", "{strict=False} takes what fits"], "look at it"),
        ({"strict": True}, ["look at it", "{strict=False} takes"], "look at it; strict=False takes"),
        ({"layout": "nemo"}, "leave {layout} out", "leave layout out"),
        ({"layout": None}, '{layout="nemo"} or {layout=}', 'layout="nemo" or layout='),
        ({"layout": "nemo"}, '{layout="nemo"} is it', None),
        ({}, [("{a=} is one", "{b=} is two", "neither")], "neither"),
        ({"b": 1}, [("{a=} is one", "{b=} is two", "neither")], "b= is two"),
        ({}, "{convert_checkpoint(..., checksums=True)} writes", "convert_checkpoint(..., checksums=True) writes"),
    ],
)
def test_advice_follows_the_arguments(arguments, do, expected):
    lines = text_at(arguments, do).split("\n")
    assert lines[:2] == ["it does not fit", "  found:    {strict=False}"]
    assert lines[2:] == ([] if expected is None else [f"  do:       {expected}"])


def test_outer_function_without_the_argument_removes_the_advice():
    with pytest.raises(UnsupportedError) as error, at_door("out", dict):
        with at_door("in", lambda: {"strict": True}):
            raise UnsupportedError(message("it", do=["{strict=False} is it", "look"]))
    assert error.value.args[0] == "it\n  do:       look"


def test_error_from_another_process_has_the_same_text():
    error = NameProblems(message("it", do=["{strict=False} is it", "look"]), missing=["a"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.args[0] == "it\n  do:       strict=False is it; look"
    again.say(lambda said: None)
    assert again.args[0] == "it\n  do:       look"


def test_added_text_stays_when_the_error_is_formatted_again():
    error = ConversionError(message("it", found="that", do=["{strict=False} is it", "look"]))
    error.add("  filled:   1 of 2 targets\n    a\x1b")
    error.say(lambda said: None)
    assert error.args[0] == "it\n  found:    that\n  filled:   1 of 2 targets\n    a\\x1b\n  do:       look"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"threads": None, "scratch_bytes": None}, ["threads=", "scratch_bytes="]),
        ({"scratch_bytes": None}, ["scratch_bytes="]),
        ({}, []),
    ],
)
def test_memory_error_advises_the_available_bounds(arguments, expected):
    with pytest.raises(ConversionError, match="free memory") as error, at_door("testing", lambda: arguments):
        raise MemoryError
    assert re.findall(r"\w+=", str(error.value)) == expected


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3, bias=False)


@pytest.fixture
def two(tmp_path):
    directory = tmp_path / "two"
    directory.mkdir()
    save_file({"a.weight": torch.ones(3, 2), "b": torch.ones(2)}, directory / "model.safetensors")
    return directory


def advice(call, kind=ConversionError):
    with pytest.raises(kind) as error:
        call()
    return str(error.value).partition("  do: ")[2]


def test_strict_is_advised_only_if_it_is_an_argument(two):
    loads = [lambda: amc.load_state_dict(two, Plain()), lambda: amc.load_model(Plain(), two)]
    others = [
        lambda: amc.compile_plan(two, Plain()),
        lambda: amc.convert_state_dict({"a.weight": torch.ones(3, 2), "b": torch.ones(2)}, Plain()),
    ]
    assert all("strict=False" in advice(load, NameProblems) for load in loads)
    assert not any("strict" in advice(other, NameProblems) for other in others)


def test_a_reader_and_an_adapter_advise_no_strict(two):
    dcp = pytest.importorskip("automodel_conv.integrations.dcp")
    reader = dcp.HuggingFaceReader(two, Plain())
    assert "strict" not in advice(reader.read_metadata, NameProblems)


def test_missing_tensors_in_an_unindexed_file_are_named(two):
    (two / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"b": "model.safetensors"}})
    )
    with pytest.raises(NameProblems, match=r"index does not list[\s\S]*a\.weight in model\.safetensors") as error:
        amc.load_state_dict(two, Plain())
    assert "download the index and the files again" in str(error.value)
    report = amc.load_model(Plain(), two, strict=False)
    assert report.missing_keys == ("a.weight",)


@needs_transformers
def test_unindexed_expert_is_not_merged(tmp_path):
    expert = "model.layers.0.mlp.experts.{}.{}.weight"
    projections = ("gate_proj", "up_proj", "down_proj")
    tensors = {expert.format(e, p): torch.full((4, 4), float(e)) for e in range(3) for p in projections}
    save_file(tensors, tmp_path / "a.safetensors")
    listed = {name: "a.safetensors" for name in tensors if ".experts.2." not in name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    loaded = amc.load_state_dict(tmp_path, rules=amc.get_checkpoint_conversion_mapping("qwen3_moe"))
    assert loaded["model.layers.0.mlp.experts.down_proj"].shape == (2, 4, 4)
    assert {name for name, _ in amc.open_checkpoint(tmp_path).unindexed} == tensors.keys() - listed.keys()


@pytest.fixture
def coded(two):
    (two / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    return two


def test_keeping_codes_is_advised_if_they_are_decoded(coded, tmp_path):
    decoding = [
        lambda: amc.load_state_dict(coded, rules=[]),
        lambda: amc.compile_plan(coded, rules=[]),
        lambda: amc.convert_checkpoint(coded, tmp_path / "new", rules=[], dequantize=True),
    ]
    assert all("dequantize=False" in advice(call) for call in decoding)
    dcp = pytest.importorskip("automodel_conv.integrations.dcp")
    assert "dequantize" not in advice(dcp.HuggingFaceReader(coded, rules=[]).read_metadata)


def test_codes_in_memory_advise_no_argument_of_loads():
    codes = {"a.weight": torch.zeros(3, 2, dtype=torch.float8_e4m3fn)}
    advised = advice(lambda: amc.convert_state_dict(codes, Plain()))
    assert "dequantize" not in advised
    assert "load_state_dict() and load_model() decode" in advised


def test_unfinished_work_of_another_kind_advises_existing_arguments(two, tmp_path):
    def other():
        amc.convert_checkpoint(two, tmp_path / "new", rules=[], dtype=torch.float64)

    staging = tmp_path / "new" / STAGING_NAME
    staging.mkdir(parents=True)
    (staging / "journal.jsonl").write_text('{"work": {"files": []}}\n')
    assert "resume=False" in advice(other)
    assert "--" not in advice(other)
    tensors = {"a": torch.ones(2)}
    assert "resume" not in advice(lambda: amc.save_checkpoint(tensors, tmp_path / "new", rules=[]))


@pytest.mark.parametrize("empty", [{}, nn.ReLU()], ids=["state dict", "module"])
def test_save_of_no_tensors_is_refused(tmp_path, empty):
    with pytest.raises(UnsupportedError, match="no tensors to write"):
        amc.save_checkpoint(empty, tmp_path / "new", rules=[])
    assert not (tmp_path / "new").exists()


def test_conversion_of_no_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="no tensors to write"):
        amc.convert_checkpoint(tmp_path, tmp_path / "new", rules=[])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "not_a_model", ["a path", {}, nn.Linear, torch.ones(1)], ids=["path", "dict", "class", "tensor"]
)
def test_argument_that_is_not_a_model_is_refused(two, tmp_path, not_a_model):
    calls = [
        lambda: amc.load_model(not_a_model, two),
        lambda: amc.load_state_dict(two, not_a_model),
        lambda: amc.compile_plan(two, not_a_model),
        lambda: amc.convert_state_dict({}, not_a_model),
        lambda: amc.revert_state_dict({}, not_a_model),
    ]
    calls += [lambda: amc.get_model_conversion_mapping(not_a_model)] if transformers_available() else []
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"model= is not a model\n  expected: a torch.nn.Module"):
            call()
    if not_a_model != {}:
        with pytest.raises(UnsupportedError, match="neither a model nor a state dict"):
            amc.save_checkpoint(not_a_model, tmp_path / "new", rules=[])
    assert not (tmp_path / "new").exists()


def test_other_ranks_get_only_the_formatted_advice(monkeypatch):
    texts = []
    monkeypatch.setattr(collectives, "_exchange", lambda groups, text: texts.append(text))
    with pytest.raises(NameProblems), collectives.all_or_raise([], "saving"):
        raise NameProblems(message("it", do=["{strict=False} is it", "look"]))
    assert texts == ["rank 0: NameProblems: it\n  do:       look"]


def test_a_state_dict_of_none_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="a is not a tensor"):
        amc.save_checkpoint({"a": None}, tmp_path / "new", rules=[])  # type: ignore[dict-item]
    assert not (tmp_path / "new").exists()


@needs_transformers
def test_transposed_experts_are_advised_to_name_their_layout():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 16, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 16))

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts()})})
    shapes = {"gate_proj": (4, 16), "up_proj": (4, 16), "down_proj": (16, 4)}
    tensors = {f"mlp.experts.{e}.{p}.weight": torch.ones(shape) for e in range(2) for p, shape in shapes.items()}
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    advised = advice(lambda: amc.convert_state_dict(tensors, model, rules=rules))
    assert 'layout="gpt_oss"' in advised
    assert "source_layout" not in advised
    converted = amc.convert_state_dict(tensors, model, rules=rules, layout="gpt_oss")
    assert converted["mlp.experts.gate_up_proj"].shape == (2, 16, 8)
