"""Tests of the stages of a conversion: composed to one plan, and without their casts."""

import pytest

from automodel_conv.compiling.stages import arranging_stages, composed, without_casts
from automodel_conv.planning.arrangement import TRANSPOSED
from automodel_conv.planning.copies import Decode, Fallback, SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.rule_outputs import RuleOutputs
from automodel_conv.upstream.rules import RuleSet
from tests.planning.oracles import addressed, execute
from tests.planning.plans import three_plans


def test_one_stage_is_the_plan_itself():
    first, _, _ = three_plans()
    assert composed([first]) is first


def test_stages_run_one_after_the_other():
    stages = three_plans()
    elements = addressed(stages[0].sources)
    step_by_step = elements
    for stage in stages:
        step_by_step = execute(stage, step_by_step)
    whole = composed(stages)
    assert whole.sources == stages[0].sources
    assert execute(whole, elements) == step_by_step


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (1, 1), (2, 4, 6)])
def test_sources_that_are_stored_transposed_need_a_stage(shape):
    decode = Decode("e4m3", shape[-2:], (1, 1), 1, arrangement=TRANSPOSED)
    sources = SourceTable(["w", "s", "b"], ["BF16", "F32", "F32"], [shape, shape, (2,)], {0: decode}, frozenset({1}))
    (stage,) = arranging_stages(sources)
    *lead, rows, columns = shape
    assert [(target.name, target.shape) for target in stage.targets] == [("w", (*lead, columns, rows)), ("b", (2,))]
    results = execute(CopyPlan(sources, stage.targets), addressed(sources))
    matrices = [results["w"][n : n + rows * columns] for n in range(0, len(results["w"]), rows * columns)]
    for matrix, elements in enumerate(matrices):
        assert elements == [
            ("w", matrix * rows * columns + row * columns + column) for column in range(columns) for row in range(rows)
        ]


def test_sources_that_are_stored_as_weights_need_no_stage():
    decode = Decode("e4m3", (2, 3), (1, 1), 1)
    assert arranging_stages(SourceTable(["w", "s"], ["BF16", "F32"], [(2, 3)] * 2, {0: decode})) == []
    assert arranging_stages(SourceTable([], [], [])) == []


def test_casts_are_removed_where_all_sources_have_one_dtype():
    sources = SourceTable(["a", "b", "c"], ["BF16", "BF16", "F16"], [(4,)] * 3)
    copies = RuleOutputs(sources, RuleSet([]), {}, {}).whole(4)
    twice = tuple(copy._replace(ordinals=(1,), target_offsets=(4,)) for copy in copies)
    upstream = Fallback("for a test", lambda tensors: {})
    targets = (
        Target("one", "F32", (4,), -1, (0,), copies),
        Target("same", "F32", (8,), -1, (0, 1), (*copies, *twice)),
        Target("mixed", "F32", (8,), -1, (0, 2), (*copies, *twice)),
        Target("upstream", "F32", (4,), -1, (0,), (), upstream),
    )
    plan = without_casts(CopyPlan(sources, targets, ("a rule",)))
    assert {target.name: target.dtype for target in plan.targets} == {
        "one": "BF16",
        "same": "BF16",
        "mixed": "F32",
        "upstream": "F32",
    }
    assert [target.copies for target in plan.targets] == [target.copies for target in targets]
    assert plan.rules == ("a rule",)
