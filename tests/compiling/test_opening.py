"""Tests of checkpoints opened for a load, with a new plan or with that of the caller."""

import sys
from contextlib import nullcontext

import pytest
from torch import nn

from automodel_conv.compiling.opening import fitted_plan, open_to_load, while_importing
from automodel_conv.compiling.options import LoadSettings
from automodel_conv.compiling.planned import compile_plan
from automodel_conv.errors import CheckpointError, ConversionError, NameProblems, UnsupportedError
from automodel_conv.execution.report import Clock
from automodel_conv.files.shards import LAYOUT_KEY
from tests.compiling.support import Model, StatedExperts, tensors_of, write

LINEAR = {"weight": (2, 3), "bias": (2,)}
EXPERTS = {"norm.weight": (1, 2), "experts.gate_up_proj": (2, 6, 4), "experts.down_proj": (2, 4, 3)}


def opened(directory, model, **options):
    return open_to_load(directory, model, model.state_dict(), LoadSettings(**options), Clock())


def test_load_is_planned_for_the_model(tmp_path):
    checkpoint = write(tmp_path, tensors_of(LINEAR))
    model = nn.Linear(3, 2)
    result = opened(tmp_path, model)
    assert result.plan == compile_plan(checkpoint, nn.Linear(3, 2))
    assert result.checkpoint.names == checkpoint.names
    assert result.model is model


def test_without_strict_problems_are_returned_instead_of_raised(tmp_path):
    write(tmp_path, tensors_of({"weight": (2, 3), "gain": (2,)}))
    with pytest.raises(NameProblems, match="bias"):
        opened(tmp_path, nn.Linear(3, 2))
    problems = opened(tmp_path, nn.Linear(3, 2), strict=False).problems
    assert (problems.missing, problems.unexpected) == (["bias"], ["gain"])


def test_plan_of_the_caller_is_moved_to_the_rows_of_this_checkpoint(tmp_path):
    plan = compile_plan(write(tmp_path, tensors_of(LINEAR)), nn.Linear(3, 2))
    (tmp_path / "other").mkdir()
    checkpoint = write(tmp_path / "other", tensors_of({"bias": (2,), "added": (9, 9), "weight": (2, 3)}))
    with pytest.raises(NameProblems, match="added"):
        opened(tmp_path / "other", nn.Linear(3, 2), plan=plan)
    result = opened(tmp_path / "other", nn.Linear(3, 2), plan=plan.to_json(), strict=False)
    assert {target.name: checkpoint.names[target.sources[0]] for target in result.plan.targets} == {
        "weight": "weight",
        "bias": "bias",
    }


@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (2, 2), (1, 3)])
def test_plan_of_a_model_with_other_shapes_is_refused(tmp_path, rows, columns):
    plan = compile_plan(write(tmp_path, tensors_of(LINEAR)), nn.Linear(3, 2))
    with pytest.raises(NameProblems, match=r"weight(.|\n)*\[2, 3\]"):
        opened(tmp_path, nn.Linear(columns, rows), plan=plan)


def test_plan_leaves_no_choice_to_other_options(tmp_path):
    plan = compile_plan(write(tmp_path, tensors_of(LINEAR)), nn.Linear(3, 2))
    with pytest.raises(ConversionError, match="dequantize"):
        opened(tmp_path, nn.Linear(3, 2), plan=plan, dequantize=False)


def test_files_of_another_layout_than_that_of_the_plan_are_refused(tmp_path):
    model = Model(StatedExperts(2, 3, 4))
    plan = compile_plan(write(tmp_path, tensors_of(EXPERTS)), model)
    marked = write(tmp_path, tensors_of(EXPERTS), metadata={LAYOUT_KEY: "gpt_oss"})
    with pytest.raises(UnsupportedError, match=r"expected: files that .*no(.|\n)*found: +'gpt_oss'"):
        fitted_plan(plan, marked, model, model.state_dict(), True)
    assert fitted_plan(plan, write(tmp_path, tensors_of(EXPERTS)), model, model.state_dict(), True)[0] == plan


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing"):
        opened(tmp_path / "nothing", nn.Linear(3, 2))


def test_nothing_is_read_ahead_once_transformers_is_imported(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, tensors_of(LINEAR))
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", sys)
    assert isinstance(while_importing(checkpoint), nullcontext)
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert not isinstance(while_importing(checkpoint), nullcontext)
