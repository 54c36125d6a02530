"""Tests of plans from the tensors of a checkpoint to those of a model."""

import pytest
import torch
from torch import nn

from automodel_conv.compiling.to_model import loading_plan, shapes_to_make, without_tied
from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.arrangement import TRANSPOSED
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from tests.compiling.support import Experts, Model, StatedExperts, table
from tests.planning.oracles import addressed, execute

EXPERTS, INTERMEDIATE, HIDDEN = 2, 3, 4
TRANSFORMERS = {"norm.weight": (1, 2), "experts.gate_up_proj": (2, 6, 4), "experts.down_proj": (2, 4, 3)}
NEMO = {"norm.weight": (1, 2), "experts.gate_and_up_projs": (2, 4, 6), "experts.down_projs": (2, 3, 4)}


def test_all_tensors_of_a_model_are_filled_from_their_namesakes():
    sources = table({"bias": (2,), "weight": (2, 3)})
    plan, problems = loading_plan(sources, model=nn.Linear(3, 2))
    assert [(target.name, target.dtype) for target in plan.targets] == [("weight", "F32"), ("bias", "F32")]
    assert execute(plan, addressed(sources)) == addressed(sources)
    assert problems.reasons() == problems.missing == []


def test_dtype_of_the_caller_casts_floats_only():
    sources = SourceTable(["a", "b"], ["F32", "I64"], [(2,), (2,)])
    plan, _ = loading_plan(sources, rules=[], dtype=torch.bfloat16)
    assert {target.name: target.dtype for target in plan.targets} == {"a": "BF16", "b": "I64"}


@pytest.mark.parametrize(("experts", "intermediate", "hidden"), [(2, 3, 4), (2, 2, 4), (2, 4, 4), (1, 1, 1)])
def test_experts_are_brought_from_the_source_layout_to_that_of_the_model(experts, intermediate, hidden):
    model = Model(StatedExperts(experts, intermediate, hidden))
    sources = table(
        {
            "norm.weight": (1, experts),
            "experts.gate_and_up_projs": (experts, hidden, 2 * intermediate),
            "experts.down_projs": (experts, intermediate, hidden),
        }
    )
    plan, problems = loading_plan(sources, model=model, source_layout="nemo")
    assert problems.missing == problems.unexpected == problems.reasons() == []
    results = execute(plan, addressed(sources))
    size = 2 * intermediate * hidden
    assert results["experts.gate_up_proj"] == [
        ("experts.gate_and_up_projs", e * size + h * 2 * intermediate + row)
        for e in range(experts)
        for row in range(2 * intermediate)
        for h in range(hidden)
    ]


def test_rows_of_problems_are_those_of_the_first_stage():
    decode = Decode("e4m3", (2, 3), (1, 1), 1, arrangement=TRANSPOSED)
    sources = SourceTable(["w", "s", "extra"], ["F32"] * 3, [(2, 3), (2, 3), (7,)], {0: decode}, frozenset({1}))
    linear = nn.Module()
    linear.w = nn.Parameter(torch.zeros(3, 2))
    _, problems = loading_plan(sources, model=linear)
    assert problems.unclaimed == [2]


def test_model_in_place_must_have_the_requested_layout():
    model = Model(StatedExperts(EXPERTS, INTERMEDIATE, HIDDEN))
    assert (
        loading_plan(table(TRANSFORMERS), model=model, layout="nemo")[0].targets[1].name.endswith("gate_and_up_projs")
    )
    with pytest.raises(UnsupportedError, match=r"experts are not in the layout 'nemo'"):
        loading_plan(table(TRANSFORMERS), model=model, layout="nemo", in_place=True)


def test_shapes_come_from_the_requested_layout():
    model = Model(StatedExperts(EXPERTS, INTERMEDIATE, HIDDEN))
    state = model.state_dict()
    assert shapes_to_make(model, state, None, in_place=True) == TRANSFORMERS
    assert shapes_to_make(model, state, "transformers", in_place=True) == TRANSFORMERS
    assert shapes_to_make(model, state, "nemo", in_place=False) == NEMO
    with pytest.raises(UnsupportedError, match="'nemo'"):
        shapes_to_make(model, state, "nemo", in_place=True)


def test_extra_state_that_is_no_tensor_has_no_shape():
    assert shapes_to_make(nn.Linear(1, 1), {"a": torch.ones(3), "extra": 7}, None, in_place=False) == {"a": (3,)}


def test_experts_without_a_stated_layout_are_recognized_by_name():
    model = Model(Experts(EXPERTS, INTERMEDIATE, HIDDEN, transposed=True))
    shapes = shapes_to_make(model, model.state_dict(), "gpt_oss", in_place=True)
    assert shapes["experts.down_proj"] == (EXPERTS, INTERMEDIATE, HIDDEN)


def test_missing_name_is_no_problem_if_its_tensor_has_another_name():
    sources = table({"embed": (2,)})
    plan = CopyPlan(sources, (Target("embed", "F32", (2,), -1, (0,), ()),))
    tied = [("head", "embed"), ("a", "b")]
    assert without_tied(["head", "a", "c"], plan, tied) == ["a", "c"]
    assert without_tied(["head"], plan, []) == ["head"]


def test_scales_of_caches_fill_nothing_unless_the_model_has_them():
    scale = "self_attn.k_scale"
    linear = nn.Module()
    linear.w = nn.Parameter(torch.zeros(2))
    plan, problems = loading_plan(table({"w": (2,), scale: ()}), model=linear)
    assert [target.name for target in plan.targets] == ["w"]
    assert problems.unexpected == []
    linear.self_attn = nn.Module()
    linear.self_attn.k_scale = nn.Parameter(torch.zeros(()))
    plan, _ = loading_plan(table({"w": (2,), scale: ()}), model=linear)
    assert [target.name for target in plan.targets] == ["w", scale]


def test_names_of_wrappers_are_removed_only_if_something_gives_names():
    names = {"_orig_mod.weight": (2, 3), "_orig_mod.bias": (2,)}
    plan, _ = loading_plan(table(names), model=nn.Linear(3, 2))
    assert [target.name for target in plan.targets] == ["weight", "bias"]
    plan, _ = loading_plan(table(names), rules=[])
    assert [target.name for target in plan.targets] == list(names)
