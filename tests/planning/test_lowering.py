"""Tests of chains of operations on values, and of the copies that fill the result."""

import pytest

from automodel_conv.planning import values
from automodel_conv.planning.lowering import copies_of, lower, needs_target_shapes
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.values import LoweringError, leaf, leaves
from tests.planning import oracles
from tests.planning.oracles import flat

MERGE = Operation("MergeModulelist", (("dim", 0),))
JOIN = Operation("Concatenate", (("dim", 1),))
SWAP = Operation("Transpose", (("dim0", 1), ("dim1", 2)))


def test_chains_that_use_shapes_report_it():
    assert needs_target_shapes([Operation("Split", (("dim", 0),))])
    assert needs_target_shapes([Operation("Transpose", (("check_dims", True),))])
    assert not needs_target_shapes([Operation("Transpose", (("check_dims", True),))], transposed=False)
    assert not needs_target_shapes([Operation("Transpose", (("check_dims", False),))])
    assert not needs_target_shapes([])


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (1, 1), (0, 3)])
def test_operations_run_one_after_the_other(shape):
    inputs = {"gate": leaves(0, [shape] * 2), "up": leaves(2, [shape] * 2)}
    context = Context(("gate", "up"), ("gate_up",), ())
    value = lower([MERGE, JOIN, SWAP], inputs, context)["gate_up"]
    sources = [oracles.cells(shape, 100 * number) for number in range(4)]
    expected = oracles.transposed(
        oracles.joined([oracles.stacked(sources[:2], 0), oracles.stacked(sources[2:], 0)], 1), 1, 2
    )
    written = oracles.written(piece for copy in copies_of(value) for piece in copy.pieces())
    assert value.shape == expected.shape
    assert [flat(sources[s])[e] for _, (s, e) in sorted(written.items())] == flat(expected)


def test_operation_that_fails_is_named():
    inputs = {"gate": leaves(0, [(2, 3)] * 2), "up": leaves(2, [(2, 4)] * 2)}
    with pytest.raises(LoweringError, match=r"^Concatenate\(dim=1\): cannot join"):
        lower([MERGE, JOIN], inputs, Context(("gate", "up"), ("gate_up",), ()))


def test_chain_of_no_operations_returns_its_inputs():
    value = leaf(0, (2, 3))
    assert lower([], {"a": [value]}, Context(("a",), ("b",), ())) == {"a": value}


def test_ordinals_of_copies_are_the_numbers_of_their_sources():
    copies = copies_of(values.stack([leaf(5, (2, 3)), leaf(2, (2, 3))], 0))
    assert [copy.ordinals for copy in copies] == [(5, 2)]
    assert [copy.target_offsets for copy in copies] == [(0, 6)]


def test_source_that_is_stacked_twice_is_two_copies():
    """No walk has a step of 0, which would have no inverse."""
    copies = copies_of(values.stack([leaf(1, (2, 3)), leaf(1, (2, 3)), leaf(2, (2, 3))], 0))
    assert [copy.ordinals for copy in copies] == [(1, 1, 2)]
    assert all(copy.box.is_run for copy in copies)
