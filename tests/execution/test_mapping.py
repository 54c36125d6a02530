"""Tests of targets that are bytes of a file: which ones qualify, which share a mapping, and the mapping itself."""

import os
import sys
from pathlib import Path

import pytest
import torch

from automodel_conv.errors import ReadError
from automodel_conv.execution import mapping
from automodel_conv.execution.mapping import (
    FileRange,
    file_range_of,
    group_ranges,
    map_targets,
    mapped_or_new,
    without_targets,
)
from automodel_conv.files import system
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.testing import assert_bytes_equal
from tests.execution.support import CONCATENATE, MERGE, PAD, TRANSPOSE, columns, plan_of, target, write_checkpoint
from tests.faults import descriptors

CPU = torch.device("cpu")
TENSORS = {"a": torch.arange(6.0).view(1, 2, 3), "b": torch.arange(6.0, 12).view(1, 2, 3), "c": torch.arange(3)}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, {"x.safetensors": TENSORS})


def stacked(sources, name, groups, *operations):
    return target(sources, name, "F32", groups, operations)


def test_sources_that_follow_each_other_are_one_range(checkpoint):
    sources = columns(checkpoint)
    start = checkpoint.offsets[0]
    both = stacked(sources, "both", [["a", "b"]], MERGE)
    assert file_range_of(both, checkpoint) == FileRange(0, start, 48, both)
    assert file_range_of(both, checkpoint).stop_bytes == start + 48
    assert file_range_of(stacked(sources, "b", [["b"]]), checkpoint)[:3] == (0, start + 24, 24)


def test_targets_with_another_arrangement_are_no_range(checkpoint):
    sources = columns(checkpoint)
    others = [
        stacked(sources, "other order", [["b", "a"]], MERGE),
        stacked(sources, "apart", [["a"], ["b"]], MERGE, CONCATENATE, TRANSPOSE),
        stacked(sources, "cast", [["a"]])._replace(dtype="BF16"),
        Target("none", "F32", (0, 3), -1, (0,), ()),
        stacked(sources, "zeros", [["a"]], PAD),
        Target("by upstream", "F32", (6,), -1, (0,), (), Fallback("a test", dict)),
    ]
    assert [t.name for t in others if file_range_of(t, checkpoint)] == []


def test_elements_between_multiples_of_their_size_are_no_range(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"x.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}, pad=2)
    assert file_range_of(target(columns(checkpoint), "a", "F32", [["a"]]), checkpoint) is None


def places(*ranges):
    return [FileRange(file, start, stop - start, None) for file, start, stop in ranges]


@pytest.mark.parametrize(
    ("ranges", "limit", "together"),
    [
        ([], 10, []),
        ([(0, 0, 20)], 10, [1]),
        ([(0, 4, 10), (0, 0, 4)], 10, [2]),
        ([(0, 0, 4), (0, 4, 11)], 10, [1, 1]),
        ([(0, 0, 4), (1, 4, 8)], 10, [1, 1]),
        ([(0, 0, 4), (0, 3, 8)], 10, [1, 1]),
        ([(0, 0, 4), (0, 0, 4)], 10, [1, 1]),
        ([(0, 0, 2), (0, 8, 10), (0, 10, 12)], 10, [2, 1]),
    ],
    ids=["none", "larger", "as large", "too large", "files", "overlap", "equal", "gap"],
)
def test_neighbours_of_one_file_that_do_not_overlap_are_mapped_together(ranges, limit, together):
    found = list(group_ranges(places(*ranges), limit))
    assert [len(span) for span in found] == together
    assert sorted(place[:3] for span in found for place in span) == sorted(place[:3] for place in places(*ranges))


linux = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")


@linux
def test_mapped_tensors_are_the_files_bytes_and_writes_do_not_reach_it(checkpoint):
    sources = columns(checkpoint)
    plan = plan_of(sources, stacked(sources, "both", [["a", "b"]], MERGE), target(sources, "c", "I64", [["c"]]))
    before, content = descriptors(), Path(checkpoint.files[0]).read_bytes()
    mapped = map_targets(plan, checkpoint, {"both": CPU, "c": CPU})
    assert_bytes_equal(mapped["both"], torch.arange(12.0).view(2, 1, 2, 3))
    assert_bytes_equal(mapped["c"], torch.arange(3))
    mapped["both"].fill_(7)
    assert torch.equal(mapped["c"], torch.arange(3))
    assert Path(checkpoint.files[0]).read_bytes() == content
    assert descriptors() == before


@linux
def test_targets_on_other_devices_are_not_mapped_nor_is_anything_where_the_system_cannot(checkpoint, monkeypatch):
    sources = columns(checkpoint)
    plan = plan_of(sources, stacked(sources, "a", [["a"]]), stacked(sources, "b", [["b"]]))
    devices = {"a": torch.device("meta"), "b": CPU}
    assert map_targets(plan, checkpoint, devices).keys() == {"b"}
    monkeypatch.setattr(system, "can_map", lambda: False)
    assert map_targets(plan, checkpoint, devices) == {}


@linux
def test_file_that_is_too_short_names_the_targets_beyond_its_end(checkpoint, monkeypatch):
    monkeypatch.setattr(mapping, "_MAPPING_BYTES", 1 << 20)
    sources = columns(checkpoint)
    plan = plan_of(sources, stacked(sources, "first", [["a"]]), stacked(sources, "second", [["b"]]))
    os.truncate(checkpoint.files[0], checkpoint.offsets[1] + 23)
    with pytest.raises(ReadError, match=r"(?s)too short.*x\.safetensors.*copy or download") as caught:
        map_targets(plan, checkpoint, {"first": CPU, "second": CPU})
    assert "second" in str(caught.value)
    assert "first" not in str(caught.value)


@linux
def test_mapping_that_the_system_refuses_names_file_and_targets(checkpoint, monkeypatch):
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    sources = columns(checkpoint)
    monkeypatch.setattr(system, "map_private", refuse)
    with pytest.raises(ReadError, match=r"(?s)cannot be mapped.*x\.safe.*Cannot allocate.*mine.*memory_map=False"):
        map_targets(plan_of(sources, stacked(sources, "mine", [["a"]])), checkpoint, {"mine": CPU})


def test_targets_that_are_not_mapped_get_new_buffers_in_the_order_of_all(checkpoint):
    sources = columns(checkpoint)
    plan = plan_of(sources, stacked(sources, "a", [["a"]]), stacked(sources, "b", [["b"]]))
    mapped = {"b": torch.ones(1, 2, 3)}
    buffers = mapped_or_new(plan.targets, mapped, {"a": torch.device("meta"), "b": CPU})
    assert list(buffers) == ["a", "b"]
    assert buffers["b"] is mapped["b"]
    assert (buffers["a"].shape, buffers["a"].device.type) == ((1, 2, 3), "meta")
    assert [t.name for t in without_targets(plan, mapped).targets] == ["a"]
    assert without_targets(plan, []).targets == plan.targets
