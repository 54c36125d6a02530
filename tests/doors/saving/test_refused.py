"""Tests of refused saves: one error, and no file is left behind."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import (
    ConversionError,
    CoverageError,
    DestinationError,
    NameProblems,
    UnsupportedError,
    WriteError,
)
from automodel_conv.files import system
from tests.comparing import assert_same, contents, tensors_of
from tests.doors.saving.support import NAMES, plain

if NAMES:
    from tests.model_zoo import build_model

needs_transformers = pytest.mark.skipif(not NAMES, reason="transformers is not installed")


def refused(model, directory, error, text, **options):
    with pytest.raises(error, match=text):
        amc.save_checkpoint(model, directory, **options)
    assert not directory.exists() or not list(directory.iterdir())


def test_state_dict_without_rules_is_refused(tmp_path):
    refused(plain(), tmp_path / "out", UnsupportedError, r"does not determine the rules(.|\n)*rules=\[\] keeps")


@pytest.mark.parametrize("size", [0, "much", -1, 1.5, None])
def test_a_wrong_size_is_refused(tmp_path, size):
    refused(plain(), tmp_path / "out", UnsupportedError, "not a size", rules=[], max_shard_size=size)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": "2"}, {"scratch_bytes": 1000}, {"scratch_bytes": "64MB"}]
)
def test_impossible_options_are_refused(tmp_path, options):
    refused(plain(), tmp_path / "out", ConversionError, "scratch_bytes >=", rules=[], **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bf16"], ids=str)
def test_dtype_that_is_not_floating_is_refused(tmp_path, dtype):
    refused(plain(), tmp_path / "out", UnsupportedError, "not a floating dtype", rules=[], dtype=dtype)


def test_value_that_is_not_a_tensor_is_refused(tmp_path):
    refused({"a": torch.ones(2), "b": 3}, tmp_path / "out", UnsupportedError, "b is not a tensor", rules=[])


class Counted(nn.Linear):
    """A layer that keeps extra state in addition to its tensors."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def tensors_in(model):
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_module_with_extra_state_is_refused_but_its_tensors_are_saved(tmp_path):
    model, again = (nn.Sequential(Counted(2, 3), nn.Linear(3, 2)) for _ in range(2))
    text = r"extra state(.|\n)* 0._extra_state: dict(.|\n)*without it"
    refused(model, tmp_path / "out", UnsupportedError, text)
    amc.save_checkpoint(tensors_in(model), tmp_path / "out", rules=[])
    amc.load_model(again, tmp_path / "out", rules=[])
    assert_same(tensors_in(again), tensors_in(model))


def test_a_dtype_that_files_cannot_hold_is_refused(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.complex128)}
    refused(tensors, tmp_path / "out", UnsupportedError, "a has a dtype", rules=[])


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_views_that_are_computed_when_read_are_refused(tmp_path, lazy):
    tensors = {"a": lazy(torch.ones(2, dtype=torch.complex64))}
    refused(tensors, tmp_path / "out", UnsupportedError, "a cannot be saved as it is stored", rules=[])


@pytest.mark.parametrize("as_module", [True, False])
def test_tensors_without_data_are_refused(tmp_path, as_module):
    module = nn.Linear(2, 3, device="meta")
    model = module if as_module else module.state_dict()
    refused(model, tmp_path / "out", UnsupportedError, "weight has no data", **({} if as_module else {"rules": []}))


@needs_transformers
@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [("hf_quantizer", SimpleNamespace(), "quantized"), ("_hf_peft_config_loaded", True, "adapters")],
)
def test_models_that_transformers_must_save_are_refused(tmp_path, attribute, value, text):
    model = build_model("llama")
    setattr(model, attribute, value)
    refused(model, tmp_path / "out", UnsupportedError, text)


@needs_transformers
def test_tensors_that_do_not_fit_the_reference_are_refused(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "published")
    tensors = dict(mixtral.state_dict())
    del tensors["model.norm.weight"]
    amc.save_checkpoint(
        tensors,
        tmp_path / "less",
        reference=tmp_path / "published",
        rules=amc.get_checkpoint_conversion_mapping("mixtral"),
    )
    assert "model.norm.weight" not in tensors_of(tmp_path / "less")
    tensors["model.extra.weight"] = torch.ones(2)
    refused(
        tensors,
        tmp_path / "out",
        NameProblems,
        r"model\.extra\.weight",
        reference=tmp_path / "published",
        rules=amc.get_checkpoint_conversion_mapping("mixtral"),
    )


@needs_transformers
def test_state_dict_with_a_reference_and_without_rules_is_advised_to_pass_rules(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "published")
    advice = r"(.|\n)*pass rules= too, to split grouped experts of a state dict"
    reference = tmp_path / "published"
    refused(dict(mixtral.state_dict()), tmp_path / "out", NameProblems, advice, reference=reference)


@pytest.mark.parametrize(
    "present", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "other.gguf"]
)
def test_directory_with_a_checkpoint_is_refused_and_unchanged(tmp_path, present):
    (tmp_path / present).write_bytes(b"precious")
    with pytest.raises(DestinationError, match=rf"holds a checkpoint already(.|\n)*{re.escape(present)}"):
        amc.save_checkpoint(plain(), tmp_path, rules=[])
    assert contents(tmp_path) == {present: b"precious"}


def test_file_in_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(WriteError, match="cannot write to a directory"):
        amc.save_checkpoint(plain(), tmp_path / "out", rules=[])
    assert (tmp_path / "out").read_bytes() == b"a file"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def pwritev(fd, views, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "pwritev", pwritev)
    refused(plain(), tmp_path / "out", WriteError, "No space left", rules=[])


@needs_transformers
def test_shards_that_are_not_dtensors_are_refused(tmp_path):
    model = build_model("llama")
    model._tp_size = 2
    refused(model, tmp_path / "out", UnsupportedError, "shards that are not DTensors")


@needs_transformers
def test_model_with_a_part_of_its_experts_is_refused(mixtral, tmp_path):
    model = copy.deepcopy(mixtral)
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    experts.down_proj = nn.Parameter(experts.down_proj.data[:6].clone())
    with pytest.raises(CoverageError, match=r"(?s)experts\.down_proj does not hold all experts.*12.*6 experts"):
        amc.save_checkpoint(model, tmp_path / "saved")
    rules = amc.get_model_conversion_mapping(model)
    with pytest.raises(CoverageError, match=r"gate\.weight says"):
        amc.save_checkpoint(model.state_dict(), tmp_path / "saved", rules=rules)
    assert not (tmp_path / "saved").exists()
