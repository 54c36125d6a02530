"""Tests of saving models of every type: files equal those of ``save_pretrained``, and transformers loads them."""

from __future__ import annotations

import copy

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import CoverageError
from automodel_conv.testing import POISON
from tests.comparing import assert_same, contents, tensors_of
from tests.doors.saving.support import NAMES, loaded_by_upstream

if NAMES:
    from tests.model_zoo import OTHER_ORDER, save_upstream

needs_transformers = pytest.mark.skipif(not NAMES, reason="transformers is not installed")


def quarter(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values()) // 4


def is_padded(model):
    """Return whether a rule drops a part of a published tensor."""
    rules = amc.get_model_conversion_mapping(model)
    operations = [operation for rule in rules for operation in getattr(rule, "operations", ())]
    return any(type(operation).__name__ == "Inkling2UnpadVocab" for operation in operations)


class Case:
    """A model that transformers loaded, and its checkpoint written by transformers in several files."""

    def __init__(self, name, directory):
        self.name, self.directory = name, directory
        self.model = loaded_by_upstream(name, directory / "published")
        self.most_bytes = quarter(self.model)
        self.expected = directory / "upstream"
        save_upstream(self.model, self.expected, self.most_bytes)

    def assert_equals_transformers(self, directory):
        if self.name not in OTHER_ORDER:
            assert contents(directory) == contents(self.expected)
        assert_same(tensors_of(directory), tensors_of(self.expected))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param.replace("+", "-")))


@pytest.mark.sweep
def test_model_loaded_by_transformers_is_saved_as_by_transformers(case, tmp_path):
    report = amc.save_checkpoint(case.model, tmp_path, max_shard_size=case.most_bytes)
    case.assert_equals_transformers(tmp_path)
    assert sorted(report.files) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert report.bytes_written == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


@pytest.mark.sweep
def test_load_and_save_round_trips_and_transformers_loads_it(case, tmp_path):
    model = copy.deepcopy(case.model)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    amc.load_model(model, case.expected, strict=False)
    amc.save_checkpoint(model, tmp_path, max_shard_size=case.most_bytes)
    case.assert_equals_transformers(tmp_path)
    # A class that several model types share, as Glm4Moe, saves its own type. The config decides which rules apply.
    again = type(model).from_pretrained(tmp_path, config=model.config)
    assert_same(again.state_dict(), case.model.state_dict())


@pytest.mark.sweep
def test_reference_restores_its_names_and_files(case, tmp_path):
    if is_padded(case.model):
        with pytest.raises(CoverageError, match=r"(?s)such as padding.*partly unwritten.*leave reference= out"):
            amc.save_checkpoint(case.model, tmp_path, reference=case.expected)
        return
    amc.save_checkpoint(case.model, tmp_path, reference=case.expected)
    assert contents(tmp_path) == contents(case.expected)


@pytest.mark.sweep
@needs_transformers
def test_exceptions_of_the_sweep_do_differ(tmp_path):
    for name in OTHER_ORDER & set(NAMES):
        case = Case(name, tmp_path / name)
        amc.save_checkpoint(case.model, tmp_path / "out", max_shard_size=case.most_bytes)
        assert contents(tmp_path / "out") != contents(case.expected)
