"""Tensors that a save takes from the source of its model because the model has no place for them."""

import json

import pytest
import torch
from torch import nn

from automodel_conv.errors import NameProblems
from automodel_conv.execution.writing import ScratchSplit
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.publishing.carrying import carried_from
from tests.execution.support import write_checkpoint

TENSORS = {"weight": torch.ones(2, 3), "bias": torch.ones(3), "mtp.a": torch.arange(4), "mtp.b": torch.arange(6.0)}


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path, {"a.safetensors": TENSORS})


def saving(*names):
    """A plan that saves a state dict of these tensors under their own names."""
    targets = tuple(
        Target(n, "F32", (2,), -1, (row,), (StridedCopy(run_of(2), (0,), (0,), (0,)),)) for row, n in enumerate(names)
    )
    return CopyPlan(SourceTable(names, ["F32"] * len(names), [(2,)] * len(names)), targets)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))


def test_what_the_model_has_no_place_for_is_carried_as_it_is(source):
    carried = carried_from(source, saving("weight", "bias"), Model(), [], None, None)
    assert carried.names == ("mtp.a", "mtp.b")
    assert [(t.dtype, t.shape, t.is_whole) for t in carried.targets] == [("I64", (4,), True), ("F32", (6,), True)]
    assert carried.left_out == ()
    assert carried.checkpoint is source


def test_without_a_model_the_state_dict_tells_what_has_a_place(source):
    plan = saving("weight", "mtp.b")
    plan = CopyPlan(SourceTable(["weight", "mtp.b"], ["F32", "F32"], [(2, 3), (6,)]), plan.targets)
    assert carried_from(source, plan, None, [], None, None).names == ("bias", "mtp.a")


def test_nothing_is_carried_where_everything_has_a_place(tmp_path):
    source = write_checkpoint(tmp_path, {"a.safetensors": {n: TENSORS[n] for n in ("weight", "bias")}})
    assert carried_from(source, saving("weight", "bias"), Model(), [], None, None).names == ()


def test_a_carried_tensor_may_not_have_the_name_of_a_saved_one(source):
    with pytest.raises(NameProblems, match=r"(?s)1 tensors.*mtp\.a") as caught:
        carried_from(source, saving("weight", "bias", "mtp.a"), Model(), [], None, None)
    assert caught.value.duplicated == (("mtp.a", ("mtp.a",)),)


def test_slabs_write_the_carried_bytes_at_their_places(source):
    carried = carried_from(source, saving("weight", "bias"), Model(), [], None, None)
    slabs = carried.slabs([(1, 100), (0, 50)], ScratchSplit(1, 1024, 512))
    assert slabs.nbytes == 32 + 24
    content = {}
    for file in slabs.by_file:
        with slabs.opened(file) as (group, start, _):
            maker = start()
            content[file] = [(slab.offset_bytes, b"".join(map(bytes, maker(slab)))) for slab in group]
    assert content == {
        1: [(100, TENSORS["mtp.a"].numpy().tobytes())],
        0: [(50, TENSORS["mtp.b"].numpy().tobytes())],
    }


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path):
    write_checkpoint(tmp_path, {"a.safetensors": TENSORS})
    index = tmp_path / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    del stated["weight_map"]["mtp.b"]
    index.write_text(json.dumps(stated))
    carried = carried_from(open_checkpoint(tmp_path), saving("weight", "bias"), Model(), [], None, None)
    assert (carried.names, carried.left_out) == (("mtp.a",), ("mtp.b",))
