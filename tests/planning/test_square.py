"""Tests of the orientation of square matrices, which other matrices of their module decide, and of undecided ones."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter, WeightRenaming

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.complete_uses import whole_conversions
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.resolve import resolve
from automodel_conv.planning.square import conditional_transposes, square_matrices
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles

PATH = "layers.0.mlp.experts"
GATE_UP, DOWN = f"{PATH}.gate_up_proj", f"{PATH}.down_proj"


def checking(*names, dims=(1, 2)):
    return [
        WeightConverter(f"mlp.experts.{n}", f"mlp.experts.{n}", operations=[Transpose(*dims, check_dims=True)])
        for n in names or ("gate_up_proj", "down_proj")
    ]


def stored_transposed(shape):
    return (shape[0], shape[2], shape[1])


def wanted(hidden, intermediate, experts=2):
    """Return the shapes of Qwen3-VL-MoE's experts."""
    return {GATE_UP: (experts, 2 * intermediate, hidden), DOWN: (experts, hidden, intermediate)}


def compiled(sources, targets, rules=None, **options):
    table = SourceTable(list(sources), ["I64"] * len(sources), list(sources.values()))
    specs = None if targets is None else {name: TargetSpec("I64", shape) for name, shape in targets.items()}
    return compile_targets(table, RuleSet(checking() if rules is None else rules), specs, **options)


def lies_transposed(plan):
    """Return for each target whether it is the transposed source, by moving numbered elements."""
    numbers = {}
    for name, shape in zip(plan.sources.names, plan.sources.shapes, strict=True):
        numbers[name] = list(range(shape[0] * shape[1] * shape[2]))
    results = oracles.execute(plan, numbers)
    is_transposed = {}
    for name, shape in zip(plan.sources.names, plan.sources.shapes, strict=True):
        if name in results:
            e, rows, columns = shape
            turned = [(i * rows + j) * columns + k for i in range(e) for k in range(columns) for j in range(rows)]
            assert results[name] in (numbers[name], turned)
            is_transposed[name] = results[name] == turned
    return is_transposed


SQUARE = [(4, 2), (4, 4)]  # hidden and intermediate size; first gate_up is square, then down


@pytest.mark.parametrize(("hidden", "intermediate"), [*SQUARE, (4, 3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_square_matrix_follows_the_other_matrix_of_its_module(hidden, intermediate, transposed, experts, order):
    targets = wanted(hidden, intermediate, experts)
    sources = {n: stored_transposed(s) if transposed else s for n, s in list(targets.items())[::order]}
    plan, problems = compiled(sources, targets)
    assert problems.reasons() == []
    assert lies_transposed(plan) == {GATE_UP: transposed, DOWN: transposed}
    table = SourceTable(list(sources), ["I64"] * 2, list(sources.values()))
    specs = {name: TargetSpec("I64", shape) for name, shape in targets.items()}
    whole, left = whole_conversions(table, RuleSet(checking()), specs)
    assert left == {}
    assert [target for one in whole for target in one.targets] == list(plan.targets)[::order]


def test_each_layer_decides_for_itself():
    one = wanted(4, 2)
    two = {name.replace("layers.0", "layers.1"): shape for name, shape in one.items()}
    plan, _ = compiled(one | {n: stored_transposed(s) for n, s in two.items()}, one | two)
    assert lies_transposed(plan) == dict.fromkeys(one, False) | dict.fromkeys(two, True)


@pytest.mark.parametrize("turned", [GATE_UP, DOWN])
def test_two_matrices_that_are_not_square_each_decide_for_themselves(turned):
    targets = wanted(4, 3)
    plan, problems = compiled({n: stored_transposed(s) if n == turned else s for n, s in targets.items()}, targets)
    assert problems.reasons() == []
    assert lies_transposed(plan) == {name: name == turned for name in targets}


@pytest.mark.parametrize(("hidden", "intermediate"), SQUARE)
def test_undecided_square_matrix_is_named(hidden, intermediate):
    targets = wanted(hidden, intermediate)
    [square] = [name for name, shape in targets.items() if shape == stored_transposed(shape)]
    with pytest.raises(UnsupportedError) as error:
        compiled({square: targets[square]}, targets)
    for text in (square, "source_layout=", '"transformers"', '"per_expert"'):
        assert text in str(error.value)
    assert str(error.value).count("proj") == 1


def test_square_matrices_of_one_module_do_not_decide_each_other():
    """Experts without a gate, of one size."""
    targets = {f"{PATH}.up_proj": (2, 4, 4), DOWN: (2, 4, 4)}
    with pytest.raises(UnsupportedError) as error:
        compiled(targets, targets, checking("up_proj", "down_proj"))
    assert f"{PATH}.up_proj [2, 4, 4]" in str(error.value)
    assert f"{DOWN} [2, 4, 4]" in str(error.value)


def test_matrix_that_fits_neither_way_decides_nothing():
    targets = wanted(4, 2)
    with pytest.raises(UnsupportedError, match="gate_up_proj"):
        compiled(targets | {DOWN: (2, 4, 5)}, targets)


def test_matrices_that_disagree_decide_nothing():
    names = ("gate_up_proj", "down_proj", "gate_proj")
    targets = wanted(4, 2) | {f"{PATH}.gate_proj": (2, 3, 4)}
    sources = targets | {DOWN: stored_transposed(targets[DOWN])}
    with pytest.raises(UnsupportedError, match="gate_up_proj"):
        compiled(sources, targets, checking(*names))


@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_decides_for_several(transposed):
    names = ("gate_proj", "up_proj", "down_proj")
    targets = {f"{PATH}.gate_proj": (2, 4, 4), f"{PATH}.up_proj": (2, 4, 4), DOWN: (2, 3, 4)}
    sources = {n: stored_transposed(s) if transposed else s for n, s in targets.items()}
    plan, problems = compiled(sources, targets, checking(*names))
    assert problems.reasons() == []
    assert lies_transposed(plan) == dict.fromkeys(targets, transposed)


@pytest.mark.parametrize("do", ["absent", "of another module", "of another kind of rule"])
def test_only_a_matrix_of_the_same_module_and_rule_decides(do):
    targets = wanted(4, 2)
    rules = checking()
    if do == "absent":
        sources = {GATE_UP: targets[GATE_UP]}
    elif do == "of another module":
        targets = {n.replace("layers.0", "layers.1") if n == DOWN else n: s for n, s in targets.items()}
        sources = targets
    else:
        sources, rules = targets, [*checking("gate_up_proj"), *checking("down_proj", dims=(0, 1))]
    with pytest.raises(UnsupportedError, match="gate_up_proj"):
        compiled(sources, targets, rules)


@pytest.mark.parametrize("shape", [(2, 1, 1), (0, 4, 4), (2, 0, 0)])
def test_matrix_unchanged_by_transposing_needs_no_decision(shape):
    plan, problems = compiled({DOWN: shape}, {DOWN: shape})
    assert problems.reasons() == []
    assert [target.shape for target in plan.targets] == [shape]


def test_shapes_are_those_at_the_operation():
    """The matrix is square where it is transposed, but no source is: it is merged from one per expert, reordered."""
    rules = [
        WeightConverter(
            f"mlp.experts.*.{n}.weight",
            f"mlp.experts.{n}",
            operations=[MergeModulelist(dim=0), Transpose(1, 2, check_dims=True)],
        )
        for n in ("gate_up_proj", "down_proj")
    ]
    targets = wanted(4, 2)
    sources = {
        f"{PATH}.{e}.{n.rpartition('.')[2]}.weight": stored_transposed(shape)[1:]
        for n, shape in targets.items()
        for e in range(2)
    }
    plan, problems = compiled(sources, targets, rules)
    assert problems.reasons() == []
    square = plan.target(GATE_UP)
    assert not square.is_whole
    assert {copy.box.source_strides for copy in square.copies} == {(1, 4)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "intermediate"), [*SQUARE, (4, 3)])
def test_transposed_option_decides_where_shapes_do_not(hidden, intermediate, transposed):
    targets = wanted(hidden, intermediate)
    sources = {n: stored_transposed(s) if transposed else s for n, s in targets.items()}
    for names in (list(sources), [GATE_UP], [DOWN]):
        plan, problems = compiled({n: sources[n] for n in names}, targets, transposed=transposed)
        assert problems.reasons() == []
        assert lies_transposed(plan) == dict.fromkeys(names, transposed)
    plan, _ = compiled(sources, None, transposed=transposed)  # this needs no model
    assert lies_transposed(plan) == dict.fromkeys(sources, transposed)


def test_shapes_overrule_a_wrong_transposed_option():
    targets = wanted(4, 3)
    plan, problems = compiled(targets, targets, transposed=True)
    assert problems.reasons() == []
    assert lies_transposed(plan) == dict.fromkeys(targets, False)


@pytest.mark.parametrize(("hidden", "intermediate"), [*SQUARE, (4, 3)])
def test_saving_never_transposes_and_needs_no_decision(hidden, intermediate):
    shapes = wanted(hidden, intermediate)
    for targets in (shapes, {GATE_UP: shapes[GATE_UP]}, {DOWN: shapes[DOWN]}):
        table = SourceTable(list(targets), ["I64"] * len(targets), list(targets.values()))
        plan, _ = compile_targets(table, RuleSet(checking(), reverse=True), None, parameters=targets)
        assert lies_transposed(plan) == dict.fromkeys(targets, False)


def test_rules_that_use_no_shape_are_unaffected():
    rules = RuleSet(
        [
            WeightRenaming("a", "b"),
            WeightConverter("mlp.experts.up_proj", "mlp.experts.up_proj", operations=[Transpose(1, 2)]),
        ]
    )
    assert conditional_transposes(rules) == {}
    shapes = {f"{PATH}.up_proj": (2, 4, 4)}
    assignments = resolve(list(shapes), rules, shapes).assignments
    assert square_matrices(assignments, rules, list(shapes.values()), shapes) == {}
