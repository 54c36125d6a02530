"""Tests of plans that keep codes and scales while weights are grouped: each code keeps its scale."""

import itertools

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning import values
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.kept_codes import keep_codes
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.values import leaf
from tests.planning.oracles import addressed, execute

FP8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
STACK = lambda parts: values.stack(parts, 0)  # noqa: E731
ROWS = lambda parts: values.concatenate(parts, 0)  # noqa: E731
TURNED = lambda parts: values.transpose(values.stack(parts, 0), 1, 2)  # noqa: E731


def stored(rows, columns, codes="F8_E4M3", second="F8_E4M3"):
    """Return two weights with their scales, and a tensor that is not quantized."""
    grid = (-(-rows // 2), -(-columns // 2))
    names = ["e.0.weight", "e.0.weight_scale_inv", "e.1.weight", "e.1.weight_scale_inv", "norm"]
    shapes = [(rows, columns), grid, (rows, columns), grid, (3,)]
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


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (4, 4), (3, 5), (2, 2)])
@pytest.mark.parametrize("join", [STACK, ROWS, TURNED], ids=["stacked", "rows", "transposed"])
def test_each_code_keeps_its_scale_or_is_refused(join, rows, columns):
    table = stored(rows, columns)
    if join is ROWS and rows % 2:  # a block would hold rows of both
        with pytest.raises(UnsupportedError, match=r"e\.weight: codes and scales cannot be kept"):
            kept(table, join)
        return
    plan = kept(table, join)
    results, shapes = execute(plan, addressed(table)), {t.name: t.shape for t in plan.targets}
    *lead, new_rows, new_columns = shapes["e.weight"]
    grid = shapes["e.weight_scale_inv"][-2:]
    for at in itertools.product(*map(range, (*lead, new_rows, new_columns))):
        matrix, row, column = (at[0] if lead else 0), at[-2], at[-1]
        name, element = results["e.weight"][(matrix * new_rows + row) * new_columns + column]
        scale = results["e.weight_scale_inv"][(matrix * grid[0] + row // 2) * grid[1] + column // 2]
        expected = element // columns // 2 * -(-columns // 2) + element % columns // 2
        assert scale == (f"{name}_scale_inv", expected)


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
