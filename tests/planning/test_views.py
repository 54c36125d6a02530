"""Tests of targets that are views: every element of a view, and of a part, is the one that the copies would write."""

from __future__ import annotations

import itertools
import random
from math import prod

import pytest
import torch
from hypothesis import given
from torch.distributed.tensor import Shard

from automodel_conv.planning.boxes import Box, Piece, contiguous_strides
from automodel_conv.planning.copies import StridedCopy, group_pieces
from automodel_conv.planning.regions import whole
from automodel_conv.planning.sharding import placed
from automodel_conv.planning.views import held_part, view_of
from tests.planning import oracles
from tests.planning.parts import SEEDS, coordinates, numbered, random_mesh, random_placements


def random_target(rng):
    """Return a source, and a tensor that is made of it by views and at most one reshape, as strides and offset."""
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
    tensor = numbered(shape)
    for _ in range(rng.randint(0, 3)):
        dim = rng.randrange(tensor.ndim)
        length = rng.randint(1, tensor.shape[dim])
        kind = rng.randrange(4)
        if kind == 0:
            tensor = tensor.narrow(dim, rng.randint(0, tensor.shape[dim] - length), length)
        elif kind == 1:
            tensor = tensor.transpose(dim, rng.randrange(tensor.ndim))
        elif kind == 2:
            tensor = tensor[(slice(None),) * dim + (slice(rng.randrange(2), None, 2),)]
            if not tensor.numel():
                return random_target(rng)
        else:
            parts = [n for n in range(1, tensor.shape[dim] + 1) if tensor.shape[dim] % n == 0]
            tensor = tensor.unflatten(dim, (rng.choice(parts), -1))
    box = Box(tuple(tensor.shape), tensor.stride(), contiguous_strides(tensor.shape)).canonical()
    copies = group_pieces([Piece(0, box, tensor.storage_offset(), 0)])
    if rng.random() < 0.5 and tensor.ndim > 1:
        dim = rng.randrange(tensor.ndim - 1)
        tensor = tensor.flatten(dim, dim + 1)  # copies if it is no view
    return shape, tensor, copies


def is_affine(elements):
    """Whether each dimension of a tensor of element numbers has one stride."""
    first = elements.reshape(-1)[0]
    steps = [
        elements.select(dim, 1).reshape(-1)[0] - first if size > 1 else 0 for dim, size in enumerate(elements.shape)
    ]
    return all(
        elements[index] == first + sum(i * step for i, step in zip(index, steps, strict=True))
        for index in itertools.product(*map(range, elements.shape))
    )


@given(SEEDS)
def test_view_has_the_elements_that_copies_would_write(seed):
    shape, wanted, copies = random_target(random.Random(seed))
    view = view_of(wanted.shape, copies)
    assert (view is not None) == is_affine(wanted)
    if view is not None:
        actual = numbered(shape).reshape(-1).as_strided(*view)
        assert actual.shape == wanted.shape
        assert torch.equal(actual, wanted)
        assert actual.numel() == 0 or actual.is_contiguous() == wanted.is_contiguous() or 1 in wanted.shape


def test_rows_between_other_rows_are_a_view():
    gates = numbered((2, 6, 4))[1, ::2]
    piece = Piece(0, Box((3, 4), (8, 1), (4, 1)), 24, 0)
    assert torch.equal(numbered((2, 6, 4)).reshape(-1).as_strided(*view_of((3, 4), group_pieces([piece]))), gates)


def test_heads_with_interleaved_halves_are_copied():
    box = Box((2, 2, 2, 3), (12, 3, 6, 1), (12, 6, 3, 1)).canonical()  # heads, pairs, halves, columns
    assert view_of((8, 3), group_pieces([Piece(0, box, 0, 0)])) is None


@pytest.mark.parametrize(
    "copies",
    [
        (),
        (StridedCopy(Box((3,), (1,), (1,)), (0, 1), (0, 0), (0, 3)),),
        (StridedCopy(Box((4,), (1,), (1,)), (0,), (0,), (0,)), StridedCopy(Box((2,), (1,), (1,)), (0,), (9,), (4,))),
        (StridedCopy(Box((5,), (1,), (1,)), (0,), (0,), (0,)),),
    ],
    ids=["none", "two sources", "two pieces", "a part"],
)
def test_target_that_one_walk_does_not_fill_is_copied(copies):
    assert view_of((2, 3), copies) is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_single_element_is_a_view(shape):
    view = view_of(shape, group_pieces([Piece(0, Box((), (), ()), 7, 0)]))
    assert (view.shape, view.offset) == (shape, 7)
    assert torch.empty(9).as_strided(*view).is_contiguous()


@given(SEEDS)
def test_held_part_is_the_box_whose_elements_the_region_has(seed):
    rng = random.Random(seed)
    shape, target, copies = random_target(rng)
    mesh = random_mesh(rng, 3)
    placements = random_placements(rng, shape, mesh)
    for coordinate in coordinates(mesh):
        region = placed(shape, mesh, coordinate, placements)
        local = {whole: at for _, (whole, at) in pairs_of(region)}
        held = torch.tensor([element in local for element in target.reshape(-1).tolist()]).reshape(target.shape)
        part = held_part(target.shape, copies, region)
        if part is None:
            assert not is_box(held)
            continue
        assert is_box(held)
        box = tuple(slice(low, low + size) for low, size in zip(part.start, part.shape, strict=True))
        assert prod(part.shape) == int(held.sum())
        assert bool(held[box].all())
        wanted = [local[element] for element in target[box].reshape(-1).tolist()]
        pieces = oracles.written(piece for copy in part.copies for piece in copy.pieces())
        assert [element for _, (_, element) in sorted(pieces.items())] == wanted


def pairs_of(region):
    return [(0, pair) for piece in region.pieces() for pair in oracles.pairs(piece)]


def is_box(held):
    """Whether the true elements of a tensor are a box, or none."""
    if not held.any():
        return True
    extents = [held.nonzero()[:, dim].unique() for dim in range(held.ndim)]
    is_run = all(len(extent) == extent[-1] - extent[0] + 1 for extent in extents)
    return is_run and prod(map(len, extents)) == int(held.sum())


def test_part_of_a_whole_region_is_the_target():
    copies = group_pieces([Piece(0, Box((6,), (1,), (1,)), 0, 0)])
    assert held_part((2, 3), copies, whole((2, 3))) == ((0, 0), (2, 3), copies)


def test_part_without_elements_is_empty():
    copies = group_pieces([Piece(0, Box((3,), (1,), (1,)), 3, 0)])
    first = placed((2, 3), (2,), (0,), [Shard(0)])
    assert held_part((1, 3), copies, first) == ((0, 0), (0, 0), ())
