"""Tests of the result of ``plan``: its copies fill targets as a load does, and its numbers are those of the table."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.cli.results.plans import plan_result
from automodel_conv.cli.results.schema import envelope
from automodel_conv.errors import UnknownTarget
from tests.cli.answers import answer
from tests.cli.support import run
from tests.planning.plans import padded_plan

EXPERTS, ROWS, COLUMNS = 3, 4, 5


@pytest.fixture
def grouped(tmp_path):
    tensors = {
        "layers.0.experts.gate_up_proj": torch.arange(EXPERTS * 2 * ROWS * COLUMNS)
        .view(EXPERTS, 2 * ROWS, COLUMNS)
        .float(),
        "layers.0.experts.down_proj": torch.arange(EXPERTS * COLUMNS * ROWS).view(EXPERTS, COLUMNS, ROWS).float(),
        "norm": torch.ones(COLUMNS),
        "empty": torch.ones(0),
        "scalar": torch.ones(()),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def filled_from(target, tensors):
    """Return a target whose elements were copied one by one, as the JSON states."""
    flat = [None] * torch.Size(target["shape"]).numel()
    for copy in target["copies"]:
        source = tensors[copy["source"]].flatten().tolist()
        for index in product(*map(range, copy["shape"])):
            here, there = (
                copy[f"{end}_offset"] + sum(i * stride for i, stride in zip(index, copy[f"{end}_strides"], strict=True))
                for end in ("target", "source")
            )
            assert flat[here] is None
            flat[here] = source[there]
    return torch.tensor(flat).view(target["shape"])


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_copies_fill_each_target_as_a_load_does(grouped, layout):
    tensors = amc.load_state_dict(grouped, rules=[])
    loaded = amc.load_state_dict(grouped, rules=[], source_layout="transformers", layout=layout)
    plan = amc.compile_plan(grouped, rules=[], source_layout="transformers", layout=layout)
    options = ["--no-model", "--source-layout", "transformers", "--layout", layout]
    explains = [word for name in loaded for word in ("--explain", name)]
    result = answer(run("plan", grouped, *options, *explains, "--json").stdout)["result"]
    assert [target["name"] for target in result["explained"]] == [*loaded]
    for target in result["explained"]:
        expected = loaded[target["name"]]
        assert torch.equal(filled_from(target, tensors), expected), target["name"]
        assert target["shape"] == list(expected.shape)
        assert (target["dtype"], target["nbytes"]) == ("F32", expected.nbytes)
        assert target["execution"] == plan.execution_of(plan.target(target["name"]))
        assert [copy["source_dtype"] for copy in target["copies"]] == ["F32"] * len(target["copies"])
    assert (result["layout"], result["source_layout"]) == (layout, "transformers")


def test_numbers_are_those_of_the_plan(grouped):
    plan = amc.compile_plan(grouped, rules=[], source_layout="transformers", layout="nemo")
    result = plan_result(plan, (), None)
    assert (result.targets, result.sources) == (5, 5)
    assert (result.bytes_read, result.bytes_written) == (plan.bytes_read, plan.bytes_written)
    assert sum(rule.nbytes for rule in result.rules) == plan.bytes_written
    assert (result.explained, result.mesh, result.left_out, result.fallbacks) == ((), None, (), ())


def test_constants_are_named(tmp_path):
    """Check a layout that fills the rest of its blocks with zeros."""
    shapes = {"experts.gate_up_proj": (1, 2 * ROWS, 64), "experts.down_proj": (1, 64, ROWS)}
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, rules=[], source_layout="transformers", layout="vllm_trtllm_padded")
    by_name = {target.name: target for target in plan.targets}
    explained = plan_result(plan, by_name, None).explained
    for target in explained:
        fills = by_name[target.name].fills
        assert [(fill.value, fill.shape, fill.strides, fill.offset) for fill in target.fills] == [*map(tuple, fills)]
    assert any(target.fills for target in explained)


INF = float("inf")


@pytest.mark.parametrize(
    ("value", "written"), [(INF, "inf"), (-INF, "-inf"), (float("nan"), "nan"), (0.5, 0.5), (True, True)]
)
def test_constants_that_json_has_no_number_for_are_text(value, written):
    plan = padded_plan()
    (target,) = plan.targets
    target = target._replace(fills=tuple(fill._replace(value=value) for fill in target.fills))
    result = plan_result(replace(plan, targets=(target,)), [target.name], None)
    [explained] = answer(envelope("plan", result=result) + "\n")["result"]["explained"]
    assert [constant["value"] for constant in explained["fills"]] == [written]


def test_unknown_target_is_an_error(grouped):
    with pytest.raises(UnknownTarget, match="no target 'x'"):
        plan_result(amc.compile_plan(grouped, rules=[]), ["x"], None)


def test_ranks_of_a_mesh_have_their_coordinates_by_name(grouped):
    options = ["--no-model", "--source-layout", "transformers", "--mesh", "ep=3,fsdp=2"]
    mesh = answer(run("plan", grouped, *options, "--json").stdout)["result"]["mesh"]
    assert (mesh["sizes"], mesh["world_size"]) == ({"ep": 3, "fsdp": 2}, 6)
    assert [rank["coordinate"] for rank in mesh["ranks"]] == [{"ep": e, "fsdp": f} for e in range(3) for f in range(2)]
    total = sum(tensor.nbytes for tensor in amc.load_state_dict(grouped, rules=[]).values())
    assert sum(rank["owned_bytes"] for rank in mesh["ranks"]) >= total


def test_saved_plan_and_page_are_written_with_json_too(grouped, tmp_path):
    options = ["--no-model", "--save", tmp_path / "plan.json", "--html", tmp_path / "plan.html"]
    answer(run("plan", grouped, *options, "--json").stdout)
    plan = amc.CopyPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan == amc.compile_plan(grouped, rules=[])
    assert (tmp_path / "plan.html").read_text().startswith("<!")
