"""Tests of rules that are lowered for sources of given shapes, once for equal shapes."""

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers import core_model_loading as core
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.operations import NotLowerable
from automodel_conv.planning.resolve import resolve
from automodel_conv.planning.rule_outputs import RuleOutputs
from automodel_conv.planning.values import LoweringError
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles

MERGE = WeightConverter("experts.*.w1.weight", "experts.gate_up_proj", operations=[MergeModulelist(dim=0)])
SPLIT = WeightConverter("qkv", ["q", "k", "v"], operations=[Chunk(dim=0)])
TURN = WeightConverter("down", "down", operations=[Transpose(0, 1, check_dims=True)])


def outputs_of(rule, sources, parameters=None, transposed=None):
    """Return the outputs of a rule, and its assignments by target."""
    table = SourceTable(list(sources), ["F32"] * len(sources), list(sources.values()))
    rules = RuleSet([rule])
    assignments = {assignment.target: assignment for assignment in resolve(table.names, rules, None).assignments}
    return RuleOutputs(table, rules, parameters or {}, transposed or {}), assignments


def elements(output):
    written = oracles.written(piece for copy in output.copies for piece in copy.pieces())
    return [written[element] for element in sorted(written)]


@pytest.mark.parametrize("numel", [0, 1, 6])
def test_tensor_that_stays_unchanged_is_one_run(numel):
    outputs, _ = outputs_of(MERGE, {"a": (2, 3)})
    copies = outputs.whole(numel)
    assert outputs.whole(numel) is copies
    written = oracles.written(piece for copy in copies for piece in copy.pieces())
    assert written == {element: (0, element) for element in range(numel)}


def test_equal_rules_over_equal_shapes_are_lowered_once():
    sources = {f"{layer}.experts.{e}.w1.weight": (2, 3) for layer in "ab" for e in range(2)}
    sources |= {f"c.experts.{e}.w1.weight": (3, 2) for e in range(2)}
    outputs, assignments = outputs_of(MERGE, sources)
    a, b, c = (outputs.lower_rule(assignments[f"{layer}.experts.gate_up_proj"]) for layer in "abc")
    assert a is b
    assert [lowered.outputs[0].shape for lowered in (a, c)] == [(2, 2, 3), (2, 3, 2)]


def test_sources_that_differ_after_the_first_are_lowered_separately():
    rule = WeightConverter(["first", "second.*"], "both", operations=[Concatenate(dim=0)])
    rows = {"a": (2, 1), "b": (2, 5), "c": (1, 1)}
    sources = {f"{layer}.first": (2, 3) for layer in rows}
    sources |= {f"{layer}.second.{n}": (size, 3) for layer, sizes in rows.items() for n, size in enumerate(sizes)}
    outputs, assignments = outputs_of(rule, sources)
    shapes = {layer: outputs.lower_rule(assignments[f"{layer}.both"]).outputs[0].shape for layer in rows}
    assert shapes == {layer: (2 + sum(sizes), 3) for layer, sizes in rows.items()}


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 2)], [(2, 3), (2, 4)]])
def test_sources_that_do_not_fit_each_other_are_refused(shapes):
    outputs, assignments = outputs_of(MERGE, {f"experts.{e}.w1.weight": shape for e, shape in enumerate(shapes)})
    with pytest.raises(LoweringError, match="MergeModulelist"):
        outputs.lower_rule(assignments["experts.gate_up_proj"])


def test_each_output_reads_its_own_part():
    outputs, assignments = outputs_of(SPLIT, {"qkv": (3, 2)})
    lowered = outputs.lower_rule(assignments["q"])
    assert [(output.key, output.shape, output.reads) for output in lowered.outputs] == [
        (key, (1, 2), (0,)) for key in "qkv"
    ]
    assert [elements(output) for output in lowered.outputs] == [[(0, 2 * n), (0, 2 * n + 1)] for n in range(3)]
    assert lowered.dropped == ()


@pytest.mark.parametrize(("shape", "dropped"), [((2, 3), (1,)), ((0, 3), ())])
def test_sources_that_no_output_reads_are_listed_unless_they_are_empty(shape, dropped):
    rule = WeightConverter("new.*", "t", operations=[Transpose(0, 1)])
    outputs, assignments = outputs_of(rule, {"new.0": shape, "new.1": shape})
    assert outputs.lower_rule(assignments["t"]).dropped == dropped


def test_square_matrix_is_transposed_for_the_targets_that_need_it():
    decided = {"a.down": True, "b.down": False}
    outputs, assignments = outputs_of(TURN, {"a.down": (2, 2), "b.down": (2, 2)}, {}, decided)
    assert elements(outputs.lower_rule(assignments["a.down"]).outputs[0]) == [(0, 0), (0, 2), (0, 1), (0, 3)]
    assert elements(outputs.lower_rule(assignments["b.down"]).outputs[0]) == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.skipif(not hasattr(core, "Split"), reason="this transformers has no Split")
def test_operation_that_uses_shapes_needs_a_model():
    rule = WeightConverter("both", ["first", "second"], operations=[core.Split(dim=0)])
    outputs, assignments = outputs_of(rule, {"both": (5, 2)})
    with pytest.raises(NotLowerable, match=r"shapes of first, second.*only a model"):
        outputs.lower_rule(assignments["first"])
    outputs, assignments = outputs_of(rule, {"both": (5, 2)}, {"first": (2, 2), "second": (3, 2)})
    lowered = outputs.lower_rule(assignments["first"])
    assert [(output.key, output.shape) for output in lowered.outputs] == [("first", (2, 2)), ("second", (3, 2))]
