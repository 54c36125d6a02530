"""Tests of plans as JSON: an equal plan comes back, and edited JSON is proved again or refused."""

import json
from dataclasses import replace
from functools import reduce
from math import prod
from operator import getitem

import pytest

from automodel_conv.errors import ConversionError, CoverageError, UnsupportedError
from automodel_conv.planning.boxes import Box, Piece, run_of
from automodel_conv.planning.copies import Decode, SourceTable, StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import arranged_plan, quantized_table
from tests.planning.oracles import addressed, execute
from tests.planning.plans import experts_plan, padded_plan, plan_of, table, three_plans


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


# Arrangements with words of 4 columns, an axis twice, an axis too few, words of no columns, more columns than stored.
UNFIT = [
    ((4,), (0,), (1, 2), None),
    ((), (0, 0), (1,), None),
    ((2,), (0,), (1,), None),
    ((0,), (0,), (1, 2), None),
    ((), (0,), (1,), 7),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [("matrix", [8, 5]), ("block", [1, 2]), ("block", [0, 2]), ("scales", 0), ("zero_points", 1), ("global_scale", 1)]
    + [("arrangement", [list(word), list(rows), list(columns), width]) for word, rows, columns, width in UNFIT]
    + [("scale_word", [2]), ("scale_word", [-3]), ("zero_packing", [True, 2**31])],
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


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_plans_of_packed_words_come_back(method):
    shapes = [(8, 16), (2, 2), (2, 128 if method == "awq" else 16)]
    shapes[1] = (2, shapes[2][1] // 8)
    stored = SourceTable(["a.qweight", "a.qzeros", "a.scales"], ["I32", "I32", "F16"], shapes)
    sources = quantized_table(stored, {"quant_method": method, "bits": 4, "group_size": 4 if method == "awq" else 32})
    plan = arranged_plan(sources)
    again = CopyPlan.from_json(plan.to_json())
    assert again == plan
    assert again.sources.decodes == sources.decodes
    data = json.loads(plan.to_json())
    data["sources"][2][1] = [2, 1]
    with pytest.raises(UnsupportedError, match=r"the parts of a\.weight do not fit"):
        CopyPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(("matrices", "fits"), [(1, True), (3, True), (2, False), (9, False)])
def test_global_scale_is_one_or_one_for_each_matrix(matrices, fits):
    names, dtypes = ["w", "w_weight_scale", "w_weight_scale_2"], ["U8", "F8_E4M3", "F32"]
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    sources = quantized_table(SourceTable(names, dtypes, [(3, 3, 16), (3, 3, 2), (3,)]), config)
    target = Target("w", "BF16", (3, 3, 32), -1, (0,), group_pieces([Piece(0, Box((288,), (1,), (1,)), 0, 0)]))
    data = json.loads(CopyPlan(sources, (target,)).to_json())
    data["sources"][2][2] = [matrices]
    if fits:
        CopyPlan.from_json(json.dumps(data))
    else:
        with pytest.raises(UnsupportedError, match="the parts of w do not fit"):
            CopyPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3), (2, 0, 3)], ids=str)
def test_plans_of_empty_codes_come_back(shape):
    config = {"quant_method": "fbgemm_fp8"}
    sources = quantized_table(SourceTable(["a", "a_scale"], ["F8_E4M3", "F32"], [shape, (*shape[:-1], 1)]), config)
    plan = arranged_plan(sources)
    assert CopyPlan.from_json(plan.to_json()).sources.decodes == sources.decodes


def test_stack_has_no_zero_points():
    decode = Decode("int4", (8, 8), (1, 8), 1, zero_points=2)
    for shape, fits in (((8, 8), True), ((2, 8, 8), False)):
        numel = prod(shape)
        table = SourceTable(["w", "s", "z"], ["BF16", "BF16", "I32"], [shape, (*shape[:-1], 1), (1, 1)], {0: decode})
        target = Target("w", "BF16", shape, -1, (0,), group_pieces([Piece(0, run_of(numel), 0, 0)]))
        text = CopyPlan(table, (target,)).to_json()
        if fits:
            assert CopyPlan.from_json(text).sources.decodes == table.decodes
        else:
            with pytest.raises(UnsupportedError, match="the parts of w do not fit"):
                CopyPlan.from_json(text)


def test_copies_that_are_no_box_are_proved_piece_by_piece():
    """Check two walks of too many steps for boxes of their own, whose strides 3 and 2 do not divide each other."""
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
    before, after = execute(plan, values)["a"], execute(swapped, values)["b"]
    assert after == before[numel // 2 :] + before[: numel // 2]


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"version": 5}', "not json", ""])
def test_other_text_is_no_plan(text):
    with pytest.raises(UnsupportedError, match="not a plan"):
        CopyPlan.from_json(text)


def test_json_of_another_version_is_one_error_with_advice():
    text = experts_plan().to_json().replace('"version": 5', '"version": 3')
    with pytest.raises(UnsupportedError, match=r"version 5\n.*version 3\n.*compile the plan again"):
        CopyPlan.from_json(text)


def places_in(data, before=()):
    """Return the paths to all values in JSON data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from places_in(value, (*before, key))


def test_every_edit_of_json_raises_at_most_our_errors():
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
    ("path", "value", "message"),
    [
        (("copies", 0, 0, 0), [2, -6], "negative size"),
        (("sources", 2, 0), [-3, -4], "negative size"),
        (("copies", 0, 0, 1), [1, 1, 1], "differ in length"),
        (("copies", 0, 0, 4), [0], "differ in length"),
        (("targets", 0, 5), -1, "unknown copies"),
        (("targets", 0, 5), 99, "unknown copies"),
        (("targets", 0, 3), 99, "unknown rules"),
        (("sources", 0), [], "differ in length"),
        (("hidden",), [-1], "not sources"),
    ],
    ids=str,
)
def test_lengths_rows_and_sizes_in_json_are_checked(path, value, message):
    data = json.loads(experts_plan().to_json())
    reduce(getitem, path[:-1], data)[path[-1]] = value
    with pytest.raises(UnsupportedError, match=message):
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


def test_rows_of_zeros_come_back_and_are_proved_again():
    plan = padded_plan()
    assert CopyPlan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    data["targets"][0][-1][0][1] = [8]
    with pytest.raises(CoverageError, match="padded"):
        CopyPlan.from_json(json.dumps(data))


def with_other_dtype():
    """Return a plan that reads 8 bytes as 2 elements."""
    sources = SourceTable(["a"], ["U8"], [(8,)]).read_as({0: "F32"})
    copies = group_pieces([Piece(0, Box((2,), (1,), (1,)), 0, 0)])
    return plan_of(sources, [Target("t", "F32", (2,), -1, (0,), copies)])


def test_sources_that_are_read_as_another_dtype_come_back():
    plan = with_other_dtype()
    assert CopyPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((0, 0), -1, "more or fewer bytes"),
        ((0, 0), 1, "more or fewer bytes"),
        ((0, 1, 0), "F13", "F13"),
        ((0, 1, 0), "BF16", "more or fewer bytes"),
        ((0, 1, 1), [7], "more or fewer bytes"),
        ((0, 1, 1), [9], "more or fewer bytes"),
        ((0, 1, 1), [-2, -4], "negative size"),
    ],
    ids=str,
)
def test_what_sources_are_stored_as_in_json_is_checked(path, value, message):
    data = json.loads(with_other_dtype().to_json())
    reduce(getitem, path[:-1], data["stored"])[path[-1]] = value
    with pytest.raises(UnsupportedError, match=message):
        CopyPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [(0, "1", "no numbers"), (0, "Infinity", "no numbers"), (1, [-8], "negative size"), (2, [], "differ in length")],
)
def test_constants_in_json_are_checked(column, value, message):
    data = json.loads(padded_plan().to_json())
    data["targets"][0][-1][0][column] = value
    with pytest.raises(UnsupportedError, match=message):
        CopyPlan.from_json(json.dumps(data))
