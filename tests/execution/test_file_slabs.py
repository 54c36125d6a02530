"""Tests of the slabs that files of a checkpoint become, by output file."""

import pytest
import torch

from automodel_conv.dtypes import torch_dtype
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import ScratchSplit
from automodel_conv.testing import assert_bytes_equal
from tests.execution.support import TRANSPOSE, columns, moe, naive, plan_of, target, write_checkpoint
from tests.faults import descriptors

SHARE = ScratchSplit(1, 1024, 512)


def written_tensors(slabs, targets, places):
    """Return the tensors that the slabs of all files contain, by name."""
    files = {}
    for file in sorted(slabs.by_file):
        data = bytearray(4096)
        with slabs.opened(file) as (group, start, _):
            maker = start()
            for slab in group:
                content = b"".join(bytes(view) for view in maker(slab))
                assert len(content) == slab.nbytes
                data[slab.offset_bytes : slab.offset_bytes + slab.nbytes] = content
        files[file] = data
    tensors = {}
    for t, (file, offset) in zip(targets, places, strict=True):
        raw = files[file][offset : offset + t.nbytes]
        tensors[t.name] = torch.frombuffer(raw, dtype=torch_dtype(t.dtype)).reshape(t.shape)
    return tensors


@pytest.mark.parametrize("operations", [(), (TRANSPOSE,)], ids=["rows", "transposed"])
def test_targets_are_written_at_their_places_in_their_files(tmp_path, operations):
    tensors, checkpoint, plan = moe(tmp_path, *operations, shape=(2, 5, 8))
    places = [(1, 64), (0, 16), (1, 0)]  # gate and up, down, norm
    slabs = FileSlabs(checkpoint, plan.targets, places, {}, SHARE)
    assert slabs.by_file.keys() == {0, 1}
    assert slabs.nbytes == plan.bytes_written
    before = descriptors()
    for name, tensor in written_tensors(slabs, plan.targets, places).items():
        assert_bytes_equal(tensor, naive(plan, tensors)[name])
    assert descriptors() == before


def test_targets_without_elements_have_no_slabs(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.ones(3), "none": torch.ones(0, 2)}})
    sources = columns(checkpoint)
    plan = plan_of(sources, target(sources, "none", "F32", [["none"]]), target(sources, "a", "F32", [["a"]]))
    slabs = FileSlabs(checkpoint, plan.targets, [(0, 0), (2, 0)], {}, SHARE)
    assert slabs.by_file.keys() == {2}
    assert slabs.nbytes == 12
    with slabs.opened(0) as (group, *_):
        assert list(group) == []


def test_no_slab_is_larger_than_its_budget(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.arange(1000.0)}})
    sources = columns(checkpoint)
    plan = plan_of(sources, target(sources, "a", "BF16", [["a"]]))
    slabs = FileSlabs(checkpoint, plan.targets, [(0, 0)], {}, SHARE)
    assert slabs.nbytes == 2000
    assert max(slab.nbytes for slab in slabs.by_file[0]) <= SHARE.slab_bytes


def test_block_that_fails_closes_the_sources(tmp_path):
    _, checkpoint, plan = moe(tmp_path, TRANSPOSE, shape=(2, 5, 8))
    slabs = FileSlabs(checkpoint, plan.targets, [(0, 0), (0, 1000), (0, 2000)], {}, SHARE)
    before = descriptors()
    with pytest.raises(ZeroDivisionError), slabs.opened(0) as (group, start, _):
        1 / len(start()(group[0])[:0])
    assert descriptors() == before
