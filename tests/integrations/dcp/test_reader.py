"""Tests of ``dcp.load`` in one process: reads, dtypes and refusals. Many ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers", reason="needs models of transformers")

from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from automodel_conv.errors import UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceReader
from automodel_conv.testing import POISON, assert_bytes_equal

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensors_are_cast_once_to_the_target_dtype(mixtral):
    model, published = mixtral
    state = {name: torch.empty_like(tensor, dtype=torch.float32) for name, tensor in model.state_dict().items()}
    dcp.load(state, storage_reader=HuggingFaceReader(published))
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(state[name], tensor.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int8], ids=str)
def test_codes_are_not_cast_to_the_target_dtype(tmp_path, dtype):
    codes = torch.full((4, 6), 2, dtype=torch.uint8).view(dtype)
    save_file({"a.weight": codes}, tmp_path / "model.safetensors")
    state = {"a.weight": torch.empty(4, 6, dtype=torch.bfloat16)}
    state["a.weight"].view(torch.uint8).fill_(POISON)
    with pytest.raises(CheckpointException, match="holds codes of a quantized tensor"):
        dcp.load(state, storage_reader=HuggingFaceReader(tmp_path, rules=[]))
    assert (state["a.weight"].view(torch.uint8) == POISON).all()
    state["a.weight"] = torch.zeros(4, 6, dtype=dtype)
    dcp.load(state, storage_reader=HuggingFaceReader(tmp_path, rules=[]))
    assert_bytes_equal(state["a.weight"], codes)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
        self.embed.weight = self.head.weight


def test_metadata_has_every_name_of_the_model_and_the_dtypes_of_the_files(tmp_path):
    save_file({"head.weight": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = HuggingFaceReader(tmp_path, Tied(), rules=[]).read_metadata().state_dict_metadata
    assert found.keys() == {"head.weight", "embed.weight"}
    for described in found.values():
        assert (described.size, described.properties.dtype) == ((2, 3), torch.bfloat16)
        assert [(chunk.offsets, chunk.sizes) for chunk in described.chunks] == [((0, 0), (2, 3))]


def test_unused_tensors_are_named_and_reset_reads_another_checkpoint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({name: torch.ones(2), f"spare {name}": torch.ones(1)}, tmp_path / name / "model.safetensors")
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2))
    reader = HuggingFaceReader(tmp_path / "a", rules=[])
    assert reader.left_out == ()
    assert reader.read_metadata().state_dict_metadata.keys() == {"a", "spare a"}
    reader.reset(tmp_path / "b")
    assert reader.read_metadata().state_dict_metadata.keys() == {"b", "spare b"}
    reader.reset()
    assert reader.read_metadata().state_dict_metadata.keys() == {"b", "spare b"}


def test_an_item_that_is_no_tensor_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    planner = DefaultLoadPlanner()
    item = ReadItem(LoadItemType.BYTE_IO, MetadataIndex("a"), None, MetadataIndex("a"), None, None)
    with pytest.raises(UnsupportedError, match="a is not a tensor"):
        HuggingFaceReader(tmp_path, rules=[]).read_data(LoadPlan([item]), planner)


def test_a_checkpoint_is_what_exists(tmp_path):
    assert HuggingFaceReader.validate_checkpoint_id(tmp_path)
    assert not HuggingFaceReader.validate_checkpoint_id(tmp_path / "missing")


def test_report_counts_the_bytes_of_this_load_with_the_gaps_between_them(tmp_path):
    save_file({name: torch.ones(4) for name in ("a", "b", "c", "d")}, tmp_path / "model.safetensors")
    reader = HuggingFaceReader(tmp_path, rules=[])
    assert reader.report is None
    for names, nbytes in (("ab", 2 * 16), ("ac", 3 * 16)):
        dcp.load({name: torch.zeros(4) for name in names}, storage_reader=reader)
        assert reader.report.bytes_read == nbytes
        assert min(reader.report.seconds.values()) > 0
        assert reader.report.left_out == ()
