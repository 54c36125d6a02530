"""Tests of new modules as parts of old ones."""

import itertools

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.lora.matching import Match
from automodel_conv.lora.parts import Component, Part, Steps, new_module
from automodel_conv.planning.deltas import Delta, blocks_of

OUT, IN = 4, 6


def match(module, shape=(1, OUT, IN), rank=2, scale=1.0):
    return Match(Delta(module, 0, shape, 0, 1, rank, scale), f"{module}.weight")


def module_of(shape, placed, **options):
    """Return the new module of a tensor, given old modules and the strides and offset of each."""
    matches = [match for match, *_ in placed]
    deltas = [match.delta for match in matches]
    pieces = [deltas[i].onto(*strides)._replace(source=i) for i, (_, *strides) in enumerate(placed)]
    ranks = options.pop("ranks_of", lambda block: slice(0, deltas[block.delta].rank))
    return new_module("w", shape, blocks_of(pieces, deltas), matches, ranks, **options)


def test_steps_are_a_slice():
    assert list(range(100)[Steps(3, 4, 5).slice]) == [3, 7, 11, 15, 19]
    assert list(range(100)[Steps(3, 4, 1).slice]) == [3]


def test_old_outputs_are_columns_if_the_part_is_transposed():
    steps = [Steps(start, 1, 2) for start in range(4)]
    assert Part(*steps, False).old_outputs == Part(*steps, True).old_inputs == steps[2]
    assert Part(*steps, False).old_inputs == Part(*steps, True).old_outputs == steps[3]


def test_matrix_of_its_own_is_one_component():
    module = module_of((OUT, IN), [(match("a", rank=3, scale=0.5), 0, IN, 1)])
    part = Part(Steps(0, 1, OUT), Steps(0, 1, IN), Steps(0, 1, OUT), Steps(0, 1, IN), False)
    assert module.components == ((Component(0, 0, (part,), slice(0, 3)),),)
    assert (module.shape, module.rank, module.scale, module.starts) == ((1, OUT, IN), 3, 0.5, (0,))
    assert (module.name, module.weight, module.stated, module.untrained()) == ("w", "w", "w", [])
    assert not module.is_parameter
    assert not module.is_embedding


def test_ranks_of_modules_in_one_matrix_add_up():
    """Rows 0 to 3 of each expert are the gate's, rows 4 to 7 the up's."""
    placed = [
        (match(f"{e}.{name}", rank=rank), e * 2 * OUT * IN + start * IN, IN, 1)
        for e in range(3)
        for name, rank, start in (("up", 3, OUT), ("gate", 2, 0))
        if (e, name) not in ((1, "up"), (2, "up"), (2, "gate"))
    ]
    module = module_of((3, 2 * OUT, IN), placed)
    assert (module.shape, module.rank, module.starts) == ((3, 2 * OUT, IN), 5, (0, 2))
    assert [place[0][0].start for place in module.slots] == [0, OUT]
    assert [len(components) for components in module.components] == [2, 1, 0]
    assert module.untrained() == [1, 2]


@pytest.mark.parametrize("inputs_last", [True, False])
@pytest.mark.parametrize("is_stored_turned", [True, False])
def test_part_says_which_elements_of_the_old_product_it_equals(inputs_last, is_stored_turned):
    """Compare with every element of a tensor whose upper half of the rows is an old product."""
    shape = (1, 2 * IN, OUT) if is_stored_turned else (1, 2 * OUT, IN)
    columns = shape[2]
    offset = shape[1] // 2 * columns
    strides = (1, columns) if is_stored_turned else (columns, 1)
    module = module_of(shape, [(match("a"), offset, *strides)], inputs_last=inputs_last)
    [[component]] = module.components
    [part] = component.parts
    assert module.shape == ((1, *shape[1:]) if inputs_last else (1, shape[2], shape[1]))
    for i, j in itertools.product(range(OUT), range(IN)):
        row, column = divmod(offset + i * strides[0] + j * strides[1], columns)
        output, input_ = (row, column) if inputs_last else (column, row)
        output_at = list(range(100)[part.outputs.slice]).index(output)
        input_at = list(range(100)[part.inputs.slice]).index(input_)
        old = (i, j)[:: -1 if part.is_transposed else 1]
        assert range(100)[part.old_outputs.slice][output_at] == old[0]
        assert range(100)[part.old_inputs.slice][input_at] == old[1]


@pytest.mark.parametrize(("rows", "columns"), [(1, IN), (OUT, 1), (1, 1)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_sizes_of_one_are_no_other_case(rows, columns, is_transposed):
    shape = (columns, rows) if is_transposed else (rows, columns)
    strides = (1, rows) if is_transposed else (columns, 1)
    module = module_of(shape, [(match("a", (1, rows, columns)), 0, *strides)])
    [[component]] = module.components
    [part] = component.parts
    assert (part.outputs.count, part.inputs.count) == shape
    assert (part.old_outputs.count, part.old_inputs.count) == shape


def test_interleaved_rows_have_steps_of_two():
    placed = [(match("gate"), 0, 2 * IN, 1), (match("up"), IN, 2 * IN, 1)]
    module = module_of((2 * OUT, IN), placed)
    assert [place[0][0] for place in module.slots] == [Steps(0, 2, OUT), Steps(1, 2, OUT)]


@pytest.mark.parametrize("what", ["rank", "scale"])
def test_ranks_and_scales_that_differ_between_experts_are_named(what):
    size = OUT * IN
    placed = [(match(f"experts.{e}", **{what: 1 + (e == 1)}), e * size, IN, 1) for e in range(3)]
    with pytest.raises(
        UnsupportedError, match=rf"(?s)module of w.*{what}.*experts.[02]\n.*2(.0)? of experts.1\n.*merge"
    ):
        module_of((3, OUT, IN), placed)


def test_scales_that_differ_between_projections_are_named():
    placed = [(match("gate", scale=2.0), 0, IN, 1), (match("up", scale=0.5), OUT * IN, IN, 1)]
    with pytest.raises(UnsupportedError, match=r"(?s)2.0 of gate\n.*0.5 of up"):
        module_of((2 * OUT, IN), placed)


def test_ranks_may_differ_between_projections():
    placed = [(match("gate", rank=2), 0, IN, 1), (match("up", rank=5), OUT * IN, IN, 1)]
    assert module_of((2 * OUT, IN), placed).rank == 7


def test_only_some_ranks_of_an_old_module_may_be_used():
    module = module_of((OUT, IN), [(match("a", rank=6), 0, IN, 1)], ranks_of=lambda _: slice(2, 5))
    assert (module.rank, module.components[0][0].ranks) == (3, slice(2, 5))


def test_embedding_is_one_in_the_new_form():
    found = match("embed")._replace(is_embedding=True)
    assert module_of((OUT, IN), [(found, 0, IN, 1)]).is_embedding


def test_parts_that_are_no_rectangles_of_outputs_and_inputs_are_refused():
    """Two blocks of one old matrix on the diagonal are no product of some outputs and some inputs."""
    delta = match("a", (1, 2, 2)).delta
    blocks = [
        *blocks_of([delta.onto(0, 4, 1)], [delta]),
        *blocks_of([delta.onto(2 * 4 + 2, 4, 1)], [delta]),
    ]
    with pytest.raises(UnsupportedError, match=r"(?s)w cannot be written as a product.*merge"):
        new_module("w", (4, 4), blocks, [match("a", (1, 2, 2))], lambda _: slice(0, 2))
