"""Tests of plans in sequence and of their inverses, executed one element at a time."""

from dataclasses import replace

import pytest
from hypothesis import given

from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.boxes import Box, NotAffine, Piece, run_of
from automodel_conv.planning.copies import Fallback, Fill, SourceTable, Target, group_pieces, zero_rows
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import box
from automodel_conv.planning.regions import whole as whole_of
from tests.planning.oracles import addressed, execute
from tests.planning.plans import (
    CHUNK,
    SEEDS,
    SWAP,
    experts_plan,
    padded_plan,
    plan_of,
    random_plan,
    table,
    table_of,
    targets_of,
    three_plans,
)

HEAD = Operation("Inkling2UnpadVocab", (("inverse", False), ("rows", 2)))


@given(SEEDS)
def test_inverse_after_the_plan_is_the_identity(seed):
    _, plan = random_plan(seed)
    start = addressed(plan.sources)
    assert execute(plan.inverse(), execute(plan, start)) == start
    assert execute(plan.then(plan.inverse()), start) == start


@given(SEEDS)
def test_inverse_of_the_inverse_copies_the_same(seed):
    _, plan = random_plan(seed)
    again = plan.inverse().inverse()
    start = addressed(plan.sources)
    assert execute(again, start) == execute(plan, start)


def test_then_equals_one_after_the_other_and_is_associative():
    first, second, third = three_plans()
    start = addressed(first.sources)
    stepwise = execute(third, execute(second, execute(first, start)))
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert execute(left, start) == execute(right, start) == stepwise
    assert [t[:3] for t in left.targets] == [t[:3] for t in right.targets]
    assert left.bytes_read == first.bytes_read
    assert left.bytes_written == third.bytes_written


@given(SEEDS)
def test_then_equals_one_after_the_other_for_any_chain(seed):
    rng, first = random_plan(seed)
    sources = table_of(first)
    second = plan_of(
        sources,
        targets_of(
            sources, [["result"]], rng.choice([[SWAP], [CHUNK], [Operation("SplitModulelist", (("dim", 1),))]]), ["x.*"]
        ),
    )
    start = addressed(first.sources)
    try:
        composed = first.then(second)
    except UnsupportedError as error:
        if not isinstance(error.__context__, NotAffine):
            raise
        return
    assert execute(composed, start) == execute(second, execute(first, start))


def test_then_does_not_skip_a_tensor_that_is_rearranged_under_its_own_name():
    sources = table(a=(4,))
    first = plan_of(sources, targets_of(sources, [["a"]], [], ["a"]))
    halves = [Piece(0, Box((2,), (1,), (1,)), 2, 0), Piece(0, Box((2,), (1,), (1,)), 0, 2)]
    swap = plan_of(sources, [Target("a", "BF16", (4,), -1, (0,), group_pieces(halves))])
    start = addressed(sources)
    assert execute(first.then(swap), start) == execute(swap, start)


def upstream(names=("b",)):
    return Fallback("it is not stock", lambda tensors: dict.fromkeys(names, tensors[0] * 2))


def fallback_plan(source="a", name="b"):
    return CopyPlan(table(**{source: (4,)}), (Target(name, "BF16", (4,), -1, (0,), (), upstream()),))


def test_then_does_not_skip_transformers_code_on_a_tensor_of_the_same_name():
    sources = table(a=(4,))
    first = plan_of(sources, targets_of(sources, [["a"]], [], ["a"]))
    try:
        composed = first.then(fallback_plan("a", "a"))
    except UnsupportedError:
        return
    assert composed.fallbacks == ("a",)


def test_then_passes_transformers_code_through():
    following = plan_of(table(b=(4,)), targets_of(table(b=(4,)), [["b"]], [], ["b"]))
    assert fallback_plan().then(following).fallbacks == ("b",)
    renamed = plan_of(table(b=(4,)), targets_of(table(b=(4,)), [["b"]], [], ["c"]))
    with pytest.raises(UnsupportedError, match="b is filled by transformers"):
        fallback_plan().then(renamed)


def test_then_needs_sources_from_the_first_plan():
    following = plan_of(table(other=(4,)), targets_of(table(other=(4,)), [["other"]], [], ["c"]))
    with pytest.raises(CoverageError, match="c needs other"):
        experts_plan().then(following)
    wrong = plan_of(table(norm=(2, 2)), targets_of(table(norm=(2, 2)), [["norm"]], [], ["c"]))
    with pytest.raises(CoverageError, match=r"expected: BF16 \[2, 2\]\n.*found:    BF16 \[4\]"):
        experts_plan().then(wrong)
    sources = SourceTable(["norm"], ["F32"], [(4,)])
    other = plan_of(sources, targets_of(sources, [["norm"]], [], ["c"], "F32"))
    with pytest.raises(CoverageError, match=r"expected: F32 \[4\]\n.*found:    BF16 \[4\]"):
        experts_plan().then(other)


def test_cast_between_plans_is_kept():
    sources = SourceTable(["a"], ["F32"], [(4,)])
    down = plan_of(sources, targets_of(sources, [["a"]], [], ["b"], "BF16"))
    up = plan_of(table_of(down), targets_of(table_of(down), [["b"]], [], ["c"], "F32"))
    with pytest.raises(UnsupportedError, match="cast twice"):
        down.then(up)
    keep = plan_of(table_of(down), targets_of(table_of(down), [["b"]], [], ["c"], "BF16"))
    assert down.then(keep).targets[0].dtype == "BF16"


def test_plan_that_drops_part_of_a_source_has_no_inverse():
    sources = table(qkv=(6, 2))
    split = plan_of(sources, targets_of(sources, [["qkv"]], [CHUNK], ["q", "k", "v"]))
    assert [t.name for t in split.inverse().targets] == ["qkv"]
    with pytest.raises(CoverageError, match=r"qkv would be left partly unwritten"):
        plan_of(sources, split.targets[:2]).inverse()


def test_source_that_is_read_twice_has_no_inverse():
    sources = table(a=(4,))
    plan = plan_of(sources, [*targets_of(sources, [["a"]], [], ["x"]), *targets_of(sources, [["a"]], [], ["y"])])
    with pytest.raises(CoverageError, match="a would be written twice"):
        plan.inverse()


def test_inverse_casts_back():
    back = experts_plan("F32").inverse()
    assert {t.dtype for t in back.targets} == {"BF16"}
    assert set(back.sources.dtypes) == {"F32", "BF16"}


def test_transformers_code_has_neither_inverse_nor_json():
    plan = fallback_plan()
    plan.validate()
    assert plan.fallbacks == ("b",)
    with pytest.raises(UnsupportedError, match="cannot be inverted"):
        plan.inverse()
    with pytest.raises(UnsupportedError, match="JSON"):
        plan.to_json()
    assert "8 bytes  upstream" in plan.summary().splitlines()[1]
    assert "because it is not stock" in plan.explain("b")


def test_shards_chains_and_inverses_keep_the_properties_of_model_and_files():
    plan = replace(experts_plan(), tied=(("a", "b"),), layout="nemo", source_layout="per_expert")
    regions = {target.name: whole_of(target.shape) for target in plan.targets}
    derived = plan.shard(regions), plan.inverse(), plan.inverse().then(plan)
    known = [(one.tied, one.layout, one.source_layout) for one in derived]
    assert known == [
        ((("a", "b"),), "nemo", "per_expert"),
        ((), "per_expert", "nemo"),
        ((("a", "b"),), "nemo", "nemo"),
    ]


def test_round_trip_is_one_copy_of_the_whole():
    """qkv to q, k, v and back: the parts join, and each source appears once."""
    thirds = [
        Target(name, "F32", (2, 5), -1, (0,), group_pieces([Piece(0, Box((10,), (1,), (1,)), 10 * i, 0)]))
        for i, name in enumerate("qkv")
    ]
    there = CopyPlan(SourceTable(["qkv"], ["F32"], [(6, 5)]), tuple(thirds))
    (back,) = there.then(there.inverse()).targets
    assert back.sources == (0,)
    assert back.is_whole


def test_part_of_a_merged_tensor_reads_only_its_own_source():
    merged = Target(
        "all", "F32", (3, 4), -1, (0, 1, 2), group_pieces(Piece(i, Box((4,), (1,), (1,)), 0, 4 * i) for i in range(3))
    )
    there = CopyPlan(SourceTable(["a", "b", "c"], ["F32"] * 3, [(4,)] * 3), (merged,))
    back = there.then(there.inverse())
    assert [(target.name, target.sources) for target in back.targets] == [("a", (0,)), ("b", (1,)), ("c", (2,))]


def test_rows_of_zeros_are_those_of_both_plans():
    padded = padded_plan(2, 5)
    start = addressed(padded.sources)
    whole = table_of(padded)
    renamed = plan_of(whole, targets_of(whole, [["padded"]], [], ["renamed"]))
    assert execute(padded.then(renamed), start) == {"renamed": execute(padded, start)["padded"]}
    inner = plan_of(table(rows=(3, 4)), targets_of(table(rows=(3, 4)), [["rows"]], [HEAD], ["head"]))
    start = addressed(inner.sources)
    assert execute(inner.then(padded), start) == execute(padded, execute(inner, start))
    assert inner.then(padded).target("padded").fills == zero_rows(inner.then(padded).target("padded").shape, 3)


@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [((0, 0), (5, 4)), ((0, 1), (5, 2)), ((1, 0), (3, 4)), ((3, 0), (2, 4)), ((0, 0), (2, 4)), ((2, 1), (0, 3))],
)
def test_parts_of_a_target_with_rows_of_zeros(offsets, lengths):
    plan = padded_plan(2, 5)
    part = plan.shard({"padded": box((5, 4), offsets, lengths)})
    start = addressed(plan.sources)
    (top, left), (rows, columns) = offsets, lengths
    elements = execute(plan, start)["padded"]
    expected = [elements[4 * r + c] for r in range(top, top + rows) for c in range(left, left + columns)]
    assert execute(part, start) == {"padded": expected}


def test_inverse_does_not_read_rows_of_zeros():
    plan = padded_plan(2, 5)
    start = addressed(plan.sources)
    assert execute(plan.inverse(), execute(plan, start)) == start


def test_constants_keep_their_sign():
    copies = group_pieces([Piece(0, run_of(2), 0, 0)])
    turned = group_pieces([Piece(0, run_of(2), 2, 0), Piece(0, run_of(2), 0, 2)])
    values = {"a": 0.0, "b": -0.0}
    targets = [
        Target(name, "F32", (4,), -1, (0,), copies, fills=(Fill(value, (2,), (1,), 2),))
        for name, value in values.items()
    ]
    first = CopyPlan(SourceTable(("s",), ("F32",), ((2,),)), tuple(targets))
    names = tuple(values)
    second = CopyPlan(
        SourceTable(names, ("F32",) * 2, ((4,),) * 2),
        tuple(Target(name, "F32", (4,), -1, (row,), turned) for row, name in enumerate(names)),
    )
    assert [str(fill.value) for target in first.then(second).targets for fill in target.fills] == ["0.0", "-0.0"]
