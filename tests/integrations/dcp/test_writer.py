"""Tests of ``dcp.save`` in one process: written files and refusals. Many ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers", reason="needs models of transformers")

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.testing import POISON, assert_bytes_equal

pytestmark = pytest.mark.filterwarnings("ignore")


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_saved_files_equal_those_of_save_checkpoint_and_load_again(mixtral, tmp_path):
    model, _ = mixtral
    dcp.save(model.state_dict(), storage_writer=HuggingFaceWriter(tmp_path / "dcp", model, max_shard_size="60KB"))
    amc.save_checkpoint(model, tmp_path / "ours", max_shard_size="60KB")
    assert files(tmp_path / "dcp") == files(tmp_path / "ours")
    state = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    dcp.load(state, storage_reader=HuggingFaceReader(tmp_path / "dcp"))
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(state[name], tensor)


@pytest.mark.parametrize("change", ["nested", "one more", "one less"])
def test_unknown_names_are_refused_and_nothing_is_written(mixtral, tmp_path, change):
    model, _ = mixtral
    state = model.state_dict()
    if change == "nested":
        state = {"model": state}
    elif change == "one more":
        state["more"] = torch.ones(2)
    else:
        del state["model.norm.weight"]
    with pytest.raises(CheckpointException, match="the state dict is not the model's"):
        dcp.save(state, storage_writer=HuggingFaceWriter(tmp_path / "dcp", model))
    assert not (tmp_path / "dcp").exists()


def test_no_dist_and_cached_plans_are_refused(mixtral, tmp_path):
    model, _ = mixtral
    writer = HuggingFaceWriter(tmp_path / "dcp", model)
    with pytest.raises(amc.UnsupportedError, match="together"):
        writer.set_up_storage_writer(True, use_collectives=False)
    planner = DefaultSavePlanner()
    planner.set_up_planner(model.state_dict(), is_coordinator=True)
    plan = planner.create_local_plan()
    object.__setattr__(plan, "usable", False)
    with pytest.raises(amc.UnsupportedError, match="cached save plans"):
        writer.prepare_global_plan([plan])


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_views_that_are_computed_when_read_are_refused(tmp_path, lazy):
    state = {"a": lazy(torch.ones(2, dtype=torch.complex64))}
    with pytest.raises(CheckpointException, match="a cannot be saved as it is stored"):
        dcp.save(state, storage_writer=HuggingFaceWriter(tmp_path / "dcp", rules=[]))
    assert files(tmp_path / "dcp") == {}


def test_failed_save_leaves_nothing_and_can_be_repeated(mixtral, tmp_path, monkeypatch):
    model, _ = mixtral
    writer = HuggingFaceWriter(tmp_path / "dcp", model)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("automodel_conv.files.system.pwritev", full)
        with pytest.raises(CheckpointException, match="No space left"):
            dcp.save(model.state_dict(), storage_writer=writer)
    assert files(tmp_path / "dcp") == {}
    dcp.save(model.state_dict(), storage_writer=writer)
    assert (tmp_path / "dcp" / "model.safetensors").exists()


def test_model_with_a_part_of_its_experts_is_refused(mixtral, tmp_path):
    state = mixtral[0].state_dict()
    name = next(name for name in state if name.endswith("experts.down_proj"))
    state[name] = state[name][:6]
    with pytest.raises(CheckpointException, match=r"experts\.down_proj does not hold all experts"):
        dcp.save(state, storage_writer=HuggingFaceWriter(tmp_path / "dcp", mixtral[0]))
    assert not (tmp_path / "dcp").exists()
