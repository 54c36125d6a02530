"""Tests of plans that keep codes and scales while weights are grouped: each code keeps its scale."""

from contextlib import suppress
from dataclasses import replace
from math import prod

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning import kept_codes, values
from automodel_conv.planning.arrangement import PLAIN, TRANSPOSED
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.kept_codes import codes_without_scales, keep_codes, refuse_codes_without_scales
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.values import leaf
from tests.planning.oracles import addressed, execute

FP8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
TALL = {"quant_method": "fp8", "weight_block_size": [2, 1]}
STACK = lambda parts: values.stack(parts, 0)  # noqa: E731
ROWS = lambda parts: values.concatenate(parts, 0)  # noqa: E731
TURNED = lambda parts: values.transpose(values.stack(parts, 0), 1, 2)  # noqa: E731


def stored(rows, columns, codes="F8_E4M3", second="F8_E4M3", lead=(), block=(2, 2)):
    """Return two weights with their scales, and a tensor that is not quantized."""
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    names = ["e.0.weight", "e.0.weight_scale_inv", "e.1.weight", "e.1.weight_scale_inv", "norm"]
    shapes = [(*lead, rows, columns), grid, (*lead, rows, columns), grid, (3,)]
    kept = [n for n in range(5) if second.startswith("F8") or n != 3]
    dtypes = [codes, "F32", second, "F32", "BF16"]
    return SourceTable(*([column[n] for n in kept] for column in (names, dtypes, shapes)))


def grouped_by(join):
    """Return a function that plans a table: it joins the two weights and keeps all other tensors."""

    def plan_of(table):
        rows = {name: row for row, name in enumerate(table.names) if row not in table.hidden}
        both = rows.pop("e.0.weight"), rows.pop("e.1.weight")
        value = join([leaf(number, table.shapes[row]) for number, row in enumerate(both)])
        targets = [Target("e.weight", table.dtypes[both[0]], value.shape, 0, both, copies_of(value))]
        for name, row in rows.items():
            whole = leaf(0, table.shapes[row])
            targets.append(Target(name, table.dtypes[row], whole.shape, -1, (row,), copies_of(whole)))
        return CopyPlan(table, tuple(targets), ("a rule",))

    return plan_of


def kept(table, join, config=FP8):
    decoded = quantized_table(table, config)
    plan_of = grouped_by(join)
    return keep_codes(table, decoded, plan_of(decoded), plan_of, lambda joined: quantized_table(joined, config))


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (4, 4), (2, 2), (3, 5), (1, 1)])
def test_stacked_codes_have_stacked_scales(rows, columns):
    table = stored(rows, columns)
    plan = kept(table, STACK)
    assert [(t.name, t.dtype) for t in plan.targets] == [
        ("e.weight", "F8_E4M3"),
        ("e.weight_scale_inv", "F32"),
        ("norm", "BF16"),
    ]
    results = execute(plan, addressed(table))
    for suffix, numel in (("", rows * columns), ("_scale_inv", -(-rows // 2) * -(-columns // 2))):
        assert results[f"e.weight{suffix}"] == [(f"e.{e}.weight{suffix}", i) for e in range(2) for i in range(numel)]


@pytest.mark.parametrize("arrangement", [TRANSPOSED, PLAIN._replace(width=3)], ids=str)
def test_codes_that_are_arranged_cannot_be_kept(arrangement):
    table = stored(4, 4)
    decoded = quantized_table(table, FP8)
    decodes = {row: decode._replace(arrangement=arrangement) for row, decode in decoded.decodes.items()}
    plan_of = grouped_by(STACK)
    with pytest.raises(
        UnsupportedError, match=r"e\.weight: codes .* cannot be kept .*\n.* another order than its values: r w"
    ):
        keep_codes(table, replace(decoded, decodes=decodes), plan_of(decoded), plan_of, lambda joined: joined)


def each_keeps_its_scale(plan, rows, columns, block):
    """Return whether each code of a joined weight has the scale of its source, by a loop over all elements."""
    results, shapes = execute(plan, addressed(plan.sources)), {t.name: t.shape for t in plan.targets}
    *lead, new_rows, new_columns = shapes["e.weight"]
    grid = shapes["e.weight_scale_inv"]
    if grid != (*lead, -(-new_rows // block[0]), -(-new_columns // block[1])):
        return False
    return all(
        results["e.weight_scale_inv"][scale_of(number, new_rows, new_columns, block)]
        == (f"{name}_scale_inv", scale_of(element, rows, columns, block))
        for number, (name, element) in enumerate(results["e.weight"])
    )


def scale_of(element, rows, columns, block):
    """Return the number of the scale of an element in a stack of matrices."""
    row, column = divmod(element, columns)
    matrix, row = divmod(row, rows)
    grid = -(-rows // block[0]), -(-columns // block[1])
    return (matrix * grid[0] + row // block[0]) * grid[1] + column // block[1]


def halves_swapped(parts):
    stacked = STACK(parts)
    half = stacked.shape[1] // 2
    return values.concatenate(
        [values.narrow(stacked, 1, half, stacked.shape[1] - half), values.narrow(stacked, 1, 0, half)], 1
    )


def merged(parts):
    count, rows, columns = STACK(parts).shape
    return values.reshape(STACK(parts), (count * rows, columns))


JOINS = {
    "stacked": STACK,
    "transposed": TURNED,
    "rows": ROWS,
    "columns": lambda parts: values.concatenate(parts, 1),
    "columns, transposed": lambda parts: values.transpose(values.concatenate(parts, 1), 0, 1),
    "stacked rows": merged,
    "interleaved": lambda parts: values.permute(STACK(parts), (1, 0, 2)),
    "interleaved columns": lambda parts: values.permute(STACK(parts), (1, 2, 0)),
    "halves swapped": halves_swapped,
}
EXPERT_JOINS = {
    "stacked": ROWS,
    "transposed": lambda parts: values.transpose(ROWS(parts), 1, 2),
    "rows": lambda parts: values.concatenate(parts, 1),
    "columns": lambda parts: values.concatenate(parts, 2),
    "columns, transposed": lambda parts: values.transpose(values.concatenate(parts, 2), 1, 2),
    "merged": lambda parts: values.reshape(ROWS(parts), (2 * prod(parts[0].shape[:-1]), parts[0].shape[-1])),
    "experts last": lambda parts: values.permute(ROWS(parts), (1, 2, 0)),
}
CASES = [((), name, join) for name, join in JOINS.items()]
CASES += [((3,), name, join) for name, join in EXPERT_JOINS.items()]
SIZES = [(4, 6), (4, 4), (3, 5), (2, 2), (1, 2), (2, 1), (1, 1), (1, 5), (3, 1), (6, 2), (4, 1), (1, 4)]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("config", [FP8, TALL], ids=["square blocks", "tall blocks"])
@pytest.mark.parametrize(("lead", "name", "join"), CASES, ids=[f"{name}-{len(lead)}" for lead, name, _ in CASES])
def test_codes_are_kept_exactly_if_each_keeps_its_scale(monkeypatch, lead, name, join, config, rows, columns):
    block = config["weight_block_size"]
    table = stored(rows, columns, lead=lead, block=block)
    right = False
    with monkeypatch.context() as patch, suppress(UnsupportedError, ValueError):
        patch.setattr(kept_codes, "_check_blocks", lambda *_: None)
        right = each_keeps_its_scale(kept(table, join, config), rows, columns, block)
    too_strict = name in ("merged", "experts last") or (
        name == "halves swapped" and rows == 2
    )  # refused even if it would be right
    if right and not too_strict:
        assert each_keeps_its_scale(kept(table, join, config), rows, columns, block)
    else:
        with pytest.raises((UnsupportedError, ValueError)):
            kept(table, join, config)
    if name == "stacked" or (name == "transposed" and config is FP8):
        assert right


def test_runs_that_begin_and_end_within_rows_are_refused():
    def join(parts):
        if parts[0].shape != (4, 4):  # scales
            return STACK(parts)
        flat = values.reshape(STACK(parts), (2, 16))
        runs = [(2, 4), (12, 4), (0, 2), (10, 2), (6, 4)]  # all are moved by multiples of a block, two are of two rows
        return values.reshape(values.concatenate([values.narrow(flat, 1, *run) for run in runs], 1), (2, 4, 4))

    with pytest.raises(UnsupportedError, match="a scale would apply to other values"):
        kept(stored(4, 4), join)


def test_weight_of_which_only_a_part_is_quantized_is_refused():
    with pytest.raises(UnsupportedError, match=r"e\.weight(.|\n)*only some of its parts are quantized"):
        kept(stored(4, 4, second="BF16"), STACK)


def test_parts_of_different_formats_are_refused():
    with pytest.raises(UnsupportedError, match=r"e\.weight(.|\n)*different formats"):
        kept(stored(4, 4, second="F8_E5M2"), STACK)


def test_plan_without_codes_only_gets_the_stored_table():
    table = SourceTable(["a"], ["BF16"], [(2,)])
    whole = leaf(0, (2,))
    numbers = CopyPlan(table, (Target("a", "BF16", (2,), -1, (0,), copies_of(whole)),))

    def never(table):
        raise AssertionError("nothing is planned again")

    assert keep_codes(table, table, numbers, never, never) == numbers


def renamed(plan, **names):
    """Return the plan with other names for some targets, or without those whose name is None."""
    new_names = {name: names.get(name.replace(".", "__"), name) for name in (t.name for t in plan.targets)}
    return replace(plan, targets=tuple(t._replace(name=new) for t in plan.targets if (new := new_names[t.name])))


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        ({}, None),
        ({"e__0__weight": "x.weight", "e__0__weight_scale_inv": "x.weight_scale_inv"}, None),
        ({"e__0__weight": "x.weight", "e__0__weight_scale_inv": "x.weight_scale"}, None),
        ({"e__0__weight": None}, None),
        ({"e__0__weight": "x.weight"}, "x.weight"),
        ({"e__0__weight_scale_inv": "x.weight_scale_inv"}, "e.0.weight"),
        ({"e__1__weight_scale_inv": None}, "e.1.weight"),
        (  # each has the scales of the other
            {"e__0__weight_scale_inv": "e.1.weight_scale_inv", "e__1__weight_scale_inv": "e.0.weight_scale_inv"},
            "e.0.weight",
        ),
    ],
    ids=str,
)
def test_first_target_of_codes_that_lost_its_scales_is_named(names, lost):
    table = stored(4, 4)
    whole = [leaf(0, shape) for shape in table.shapes]
    columns = zip(table.names, table.dtypes, table.shapes, whole, strict=True)
    targets = [Target(n, d, s, -1, (row,), copies_of(v)) for row, (n, d, s, v) in enumerate(columns)]
    plan = renamed(CopyPlan(table, tuple(targets), ()), **names)
    assert codes_without_scales(plan) == lost
    if lost is None:
        refuse_codes_without_scales(plan)
    else:
        with pytest.raises(UnsupportedError, match=f"{lost}: codes and scales cannot be kept"):
            refuse_codes_without_scales(plan)


def test_codes_that_are_grouped_without_their_scales_have_lost_them():
    plan = grouped_by(STACK)(stored(4, 4))
    assert codes_without_scales(plan) == "e.weight"
    assert codes_without_scales(kept(stored(4, 4), STACK)) is None
    assert codes_without_scales(grouped_by(STACK)(stored(4, 4, codes="BF16", second="BF16"))) is None
