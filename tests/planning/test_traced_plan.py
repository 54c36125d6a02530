"""Tests of traced plans: one plan is executed on the host, on a device, in memory, in parts, and from JSON."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import CoverageError, NameProblems
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.memory import convert_tensors
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.boxes import Piece, run_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.loader_writes import View
from automodel_conv.planning.origins import Read, Unknown
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import box
from automodel_conv.planning.traced_copies import Filled
from automodel_conv.planning.traced_plan import traced_plan
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.execution.simulated import SimulatedDevice

STORED = {
    "gate": torch.arange(48, dtype=torch.bfloat16).reshape(6, 8),
    "up": torch.arange(48, 96, dtype=torch.bfloat16).reshape(6, 8),
    "codes": torch.arange(64, dtype=torch.uint8).reshape(4, 16),
    "odd": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "one": torch.tensor(2.5),
}


def from_hf(tensors):
    """Move, cast, reinterpret and repeat tensors, and make constants."""
    both = torch.cat([tensors["gate"], tensors["up"]])
    padded = torch.zeros(16, 8, dtype=torch.bfloat16)
    padded[2:14] = both
    return {
        "transposed": both.t().contiguous(),
        "interleaved": torch.stack([tensors["gate"], tensors["up"]], 1).flatten(0, 1),
        "padded": padded,
        "wide": tensors["gate"].float(),
        "scales": tensors["codes"].view(torch.float32),
        "pairs": tensors["odd"].view(-1).view(torch.int32),
        "repeated": tensors["one"].expand(3, 2).contiguous(),
        "nan": torch.full((2, 2), float("nan")),
        "square": torch.stack([tensors["up"][:, :6], tensors["gate"][:6, 2:].t()]),
        "none": tensors["gate"][:0].clone(),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_file(STORED, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def plan(directory):
    return amc.trace_loader(from_hf, directory, calls="dict")


def buffers_of(plan):
    return {
        target.name: torch.full((max(target.nbytes, 1),), POISON, dtype=torch.uint8)[: target.nbytes]
        .view(torch_dtype(target.dtype))
        .reshape(target.shape)
        for target in plan.targets
    }


def assert_as_run(tensors):
    wanted = from_hf(STORED)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_bytes_equal(tensors[name], tensor.contiguous())


def test_everything_is_planned(plan):
    assert {target.name for target in plan.targets} == from_hf(STORED).keys()


def test_it_is_executed_from_files(plan, directory):
    assert_as_run(amc.load_state_dict(directory, plan=plan))


def test_it_is_executed_from_its_json(plan, directory):
    assert_as_run(amc.load_state_dict(directory, plan=plan.to_json()))
    assert CopyPlan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_it_is_executed_with_mapped_memory(plan, directory):
    mapped = amc.load_state_dict(directory, plan=plan, memory_map=True)
    assert_as_run(mapped)
    assert mapped.report.bytes_mapped >= STORED["codes"].nbytes


def test_it_is_executed_in_memory(plan):
    buffers = buffers_of(plan)
    convert_tensors(plan, [STORED[name] for name in plan.sources.names], buffers)
    assert_as_run(buffers)


def test_it_is_executed_on_a_device(plan, directory):
    buffers = buffers_of(plan)
    scratch = {"scratch_bytes": 8192, "device_scratch_bytes": 8192}
    load_to_device(plan, open_checkpoint(directory), buffers, SimulatedDevice(), backend="torch", **scratch)
    assert_as_run(buffers)


def test_it_is_executed_in_parts(plan, directory):
    regions = {
        "transposed": box((8, 12), (3, 4), (5, 6)),
        "padded": box((16, 8), (0, 0), (3, 8)),
        "scales": box((4, 4), (1, 1), (2, 3)),
        "nan": box((2, 2), (1, 0), (1, 2)),
    }
    parts = amc.load_state_dict(directory, plan=plan.shard(regions))
    wanted = from_hf(STORED)
    assert_bytes_equal(parts["transposed"], wanted["transposed"][3:8, 4:10].contiguous())
    assert_bytes_equal(parts["padded"], wanted["padded"][:3].contiguous())
    assert_bytes_equal(parts["scales"], wanted["scales"][1:3, 1:].contiguous())
    assert_bytes_equal(parts["nan"], wanted["nan"][1:].contiguous())


def test_summary_and_explain_show_constants_and_other_dtypes(plan):
    assert "constants" in plan.summary()
    assert "constant nan -> [0 + 4x1]" in plan.explain("nan")
    assert "codes F32 [4, 4]" in plan.explain("scales")


def test_a_checkpoint_with_other_bytes_under_the_name_is_refused(plan, tmp_path):
    # 17 bytes in a row have as many float32 as 16.
    save_file({**STORED, "codes": torch.zeros(4, 17, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(NameProblems, match=r"codes: the plan reads U8 \[4, 16\] as F32 \[4, 4\], found U8 \[4, 17\]"):
        amc.load_state_dict(tmp_path, plan=plan)


def test_checkpoint_without_bytes_that_are_read_as_another_dtype_is_refused(plan, tmp_path):
    save_file({name: tensor for name, tensor in STORED.items() if name != "codes"}, tmp_path / "model.safetensors")
    with pytest.raises(NameProblems, match=r"the checkpoint lacks \(1\):\n *codes"):
        amc.load_state_dict(tmp_path, plan=plan)


def test_sources_in_another_order_are_found(plan, tmp_path):
    halves = [dict(list(STORED.items())[2:]), dict(list(STORED.items())[:2])]
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_as_run(amc.load_state_dict(tmp_path, plan=plan))


SOURCES = SourceTable(["a", "b"], ["F32", "U8"], [(4,), (8,)])
RUN = Piece(0, run_of(4), 0, 0)
READ = Read(0, torch.float32, torch.float32)


def view(storage, dtype=torch.float32, shape=(4,)):
    return View(storage, dtype, 0, shape, (1,))


def test_targets_are_planned_computed_or_missing():
    traced = traced_plan(
        {
            "copied": (view(1), Filled(((READ, RUN),))),
            "computed": (view(2), Filled(unknown=Unknown("exp", frozenset([1])))),
            "missing": (view(3), Filled(is_written=False)),
        },
        SOURCES,
    )
    assert [target.name for target in traced.plan.targets] == ["copied"]
    assert traced.computed == {"computed": Unknown("exp", frozenset([1]))}
    assert traced.plan.missing == ("missing",)


def test_names_of_one_view_are_tied():
    filled = Filled(((READ, RUN),))
    traced = traced_plan({"a": (view(1), filled), "b": (view(1), filled), "c": (view(2), filled)}, SOURCES)
    assert traced.plan.tied == (("a", "b"),)
    assert len({id(target.copies) for target in traced.plan.targets}) == 1


def test_parts_of_one_storage_are_not_tied():
    filled = Filled(((READ, RUN),))
    traced = traced_plan({"a": (view(1), filled), "b": (view(1)._replace(offset=4), filled)}, SOURCES)
    assert traced.plan.tied == ()


def test_first_source_is_read_as_another_dtype():
    read = Read(0, torch.int16, torch.int16)
    targets = {"a": (view(1, torch.int16, (8,)), Filled(((read, Piece(0, run_of(8), 0, 0)),)))}
    sources = traced_plan(targets, SOURCES).plan.sources
    assert (sources.stored, sources.dtypes, sources.shapes) == ({0: ("F32", (4,))}, ["I16", "U8"], [(8,), (8,)])


def test_computed_target_needs_all_of_its_sources():
    bytes_read, as_float = Read(1, torch.uint8, torch.uint8), Read(1, torch.float32, torch.float32)
    both = Filled(((READ, Piece(0, run_of(2), 0, 0)), (as_float, Piece(0, run_of(2), 0, 2))))
    targets = {
        "bytes": (view(1, torch.uint8, (8,)), Filled(((bytes_read, Piece(0, run_of(8), 0, 0)),))),
        "both": (view(2), both),
    }
    assert traced_plan(targets, SOURCES).computed["both"].rows == {0, 1}


def test_the_second_dtype_of_a_source_is_computed():
    as_float, as_half = (Read(1, dtype, dtype) for dtype in (torch.float32, torch.float16))
    targets = {
        "float": (view(1, shape=(2,)), Filled(((as_float, Piece(0, run_of(2), 0, 0)),))),
        "half": (view(2, torch.float16), Filled(((as_half, RUN),))),
    }
    traced = traced_plan(targets, SOURCES)
    assert traced.plan.sources.stored == {1: ("U8", (8,))}
    assert (traced.plan.sources.dtypes[1], traced.plan.sources.shapes[1]) == ("F32", (2,))
    assert traced.computed == {"half": Unknown("reads one tensor as two dtypes", frozenset([1]))}


def test_constants_fill_what_no_copy_fills():
    filled = Filled(((READ, Piece(0, run_of(2), 0, 0)),), ((7.0, Piece(0, run_of(2), 0, 2)),))
    (target,) = traced_plan({"a": (view(1), filled)}, SOURCES).plan.targets
    assert [(fill.value, fill.offset, fill.numel) for fill in target.fills] == [(7.0, 2, 2)]
    assert target.copied_numel == 2


def test_a_plan_that_leaves_elements_out_is_refused():
    with pytest.raises(CoverageError, match="partly unwritten"):
        traced_plan({"a": (view(1), Filled(((READ, Piece(0, run_of(3), 0, 0)),)))}, SOURCES)
