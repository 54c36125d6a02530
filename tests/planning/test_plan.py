"""Plans: what they say, what they prove, and their algebra, executed one element at a time."""

import json
import random
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError, CoverageError, UnsupportedError
from automodel_conv.planning.boxes import Box, NotAffine, Piece
from automodel_conv.planning.copies import Decode, Fallback, SourceTable, StridedCopy, Target, group_pieces
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.regions import whole as whole_of
from automodel_conv.planning.values import leaf
from tests.planning import oracles
from tests.planning.oracles import addressed, execute

MERGE = Operation("MergeModulelist", (("dim", 0),))
JOIN = Operation("Concatenate", (("dim", 1),))
SWAP = Operation("Transpose", (("dim0", 1), ("dim1", 2)))
ALTERNATE = Operation("Interleave", (("dim", 1), ("inverse", True)))
CHUNK = Operation("Chunk", (("dim", 0),))
SEEDS = st.integers(0, 2**32)


def table(**shapes):
    names = [name.replace("__", ".") for name in shapes]
    return SourceTable(names, ["BF16"] * len(names), [tuple(shape) for shape in shapes.values()])


def table_of(plan):
    return SourceTable([t.name for t in plan.targets], [t.dtype for t in plan.targets], [t.shape for t in plan.targets])


def made(sources, groups, operations, outputs, dtype="BF16", rule=-1):
    """The targets that a chain of operations makes of groups of sources."""
    rows = [sources.names.index(name) for group in groups for name in group]
    leaves, ordinal = {}, 0
    for i, group in enumerate(groups):
        leaves[f"p{i}"] = [leaf(ordinal + k, sources.shapes[sources.names.index(name)]) for k, name in enumerate(group)]
        ordinal += len(group)
    values = lower(operations, leaves, Context(tuple(leaves), tuple(outputs), ()))
    if not operations:
        values = {outputs[0]: values["p0"]}
    return [Target(name, dtype, v.shape, rule, tuple(rows), copies_of(v)) for name, v in values.items()]


def plan_of(sources, targets, **more):
    plan = CopyPlan(sources, tuple(targets), **more)
    plan.validate()
    return plan


def experts_plan(dtype="BF16", count=2):
    names = {f"e__{i}__{w}": (3, 4) for i in range(count) for w in ("gate", "up")}
    sources = table(**names, norm=(4,))
    groups = [[f"e.{i}.{w}" for i in range(count)] for w in ("gate", "up")]
    merged = made(sources, groups, [MERGE, JOIN], ["gate_up"], dtype, rule=0)
    return plan_of(
        sources,
        [*merged, *made(sources, [["norm"]], [], ["norm"])],
        rules=("e.*.gate + e.*.up -> gate_up: merge, join",),
    )


def transposing_plan(sources=None):
    sources = sources or table_of(experts_plan())
    return plan_of(
        sources,
        [
            *made(sources, [["gate_up"]], [ALTERNATE, SWAP], ["w13"], rule=0),
            *made(sources, [["norm"]], [], ["norm"]),
        ],
        rules=("gate_up -> w13: alternate, swap",),
    )


# --- what it says ---------------------------------------------------------------------------------

SUMMARY = """\
 targets  sources        GB  execution      rule
       1        4     0.000  read           e.*.gate + e.*.up -> gate_up: merge, join
       1        1     0.000  read           (name only)
       2        5     0.000  reads 0.000 GB, 0 targets by upstream's own code"""

EXPLANATION = """\
gate_up  BF16 [2, 6, 4]  96 bytes  (read)
  rule: e.*.gate + e.*.up -> gate_up: merge, join
  e.0.gate BF16 [3, 4][0 + 12x1] -> [0 + 12x1]
  e.0.up BF16 [3, 4][0 + 12x1] -> [12 + 12x1]
  e.1.gate BF16 [3, 4][0 + 12x1] -> [24 + 12x1]
  e.1.up BF16 [3, 4][0 + 12x1] -> [36 + 12x1]"""

EXPLAINED_SWAP = """\
w13  BF16 [2, 4, 6]  96 bytes  (strided)
  rule: gate_up -> w13: alternate, swap
  gate_up BF16 [2, 6, 4][0 + 2x24 4x1 3x4 2x12] -> [0 + 2x24 4x6 3x2 2x1]"""


def test_summary_reads_as_it_should():
    assert experts_plan().summary() == SUMMARY


def test_explain_names_every_source_and_its_region():
    assert experts_plan().explain("gate_up") == EXPLANATION
    assert transposing_plan().explain("w13") == EXPLAINED_SWAP


def test_explain_of_an_unknown_target_suggests_names():
    plan = plan_of(table(a=(2,)), made(table(a=(2,)), [["a"]], [], ["layers.0.w"]))
    with pytest.raises(KeyError, match=r"layers\.0\.w"):
        plan.explain("layers.9.w")


def test_ways_of_execution_are_told_apart():
    assert experts_plan().execution_of(experts_plan().target("gate_up")) == "read"
    cast = experts_plan("F32")
    assert cast.execution_of(cast.target("gate_up")) == "cast"
    swap = transposing_plan()
    assert swap.execution_of(swap.target("w13")) == "strided"
    both = swap.target("w13")._replace(dtype="F32")
    assert swap.execution_of(both) == "strided, cast"


def test_bytes_are_counted_once_and_in_their_own_dtype():
    plan = experts_plan("F32")
    assert plan.bytes_read == 4 * 3 * 4 * 2 + 4 * 2
    assert plan.bytes_written == 2 * 6 * 4 * 4 + 4 * 2
    sources = table(qkv=(6, 2), unused=(100,))
    split = plan_of(sources, made(sources, [["qkv"]], [CHUNK], ["q", "k", "v"]))
    assert split.bytes_read == split.bytes_written == 24
    assert split.used_sources == {0}


def test_another_set_of_targets_leaves_the_first_plan_alone():
    plan = experts_plan()
    fewer = replace(plan, targets=plan.targets[1:])
    assert plan.target("gate_up").name == "gate_up"
    assert plan.target("norm").name == fewer.target("norm").name == "norm"
    with pytest.raises(KeyError):
        fewer.target("gate_up")


# --- what it proves -------------------------------------------------------------------------------


def random_plan(seed):
    """Experts of random sizes through a random chain; every plan of it is valid."""
    rng = random.Random(seed)
    count, rows, columns = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 5)
    sources = table(**{f"e__{i}__{w}": (rows, columns) for i in range(count) for w in ("gate", "up")})
    groups = [[f"e.{i}.{w}" for i in range(count)] for w in ("gate", "up")]
    chain = [MERGE, JOIN, *rng.choice([(), (SWAP,), (ALTERNATE,), (ALTERNATE, SWAP)])]
    return rng, plan_of(sources, made(sources, groups, chain, ["made"]))


@given(SEEDS)
def test_any_change_of_a_valid_set_of_pieces_is_caught(seed):
    rng, plan = random_plan(seed)
    target = plan.targets[0]
    pieces = [piece for copy in target.copies for piece in copy.pieces()]
    at = rng.randrange(len(pieces))
    piece = pieces[at]
    kind = rng.choice(("dropped", "doubled", "shifted", "narrowed", "widened", "moved in the source"))
    if kind == "dropped":
        pieces.pop(at)
    elif kind == "doubled":
        pieces.append(piece)
    elif kind == "shifted":
        pieces[at] = piece._replace(target_offset=piece.target_offset + rng.choice((-1, 1, 2)))
    elif kind == "moved in the source":
        pieces[at] = piece._replace(source_offset=piece.source_offset + rng.choice((-1, 1)))
    else:
        if not piece.box.shape:
            return
        dim = rng.randrange(len(piece.box.shape))
        shape = list(piece.box.shape)
        shape[dim] += -1 if kind == "narrowed" else 1
        pieces[at] = piece._replace(box=piece.box._replace(shape=tuple(shape)))
    spoiled = replace(plan, targets=(target._replace(copies=group_pieces(pieces)),))
    if kind == "moved in the source" and len(target.copies[0].box.shape) and _still_inside(spoiled):
        return
    with pytest.raises(CoverageError, match="made"):
        spoiled.validate()


def _still_inside(plan):
    target = plan.targets[0]
    for copy in target.copies:
        for piece in copy.pieces():
            shape = plan.sources.shapes[target.sources[piece.source]]
            reads = [source for source, _ in oracles.pairs(piece)]
            if min(reads) < 0 or max(reads) >= torch.Size(shape).numel():
                return False
    return True


def whole(copy_fields):
    box = {"shape": (4,), "source_strides": (1,), "target_strides": (1,)}
    columns = {"ordinals": (0,), "source_offsets": (0,), "target_offsets": (0,)}
    all_fields = box | columns | copy_fields
    return StridedCopy(Box(*(all_fields[name] for name in box)), *(all_fields[name] for name in columns))


@pytest.mark.parametrize(
    "fields",
    [
        {"ordinals": (1,)},
        {"ordinals": (-1,)},
        {"source_strides": (-1,)},
        {"source_strides": (-1,), "source_offsets": (3,)},
        {"source_strides": (2,)},
        {"shape": (2, 2), "source_strides": (3, -1), "target_strides": (2, 1)},
        {"source_offsets": (1,)},
        {"target_strides": (0,)},
        {"target_strides": (-1,), "target_offsets": (3,)},
        {"shape": (5,)},
        {"shape": (3,)},
        {"ordinals": (0, 0), "source_offsets": (0, 0), "target_offsets": (0, 0)},
        {"ordinals": (), "source_offsets": (), "target_offsets": ()},
    ],
    ids=str,
)
def test_impossible_copies_are_no_plan(fields):
    target = Target("t", "BF16", (4,), -1, (0,), (whole(fields),))
    with pytest.raises(CoverageError, match=r"\bt\b"):
        CopyPlan(table(a=(4,), b=(4,)), (target,)).validate()


def test_two_targets_of_one_name_are_no_plan():
    sources = table(a=(2,), b=(2,))
    targets = [*made(sources, [["a"]], [], ["x"]), *made(sources, [["b"]], [], ["x"])]
    with pytest.raises(CoverageError, match="x"):
        CopyPlan(sources, tuple(targets)).validate()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0)])
def test_small_tensors_pass_through_everything(shape):
    sources = table(a=shape)
    plan = plan_of(sources, made(sources, [["a"]], [], ["b"]))
    expected = {"b": addressed(sources)["a"]}
    assert execute(plan, addressed(sources)) == expected
    back = plan.inverse()
    assert [(t.name, t.shape) for t in back.targets] == [("a", shape)]
    assert execute(plan.then(back), addressed(sources)) == addressed(sources)
    assert CopyPlan.from_json(plan.to_json()) == plan


# --- algebra --------------------------------------------------------------------------------------


@given(SEEDS)
def test_the_inverse_after_the_plan_is_the_identity(seed):
    _, plan = random_plan(seed)
    start = addressed(plan.sources)
    assert execute(plan.inverse(), execute(plan, start)) == start
    assert execute(plan.then(plan.inverse()), start) == start


@given(SEEDS)
def test_the_inverse_of_the_inverse_copies_the_same(seed):
    _, plan = random_plan(seed)
    again = plan.inverse().inverse()
    start = addressed(plan.sources)
    assert execute(again, start) == execute(plan, start)


def three_plans():
    first = experts_plan()
    second = transposing_plan()
    sources = table_of(second)
    third = plan_of(
        sources,
        [*made(sources, [["w13"]], [CHUNK], ["e0", "e1"]), *made(sources, [["norm"]], [], ["n"])],
    )
    return first, second, third


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
        made(
            sources, [["made"]], rng.choice([[SWAP], [CHUNK], [Operation("SplitModulelist", (("dim", 1),))]]), ["x.*"]
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
    first = plan_of(sources, made(sources, [["a"]], [], ["a"]))
    halves = [Piece(0, Box((2,), (1,), (1,)), 2, 0), Piece(0, Box((2,), (1,), (1,)), 0, 2)]
    swap = plan_of(sources, [Target("a", "BF16", (4,), -1, (0,), group_pieces(halves))])
    start = addressed(sources)
    assert execute(first.then(swap), start) == execute(swap, start)


def upstream(names=("b",)):
    return Fallback("it is not stock", lambda tensors: dict.fromkeys(names, tensors[0] * 2))


def fallback_plan(source="a", name="b"):
    return CopyPlan(table(**{source: (4,)}), (Target(name, "BF16", (4,), -1, (0,), (), upstream()),))


def test_then_does_not_skip_upstreams_work_on_a_tensor_of_the_same_name():
    sources = table(a=(4,))
    first = plan_of(sources, made(sources, [["a"]], [], ["a"]))
    try:
        composed = first.then(fallback_plan("a", "a"))
    except UnsupportedError:
        return
    assert composed.fallbacks == ("a",)


def test_then_passes_upstreams_work_through():
    following = plan_of(table(b=(4,)), made(table(b=(4,)), [["b"]], [], ["b"]))
    assert fallback_plan().then(following).fallbacks == ("b",)
    renamed = plan_of(table(b=(4,)), made(table(b=(4,)), [["b"]], [], ["c"]))
    with pytest.raises(UnsupportedError, match="b is made by upstream"):
        fallback_plan().then(renamed)


def test_then_needs_what_the_first_plan_makes():
    following = plan_of(table(other=(4,)), made(table(other=(4,)), [["other"]], [], ["c"]))
    with pytest.raises(CoverageError, match="c needs other"):
        experts_plan().then(following)
    wrong = plan_of(table(norm=(2, 2)), made(table(norm=(2, 2)), [["norm"]], [], ["c"]))
    with pytest.raises(CoverageError, match=r"expected: BF16 \[2, 2\]\n.*found:    BF16 \[4\]"):
        experts_plan().then(wrong)
    sources = SourceTable(["norm"], ["F32"], [(4,)])
    other = plan_of(sources, made(sources, [["norm"]], [], ["c"], "F32"))
    with pytest.raises(CoverageError, match=r"expected: F32 \[4\]\n.*found:    BF16 \[4\]"):
        experts_plan().then(other)


def test_a_cast_on_the_way_is_not_lost():
    sources = SourceTable(["a"], ["F32"], [(4,)])
    down = plan_of(sources, made(sources, [["a"]], [], ["b"], "BF16"))
    up = plan_of(table_of(down), made(table_of(down), [["b"]], [], ["c"], "F32"))
    with pytest.raises(UnsupportedError, match="cast twice"):
        down.then(up)
    keep = plan_of(table_of(down), made(table_of(down), [["b"]], [], ["c"], "BF16"))
    assert down.then(keep).targets[0].dtype == "BF16"


def test_a_plan_that_drops_part_of_a_source_has_no_inverse():
    sources = table(qkv=(6, 2))
    split = plan_of(sources, made(sources, [["qkv"]], [CHUNK], ["q", "k", "v"]))
    assert [t.name for t in split.inverse().targets] == ["qkv"]
    with pytest.raises(CoverageError, match=r"qkv would be left partly unwritten"):
        plan_of(sources, split.targets[:2]).inverse()


def test_a_source_that_is_read_twice_has_no_inverse():
    sources = table(a=(4,))
    plan = plan_of(sources, [*made(sources, [["a"]], [], ["x"]), *made(sources, [["a"]], [], ["y"])])
    with pytest.raises(CoverageError, match="a would be written twice"):
        plan.inverse()


def test_the_inverse_casts_back():
    back = experts_plan("F32").inverse()
    assert {t.dtype for t in back.targets} == {"BF16"}
    assert set(back.sources.dtypes) == {"F32", "BF16"}


def test_upstreams_work_has_neither_inverse_nor_json():
    plan = fallback_plan()
    plan.validate()
    assert plan.fallbacks == ("b",)
    with pytest.raises(UnsupportedError, match="cannot be inverted"):
        plan.inverse()
    with pytest.raises(UnsupportedError, match="JSON"):
        plan.to_json()
    assert plan.summary().splitlines()[1].split()[3] == "upstream"
    assert "because it is not stock" in plan.explain("b")


def test_shards_chains_and_inverses_keep_what_a_plan_knows_of_model_and_files():
    plan = replace(experts_plan(), tied=(("a", "b"),), layout="nemo", source_layout="per_expert")
    regions = {target.name: whole_of(target.shape) for target in plan.targets}
    made = plan.shard(regions), plan.inverse(), plan.inverse().then(plan)
    known = [(each.tied, each.layout, each.source_layout) for each in made]
    assert known == [
        ((("a", "b"),), "nemo", "per_expert"),
        ((), "per_expert", "nemo"),
        ((("a", "b"),), "nemo", "nemo"),
    ]


# --- JSON -----------------------------------------------------------------------------------------


def test_json_gives_an_equal_plan_back():
    for plan in (*three_plans(), three_plans()[0].then(three_plans()[1]), experts_plan().inverse()):
        text = plan.to_json()
        again = CopyPlan.from_json(text)
        assert again == plan
        assert again.to_json() == text
        assert again.explain(plan.targets[0].name) == plan.explain(plan.targets[0].name)
    left_out = replace(experts_plan(), missing=("m",), unexpected=("u",), mismatched=(("x", (1,), (2, 3)),))
    assert CopyPlan.from_json(left_out.to_json()) == left_out


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_offsets", [0, 0, 24, 36]), ("source_offsets", [1, 0, 0, 0]), ("ordinals", [9, 2, 1, 3])],
)
def test_edited_json_is_proved_again(field, value):
    data = json.loads(experts_plan().to_json())
    fields = [*Box._fields, *StridedCopy._fields[1:]]
    data["copies"][0][0][fields.index(field)] = value
    with pytest.raises(CoverageError, match="gate_up"):
        CopyPlan.from_json(json.dumps(data))


def test_edited_sources_are_proved_again():
    data = json.loads(experts_plan().to_json())
    data["sources"][2][0] = [2, 4]
    with pytest.raises(CoverageError, match=r"gate_up would read outside e\.0\.gate"):
        CopyPlan.from_json(json.dumps(data))
    data = json.loads(experts_plan().to_json())
    data["targets"][0][4][0] = 99
    with pytest.raises(CoverageError, match="gate_up"):
        CopyPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [("matrix", [8, 5]), ("block", [1, 2]), ("block", [0, 2]), ("scales", 0), ("zero_points", 1), ("global_scale", 1)],
)
def test_edited_parts_of_quantized_sources_do_not_fit(field, value):
    stored = SourceTable(["w", "w_scale"], ["F8_E4M3", "F32"], [(8, 6), (2, 3)])
    sources = quantized_table(stored, {"quant_method": "fp8", "weight_block_size": [4, 2]})
    target = Target("w", "BF16", (8, 6), -1, (0,), group_pieces([Piece(0, Box((48,), (1,), (1,)), 0, 0)]))
    plan = CopyPlan(sources, (target,))
    assert CopyPlan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    data["decodes"][0][1][Decode._fields.index(field)] = value
    with pytest.raises(UnsupportedError, match="the parts of w do not fit"):
        CopyPlan.from_json(json.dumps(data))


def test_what_is_no_box_over_all_sources_is_looked_at_piece_by_piece():
    """Two walks of more steps than become boxes of their own, whose strides 3 and 2 do not divide each other."""
    one, many, numel = range(5000), range(10_000), 27_000
    copies = (
        StridedCopy(Box((), (), ()), tuple(one), (0,) * 5000, tuple(3 * i for i in one)),
        StridedCopy(Box((), (), ()), (5000,) * 10_000, tuple(many), tuple(3 * (i // 2) + 1 + i % 2 for i in many)),
        StridedCopy(Box((6000,), (1,), (2,)), (5001, 5001), (0, 6000), (15_000, 15_001)),
    )
    shapes = [*[(1,)] * 5000, (10_000,), (12_000,)]
    sources = SourceTable([f"s{i}" for i in range(5002)], ["BF16"] * 5002, shapes)
    plan = plan_of(sources, [Target("a", "BF16", (numel,), -1, tuple(range(5002)), copies)])
    halves = [Piece(0, Box((numel // 2,), (1,), (1,)), at, numel // 2 - at) for at in (0, numel // 2)]
    middle = SourceTable(["a"], ["BF16"], [(numel,)])
    swapped = plan.then(plan_of(middle, [Target("b", "BF16", (numel,), -1, (0,), group_pieces(halves))]))
    values = addressed(sources)
    made, then = execute(plan, values)["a"], execute(swapped, values)["b"]
    assert then == made[numel // 2 :] + made[: numel // 2]


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"version": 3}', "not json", ""])
def test_other_text_is_no_plan(text):
    with pytest.raises(UnsupportedError, match="not a plan"):
        CopyPlan.from_json(text)


def test_the_form_of_another_version_is_one_error_that_says_what_to_do():
    text = experts_plan().to_json().replace('"version": 3', '"version": 2')
    with pytest.raises(UnsupportedError, match=r"version 3\n.*version 2\n.*make the plan again"):
        CopyPlan.from_json(text)


def places_in(data, before=()):
    """The ways to all that lies in some JSON."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from places_in(value, (*before, key))


def test_no_edit_of_json_is_more_than_an_error_of_ours():
    plan = replace(experts_plan(), missing=("m",), mismatched=(("x", (1,), (2, 3)),), tied=(("a", "b"),), layout="nemo")
    text = plan.to_json()
    accepted = set()
    for path in list(places_in(json.loads(text))):
        for value in (None, True, -1, 1.5, 10**30, "x", [], {}, [["a"]]):
            data = json.loads(text)
            place = reduce(getitem, path[:-1], data)
            if type(place[path[-1]]) is type(value) or place[path[-1]] == value:
                continue
            place[path[-1]] = value
            try:
                CopyPlan.from_json(json.dumps(data))
                accepted.add((path[0], repr(value)))
            except ConversionError:
                pass
    assert accepted == {("layouts", "None"), ("layouts", "'x'")}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("copies", 0, 0, 0), [2, -6], "negative size"),
        (("sources", 2, 0), [-3, -4], "negative size"),
        (("copies", 0, 0, 1), [1, 1, 1], "differ in length"),
        (("copies", 0, 0, 4), [0], "differ in length"),
        (("targets", 0, 5), -1, "unknown copies"),
        (("targets", 0, 5), 99, "unknown copies"),
        (("targets", 0, 3), 99, "unknown rules"),
        (("sources", 0), [], "differ in length"),
        (("hidden",), [-1], "no sources"),
    ],
    ids=str,
)
def test_lengths_rows_and_sizes_in_json_are_looked_at(path, value, told):
    data = json.loads(experts_plan().to_json())
    reduce(getitem, path[:-1], data)[path[-1]] = value
    with pytest.raises(UnsupportedError, match=told):
        CopyPlan.from_json(json.dumps(data))


def test_unknown_dtypes_in_json_are_named():
    text = experts_plan().to_json().replace("BF16", "F13")
    with pytest.raises(UnsupportedError, match="F13"):
        CopyPlan.from_json(text)


def test_json_shares_equal_copies():
    sources = table(**{f"e__{i}": (4,) for i in range(50)})
    copies = group_pieces([Piece(0, Box((4,), (1,), (1,)), 0, 0)])
    targets = [Target(f"t.{i}", "BF16", (4,), -1, (i,), copies) for i in range(50)]
    data = json.loads(plan_of(sources, targets).to_json())
    assert len(data["copies"]) == 1


def test_there_and_back_is_one_copy_of_the_whole():
    """qkv to q, k, v and back again: the parts join up, and each source is named once."""
    thirds = [
        Target(name, "F32", (2, 5), -1, (0,), group_pieces([Piece(0, Box((10,), (1,), (1,)), 10 * i, 0)]))
        for i, name in enumerate("qkv")
    ]
    there = CopyPlan(SourceTable(["qkv"], ["F32"], [(6, 5)]), tuple(thirds))
    (back,) = there.then(there.inverse()).targets
    assert back.sources == (0,)
    assert back.is_whole


def test_a_part_of_a_merged_tensor_reads_only_its_own_source():
    merged = Target(
        "all", "F32", (3, 4), -1, (0, 1, 2), group_pieces(Piece(i, Box((4,), (1,), (1,)), 0, 4 * i) for i in range(3))
    )
    there = CopyPlan(SourceTable(["a", "b", "c"], ["F32"] * 3, [(4,)] * 3), (merged,))
    back = there.then(there.inverse())
    assert [(target.name, target.sources) for target in back.targets] == [("a", (0,)), ("b", (1,)), ("c", (2,))]
