"""Tests of whether ranks agree on what they save: shapes, parts, errors and checksums, seen by the coordinator."""

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from automodel_conv.errors import CoverageError, RankError, WriteError
from automodel_conv.integrations.dcp.consistency import refuse_failures, refuse_unlike, shared_items


def item(name, offset=0, size=2, whole=4, dtype=torch.float32):
    """A part of a tensor ``[whole, 3]``: rows from ``offset`` on."""
    offsets, sizes = torch.Size([offset, 0]), torch.Size([size, 3])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype), torch.Size([whole, 3]))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def test_parts_that_several_ranks_hold_are_shared_and_others_are_not():
    ranks = [[item("a", 0), item("b", 0)], [item("a", 2), item("b", 0)], [item("a", 0)], []]
    shared = [[(i.index.fqn, tuple(i.index.offset)) for i in of_rank] for of_rank in shared_items(ranks)]
    assert shared == [[("a", (0, 0)), ("b", (0, 0))], [("b", (0, 0))], [("a", (0, 0))], []]


def test_parts_without_elements_and_other_objects_are_not_shared():
    other = WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO)
    assert shared_items([[item("a", size=0), other], [item("a", size=0), other]]) == [[], []]


@pytest.mark.parametrize("change", [{"whole": 5}, {"dtype": torch.bfloat16}], ids=str)
def test_tensors_of_one_name_that_differ_are_refused(change):
    with pytest.raises(RankError, match="odd differs from rank to rank"):
        shared_items([[item("a"), item("odd")], [item("odd", 2, **change)]])


def test_parts_that_begin_together_and_end_apart_are_refused():
    with pytest.raises(CoverageError, match=r"(?s)divide odd in different ways.*\[2, 3\] and \[3, 3\] at \[0, 0\]"):
        shared_items([[item("odd", size=2)], [item("odd", size=3)]])


def result(name, value=None):
    return WriteResult(MetadataIndex(name), 1, value)


def test_the_error_of_the_only_rank_is_raised_itself():
    error = WriteError("no room")
    with pytest.raises(WriteError) as caught:
        refuse_failures([[result("a"), result("", error)]])
    assert caught.value is error


def test_errors_of_several_ranks_are_listed_by_rank():
    ranks = [[result("", WriteError("no room"))], [result("a", 5)], [result("", ValueError("odd"))]]
    with pytest.raises(RankError, match=r"failed on 2 of the participating ranks") as caught:
        refuse_failures(ranks)
    assert "rank 0: WriteError: no room\n    rank 2: ValueError: odd" in str(caught.value)
    refuse_failures([[result("a", 5)], []])
    refuse_failures([])


def test_replicas_with_other_bytes_are_named_with_the_first_ranks_that_differ():
    equal = [[result("a", 5), result("b")], [result("a", 5)], []]
    refuse_unlike(equal)
    ranks = [[result("b")], [result("b", 7), result("a", 5)], [result("b", 7), result("a", 6)], [result("a", 4)]]
    with pytest.raises(RankError, match="different bytes of a") as caught:
        refuse_unlike(ranks)
    assert "a: rank 2 and rank 1" in str(caught.value)
    assert "b:" not in str(caught.value)
