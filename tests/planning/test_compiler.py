"""Tests of compiled plans, and of the problems that they leave out."""

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.rules import RuleSet
from tests.planning.oracles import execute


def merging():
    return WeightConverter("experts.*.w1.weight", "experts.gate_up_proj", operations=[MergeModulelist(dim=0)])


def compiled(sources, targets, rules=(), dtype=None, **options):
    """Compile sources ``{name: (dtype, shape)}`` to targets of the same form, or to what the rules produce."""
    dtypes, shapes = zip(*sources.values(), strict=True)
    specs = None if targets is None else {name: TargetSpec(*spec) for name, spec in targets.items()}
    return compile_targets(SourceTable(list(sources), dtypes, shapes), RuleSet(rules), specs, dtype, **options)


def test_targets_come_in_the_order_of_the_model_with_its_dtypes():
    sources = {"b": ("BF16", (2,)), "a": ("BF16", (3,))}
    plan, problems = compiled(sources, {"a": ("F32", (3,)), "b": ("BF16", (2,))})
    assert [(t.name, t.dtype, t.shape, t.sources) for t in plan.targets] == [
        ("a", "F32", (3,), (1,)),
        ("b", "BF16", (2,), (0,)),
    ]
    assert problems.reasons() == []


def test_names_that_do_not_fit_are_listed_and_left_out():
    sources = {"a": ("F32", (2,)), "old": ("F32", (2,)), "wide": ("F32", (2, 3))}
    plan, problems = compiled(sources, {"a": ("F32", (2,)), "new": ("F32", (2,)), "wide": ("F32", (3, 2))})
    assert [target.name for target in plan.targets] == ["a"]
    assert (problems.missing, problems.unexpected) == (["new"], ["old"])
    assert problems.mismatched == [("wide", (2, 3), (3, 2))]
    assert (plan.missing, plan.unexpected, plan.mismatched) == (("new",), ("old",), (("wide", (2, 3), (3, 2)),))
    assert problems.unclaimed == [1]


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (1, 1), (0, 3)])
def test_merged_experts_hold_gate_above_up(shape):
    rows, columns = shape
    names = [f"experts.{e}.{w}.weight" for w in ("w3", "w1") for e in (1, 0)]
    plan, problems = compiled({name: ("F32", shape) for name in names}, None, [two_projections()])
    results = execute(plan, {name: [(name, i) for i in range(rows * columns)] for name in names})
    assert problems.reasons() == []
    assert results["experts.gate_up_proj"] == [
        (f"experts.{e}.{w}.weight", i) for e in (0, 1) for w in ("w1", "w3") for i in range(rows * columns)
    ]
    assert plan.targets[0].shape == (2, 2 * rows, columns)


@pytest.mark.parametrize("rows", [6, 3, 0])
def test_one_source_fills_several_targets(rows):
    rule = WeightConverter("qkv", ["q", "k", "v"], operations=[Chunk(dim=0)])
    targets = {name: ("F32", (rows // 3, 2)) for name in "qkv"}
    plan, problems = compiled({"qkv": ("F32", (rows, 2))}, targets, [rule])
    results = execute(plan, {"qkv": list(range(2 * rows))})
    assert problems.reasons() == []
    assert results == {
        name: list(range(2 * rows))[n * 2 * rows // 3 :][: 2 * rows // 3] for n, name in enumerate("qkv")
    }


def test_parts_of_several_dtypes_are_refused():
    sources = {"experts.0.w1.weight": ("F32", (2, 3)), "experts.1.w1.weight": ("BF16", (2, 3))}
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj have different dtypes(.|\n)*\['BF16', 'F32'\]"):
        compiled(sources, None, [merging()])
    plan, _ = compiled(sources, None, [merging()], dtype="F16")
    assert plan.targets[0].dtype == "F16"


def test_integers_keep_their_dtype_if_floats_are_cast():
    plan, _ = compiled({"a": ("I64", (2,)), "b": ("F32", (2,))}, None, dtype="BF16")
    assert {target.name: target.dtype for target in plan.targets} == {"a": "I64", "b": "BF16"}


def test_operation_of_the_user_needs_a_model():
    class Doubled(MergeModulelist):
        pass

    rule = WeightConverter("experts.*.w1.weight", "experts.gate_up_proj", operations=[Doubled(dim=0)])
    sources = {f"experts.{e}.w1.weight": ("F32", (2, 3)) for e in range(2)}
    plan, problems = compiled(sources, None, [rule])
    assert plan.targets == ()
    assert "only a model" in problems.failed[0][1]
    plan, problems = compiled(sources, {"experts.gate_up_proj": ("F32", (2, 2, 3))}, [rule])
    assert plan.targets[0].fallback is not None
    assert problems.reasons() == []


def test_two_sources_for_an_operation_with_one_input_are_named():
    rules = [
        WeightRenaming("old", "new"),
        WeightConverter("new.w", "new.t", operations=[Transpose(0, 1)]),
    ]
    table = SourceTable(["old.w", "new.w"], ["F32", "F32"], [(2, 3), (2, 3)])
    targets = {"new.t": TargetSpec("F32", (3, 2))}
    _, problems = compile_targets(table, RuleSet(rules), targets)
    assert problems.duplicated


def two_projections():
    return WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )


def test_missing_expert_is_named():
    names = [f"layers.3.experts.{e}.{w}.weight" for e in range(20) for w in ("w1", "w3") if (e, w) != (17, "w3")]
    table = SourceTable(names, ["F32"] * len(names), [(2, 5)] * len(names))
    targets = {"layers.3.experts.gate_up_proj": TargetSpec("F32", (20, 4, 5))}
    plan, problems = compile_targets(table, RuleSet([two_projections()]), targets)
    assert plan.targets == ()
    assert problems.incomplete == [("layers.3.experts.gate_up_proj", ("layers.3.experts.17.w3.weight",))]


def test_missing_last_experts_and_projections_are_named():
    names = [f"layers.3.experts.{e}.w1.weight" for e in range(18)]
    table = SourceTable(names, ["F32"] * len(names), [(2, 5)] * len(names))
    targets = {"layers.3.experts.gate_up_proj": TargetSpec("F32", (20, 4, 5))}
    _, problems = compile_targets(table, RuleSet([two_projections()]), targets)
    ((target, parts),) = problems.incomplete
    assert target == "layers.3.experts.gate_up_proj"
    assert parts[:2] == tuple(f"layers.3.experts.{e}.w1.weight" for e in (18, 19))
    assert len(parts) == 3
    assert "w3" in parts[2]


def test_gap_in_the_experts_is_named_without_a_model():
    names = [f"experts.{e}.w1.weight" for e in range(20) if e != 17]
    table = SourceTable(names, ["F32"] * len(names), [(2, 5)] * len(names))
    _, problems = compile_targets(table, RuleSet([merging()]), None)
    assert problems.incomplete == [("experts.gate_up_proj", ("experts.17.w1.weight",))]


def test_empty_experts_keep_their_dtype():
    table = SourceTable([f"experts.{e}.w1.weight" for e in range(3)], ["BF16"] * 3, [(0, 5)] * 3)
    plan, _ = compile_targets(table, RuleSet([merging()]), None)
    assert [(target.dtype, target.shape) for target in plan.targets] == [("BF16", (3, 0, 5))]
