"""Errors advise only arguments that the function has which was called, and only what changes something."""

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

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="takes rules of transformers")


def said_at(arguments, do):
    with pytest.raises(UnsupportedError) as error, at_door("testing", lambda: arguments):
        raise UnsupportedError(message("it does not fit", found="{strict=False}", do=do))
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "do", "said"),
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
def test_advice_is_what_the_arguments_allow(arguments, do, said):
    lines = said_at(arguments, do).split("\n")
    assert lines[:2] == ["it does not fit", "  found:    {strict=False}"]
    assert lines[2:] == ([] if said is None else [f"  do:       {said}"])


def test_an_outer_door_that_lacks_an_argument_takes_the_advice_away():
    with pytest.raises(UnsupportedError) as error, at_door("out", dict):
        with at_door("in", lambda: {"strict": True}):
            raise UnsupportedError(message("it", do=["{strict=False} is it", "look"]))
    assert str(error.value) == "it\n  do:       look"


def test_an_error_that_came_from_another_process_says_the_same():
    error = NameProblems(message("it", do=["{strict=False} is it", "look"]), missing=["a"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "it\n  do:       strict=False is it; look"
    again.say(lambda said: None)
    assert str(again) == "it\n  do:       look"


def test_what_is_added_stays_where_a_door_says_it_again():
    error = ConversionError(message("it", found="that", do=["{strict=False} is it", "look"]))
    error.add("  filled:   1 of 2 targets\n    a\x1b")
    error.say(lambda said: None)
    assert str(error) == "it\n  found:    that\n  filled:   1 of 2 targets\n    a\\x1b\n  do:       look"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threads": None, "scratch_bytes": None}, ["threads=", "scratch_bytes="]),
        ({"scratch_bytes": None}, ["scratch_bytes="]),
        ({}, []),
    ],
)
def test_a_lack_of_memory_advises_the_bounds_that_there_are(arguments, said):
    with pytest.raises(ConversionError, match="free memory") as error, at_door("testing", lambda: arguments):
        raise MemoryError
    assert re.findall(r"\w+=", str(error.value)) == said


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


def test_strict_is_advised_where_it_is_an_argument(two):
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


def test_missing_tensors_that_lie_in_a_file_beside_the_index_are_named(two):
    (two / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"b": "model.safetensors"}})
    )
    with pytest.raises(NameProblems, match=r"index does not list[\s\S]*a\.weight in model\.safetensors"):
        amc.load_state_dict(two, Plain())
    report = amc.load_model(Plain(), two, strict=False)
    assert report.missing_keys == ("a.weight",)


@needs_transformers
def test_an_expert_that_the_index_does_not_name_is_not_merged(tmp_path):
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


def test_keeping_codes_is_advised_where_they_are_decoded(coded, tmp_path):
    decoding = [
        lambda: amc.load_state_dict(coded, rules=[]),
        lambda: amc.compile_plan(coded, rules=[]),
        lambda: amc.convert_checkpoint(coded, tmp_path / "made", rules=[], dequantize=True),
    ]
    assert all("dequantize=False" in advice(call) for call in decoding)
    dcp = pytest.importorskip("automodel_conv.integrations.dcp")
    assert "dequantize" not in advice(dcp.HuggingFaceReader(coded, rules=[]).read_metadata)


def test_codes_in_memory_advise_no_argument_of_loads():
    codes = {"a.weight": torch.zeros(3, 2, dtype=torch.float8_e4m3fn)}
    assert "dequantize" not in advice(lambda: amc.convert_state_dict(codes, Plain()))


def test_unfinished_work_of_another_kind_advises_what_the_door_has(two, tmp_path):
    def other():
        amc.convert_checkpoint(two, tmp_path / "made", rules=[], dtype=torch.float64)

    staging = tmp_path / "made" / STAGING_NAME
    staging.mkdir(parents=True)
    (staging / "journal.jsonl").write_text('{"work": {"files": []}}\n')
    assert "resume=False" in advice(other)
    assert "--" not in advice(other)
    tensors = {"a": torch.ones(2)}
    assert "resume" not in advice(lambda: amc.save_checkpoint(tensors, tmp_path / "made", rules=[]))


@pytest.mark.parametrize("what", [{}, nn.ReLU()], ids=["state dict", "module"])
def test_saving_nothing_is_refused_before_anything_is_written(tmp_path, what):
    with pytest.raises(UnsupportedError, match="no tensors to write"):
        amc.save_checkpoint(what, tmp_path / "made", rules=[])
    assert not (tmp_path / "made").exists()


def test_converting_nothing_is_refused_before_anything_is_written(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="no tensors to write"):
        amc.convert_checkpoint(tmp_path, tmp_path / "made", rules=[])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("given", ["a path", {}, nn.Linear, torch.ones(1)], ids=["path", "dict", "class", "tensor"])
def test_what_is_no_model_is_refused(two, tmp_path, given):
    calls = [
        lambda: amc.load_model(given, two),
        lambda: amc.load_state_dict(two, given),
        lambda: amc.compile_plan(two, given),
        lambda: amc.convert_state_dict({}, given),
        lambda: amc.revert_state_dict({}, given),
    ]
    calls += [lambda: amc.get_model_conversion_mapping(given)] if transformers_available() else []
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"model= is not a model\n  expected: a torch.nn.Module"):
            call()
    if given != {}:
        with pytest.raises(UnsupportedError, match="neither a model nor a state dict"):
            amc.save_checkpoint(given, tmp_path / "made", rules=[])
    assert not (tmp_path / "made").exists()


def test_other_ranks_hear_no_advice_that_the_door_has_not_said(monkeypatch):
    told = []
    monkeypatch.setattr(collectives, "_exchange", lambda groups, text: told.append(text))
    with pytest.raises(NameProblems), collectives.all_or_raise([], "saving"):
        raise NameProblems(message("it", do=["{strict=False} is it", "look"]))
    assert told == ["rank 0: NameProblems: it\n  do:       look"]


def test_a_state_dict_of_none_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="a is not a tensor"):
        amc.save_checkpoint({"a": None}, tmp_path / "made", rules=[])  # type: ignore[dict-item]
    assert not (tmp_path / "made").exists()


@needs_transformers
def test_own_experts_that_lie_transposed_are_told_to_name_their_layout():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 16, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 16))

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts()})})
    shapes = {"gate_proj": (4, 16), "up_proj": (4, 16), "down_proj": (16, 4)}
    tensors = {f"mlp.experts.{e}.{p}.weight": torch.ones(shape) for e in range(2) for p, shape in shapes.items()}
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    said = advice(lambda: amc.convert_state_dict(tensors, model, rules=rules))
    assert 'layout="gpt_oss"' in said
    assert "source_layout" not in said
    made = amc.convert_state_dict(tensors, model, rules=rules, layout="gpt_oss")
    assert made["mlp.experts.gate_up_proj"].shape == (2, 16, 8)
