"""Tests of targets in memory: views share the memory of their source, and all others are new tensors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from automodel_conv.errors import ConversionError
from automodel_conv.execution import views
from automodel_conv.execution.views import ViewOrCopy
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import Fallback, Fill, Target, group_pieces
from automodel_conv.testing import address_valued, assert_bytes_equal


def target(shape, pieces, *, dtype="BF16", **more):
    rows = tuple(range(5, 6 + max((piece.source for piece in pieces), default=0)))
    return Target("made", dtype, shape, -1, rows, group_pieces(pieces), **more)


def transposed(rows, columns):
    return Piece(0, Box((columns, rows), (1, columns), (rows, 1)).canonical(), 0, 0)


def shares(tensor, other):
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_expert_of_a_stack_is_a_contiguous_view():
    stack = address_valued((3, 2, 4), torch.bfloat16)
    made = ViewOrCopy()(target((2, 4), [Piece(0, Box((8,), (1,), (1,)), 8, 0)]), [stack])
    assert_bytes_equal(made, stack[1], strides=True)
    assert shares(made, stack)


def test_transpose_is_a_view_that_changes_with_its_source():
    matrix = address_valued((3, 5), torch.bfloat16)
    made = ViewOrCopy()(target((5, 3), [transposed(3, 5)]), [matrix])
    assert_bytes_equal(made, matrix.T, strides=True)
    matrix.add_(1)
    assert_bytes_equal(made, matrix.T)


@pytest.mark.parametrize("size", [1, 4])
def test_view_follows_the_strides_of_its_source(size):
    matrix = address_valued((8, 2 * size), torch.bfloat16)[1::2, ::2]
    made = ViewOrCopy()(target((size, 4), [transposed(4, size)]), [matrix])
    assert_bytes_equal(made, matrix.T)
    assert shares(made, matrix)


def test_source_whose_strides_copies_cannot_follow_is_copied():
    matrix = address_valued((5, 3), torch.bfloat16).T
    one = target((5, 3), [transposed(3, 5)])
    with mock.patch.object(views, "with_source_strides", lambda copies, sources: (copies, [sources[0].contiguous()])):
        made = ViewOrCopy()(one, [matrix])
    assert_bytes_equal(made, matrix.T)
    assert not shares(made, matrix)


def test_view_of_a_parameter_needs_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    made = ViewOrCopy()(target((2, 3), [Piece(0, Box((6,), (1,), (1,)), 0, 0)], dtype="F32"), [parameter])
    assert not made.requires_grad
    assert shares(made, parameter)


def test_concatenated_sources_are_copied():
    parts = [address_valued((2, 3), torch.bfloat16, start) for start in (0, 6)]
    both = target((4, 3), [Piece(n, Box((6,), (1,), (1,)), 0, 6 * n) for n in (0, 1)])
    made = ViewOrCopy()(both, parts)
    assert_bytes_equal(made, torch.cat(parts), strides=True)
    assert not any(shares(made, part) for part in parts)


def test_cast_target_is_copied():
    matrix = address_valued((2, 3), torch.bfloat16)
    made = ViewOrCopy()(target((2, 3), [Piece(0, Box((6,), (1,), (1,)), 0, 0)], dtype="F32"), [matrix])
    assert_bytes_equal(made, matrix.float())


def test_constants_are_written_to_a_copy():
    row = address_valued((3,), torch.bfloat16)
    padded = target((2, 3), [Piece(0, Box((3,), (1,), (1,)), 0, 0)], fills=(Fill(0, (3,), (1,), 3),))
    assert_bytes_equal(ViewOrCopy()(padded, [row]), torch.stack([row, torch.zeros(3, dtype=row.dtype)]))


def test_target_without_elements_has_its_shape():
    made = ViewOrCopy()(target((0, 3), []), [torch.empty(0, 3, dtype=torch.bfloat16)])
    assert_bytes_equal(made, torch.empty(0, 3, dtype=torch.bfloat16))


def test_code_of_transformers_gets_the_rows_of_its_sources():
    fallback = Fallback("it computes", lambda sources: {"made": sources[5] + sources[6]})
    sources = [torch.ones(2), torch.full((2,), 3.0)]
    made = Target("made", "F32", (2,), 0, (5, 6), (), fallback)
    assert ViewOrCopy()(made, sources).tolist() == [4, 4]


def test_failure_of_that_code_is_named():
    fallback = Fallback("it computes", lambda sources: {})
    with pytest.raises(ConversionError, match="did not return made"):
        ViewOrCopy()(Target("made", "F32", (2,), 0, (5,), (), fallback), [torch.ones(2)])


def test_targets_that_share_copies_are_planned_once():
    one = target((2, 4), [Piece(0, Box((8,), (1,), (1,)), 8, 0)])
    stacks = [address_valued((3, 2, 4), torch.bfloat16, start) for start in (0, 24)]
    view_or_copy = ViewOrCopy()
    with mock.patch.object(views, "view_of", side_effect=views.view_of) as planned:
        for _ in range(3):
            for stack in stacks:
                assert_bytes_equal(view_or_copy(one._replace(name="other"), [stack]), stack[1], strides=True)
    assert planned.call_count == 1
