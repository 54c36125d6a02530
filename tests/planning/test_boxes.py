"""Tests of the algebra of pieces against loops over single elements."""

import random
from collections import Counter
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.planning.boxes import (
    Box,
    NotAffine,
    Overlap,
    Piece,
    chain,
    contiguous_strides,
    find_overlap,
    outside,
)
from tests.planning.oracles import pairs, twice_written, written

SIZES = (1, 1, 2, 3, 4, 5, 6, 7, 8)
SEEDS = st.integers(0, 2**32)


def random_shape(rng, rank, most=60):
    shape = [rng.choice(SIZES) for _ in range(rank)]
    while prod(shape) > most:
        shape[rng.randrange(rank)] = 1
    return tuple(shape)


def shuffled(rng, source, shape, source_strides, source_offset, target_strides, target_offset):
    order = rng.sample(range(len(shape)), len(shape))
    pick = [tuple(columns[i] for i in order) for columns in (shape, source_strides, target_strides)]
    return Piece(source, Box(*pick), source_offset, target_offset)


def random_source_side(rng, shape):
    """Draw strides of a permuted, possibly padded tensor that holds a box of this shape."""
    order = rng.sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= shape[d] + rng.choice((0, 0, 1))
    return tuple(strides), rng.randrange(5)


def tiling(rng, shape, strides, offset, depth=3):
    """Draw pieces that together write a box once: concatenated, interleaved, or whole, each from its own source."""
    dim = rng.randrange(len(shape)) if shape else None
    if depth == 0 or dim is None or shape[dim] < 2 or rng.random() < 0.25:
        source_strides, source_offset = random_source_side(rng, shape)
        source = rng.randrange(10**9)
        return [shuffled(rng, source, shape, source_strides, source_offset, strides, offset)]
    size = shape[dim]
    if size % 2 == 0 and rng.random() < 0.4:
        half = (*shape[:dim], size // 2, *shape[dim + 1 :])
        wide = (*strides[:dim], strides[dim] * 2, *strides[dim + 1 :])
        return [
            piece for start in (0, 1) for piece in tiling(rng, half, wide, offset + start * strides[dim], depth - 1)
        ]
    at = rng.randrange(1, size)
    pieces = []
    for start, length in ((0, at), (at, size - at)):
        part = (*shape[:dim], length, *shape[dim + 1 :])
        pieces += tiling(rng, part, strides, offset + start * strides[dim], depth - 1)
    return pieces


def tiled(rng, numel_shape):
    return tiling(rng, numel_shape, contiguous_strides(numel_shape), 0)


def factored(rng, numel):
    shape = []
    while numel > 1:
        factor = rng.choice([f for f in range(2, numel + 1) if numel % f == 0])
        shape.append(factor)
        numel //= factor
    return tuple(shape)


def random_reads(rng, numel, shape):
    """Draw narrowed, stepped and permuted reads of a tensor, in its own shape or another one with the same elements."""
    reads, written_so_far = [], 0
    for _ in range(rng.randrange(1, 4)):
        seen = shape if rng.random() < 0.6 else factored(rng, numel)
        sizes, strides, offset = [], [], 0
        for size, stride in zip(seen, contiguous_strides(seen), strict=True):
            step = rng.choice([s for s in (1, 1, 2, 3) if s == 1 or size % s == 0])
            start = rng.randrange(size // step) if rng.random() < 0.5 else 0
            sizes.append(rng.randint(1, size // step - start) if rng.random() < 0.5 else size // step - start)
            strides.append(stride * step)
            offset += start * strides[-1] + rng.randrange(step) * stride
        order = rng.sample(range(len(sizes)), len(sizes))
        out = contiguous_strides([sizes[i] for i in order])
        target_strides = [0] * len(sizes)
        for place, i in enumerate(order):
            target_strides[i] = out[place]
        reads.append(shuffled(rng, 0, tuple(sizes), tuple(strides), offset, tuple(target_strides), written_so_far))
        written_so_far += prod(sizes)
    return reads


def through_the_middle(first, second):
    middle = written(first)
    return {target: middle[element] for piece in second for element, target in pairs(piece) if element in middle}


def random_case(seed):
    rng = random.Random(seed)
    shape = random_shape(rng, rng.randrange(0, 4))
    first = tiled(rng, shape)
    if rng.random() < 0.2:  # the middle is only partly written
        first = rng.sample(first, rng.randrange(len(first) + 1))
    return first, random_reads(rng, prod(shape), shape), prod(shape)


@given(SEEDS)
def test_canonical_keeps_the_pairs_and_is_idempotent(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(5)))
    strides = [tuple(rng.choice((1, 2, 3, 4, 6, 12)) for _ in shape) for _ in range(2)]
    piece = Piece(3, Box(shape, *strides), rng.randrange(9), rng.randrange(9))
    once = piece.canonical()
    assert Counter(pairs(once)) == Counter(pairs(piece))
    assert once.canonical() == once


@given(SEEDS)
def test_canonical_makes_equal_copies_equal(seed):
    rng = random.Random(seed)
    shape = random_shape(rng, 3)
    source_strides, offset = random_source_side(rng, shape)
    piece = Piece(0, Box(shape, source_strides, contiguous_strides(shape)), offset, 0)
    finer_shape, finer_source, finer_target = [], [], []
    for size, source, target in zip(*piece.box, strict=True):
        inner = rng.choice([f for f in range(1, size + 1) if size % f == 0])
        finer_shape += [size // inner, inner]
        finer_source += [source * inner, source]
        finer_target += [target * inner, target]
    finer = shuffled(rng, 0, finer_shape, finer_source, offset, finer_target, 0)
    assert finer.canonical() == piece.canonical()


@given(SEEDS)
def test_chain_equals_one_copy_after_the_other(seed):
    first, second, numel = random_case(seed)
    try:
        chained = chain(first, second, numel)
    except NotAffine:
        return
    assert written(chained) == through_the_middle(first, second)


def test_chain_rarely_gives_up():
    failed = 0
    for seed in range(200):
        try:
            chain(*random_case(seed))
        except NotAffine:
            failed += 1
    assert failed < 80


def test_chain_carries_over_odd_sizes():
    # [7, 3] tiled by rows 0-2 and 3-6, read as 21 elements from 5 on, and as columns.
    first = [Piece(0, Box((9,), (1,), (1,)), 0, 0), Piece(1, Box((12,), (1,), (1,)), 0, 9)]
    for second in (
        Piece(0, Box((13,), (1,), (1,)), 5, 0),
        Piece(0, Box((3, 7), (1, 3), (7, 1)), 0, 0),
        Piece(0, Box((3, 2), (3, 1), (2, 1)), 5, 0),
        Piece(0, Box((10,), (2,), (1,)), 1, 0),
    ):
        try:
            chained = chain(first, [second], 21)
        except NotAffine:
            assert second.source_strides == (2,)  # 21 is not a multiple of 2
            continue
        assert written(chained) == through_the_middle(first, [second])


def test_chain_of_nothing_is_empty():
    assert chain([], [], 0) == []
    assert chain([], [Piece(0, Box((4,), (1,), (1,)), 0, 0)], 4) == []
    scalar = Piece(5, Box((), (), ()), 3, 0)
    assert chain([scalar], [Piece(0, Box((), (), ()), 0, 2)], 1) == [Piece(5, Box((), (), ()), 3, 2)]
    assert chain([scalar], [Piece(0, Box((1, 1), (7, 9), (5, 5)), 0, 2)], 1) == [Piece(5, Box((), (), ()), 3, 2)]


@pytest.mark.parametrize(
    "read",
    [
        Piece(0, Box((3, 4), (0, 1), (4, 1)), 0, 0),  # broadcast
        Piece(0, Box((4,), (-1,), (1,)), 3, 0),  # flipped
        Piece(0, Box((3,), (2,), (1,)), 0, 0),  # leaves the tensor
        Piece(0, Box((2, 2), (1, 1), (2, 1)), 0, 0),  # walks the same stride twice
    ],
)
def test_chain_refuses_reads_that_are_no_boxes(read):
    first = [Piece(0, Box((2,), (1,), (1,)), 0, 0), Piece(1, Box((2,), (1,), (1,)), 0, 2)]
    with pytest.raises(NotAffine):
        chain(first, [read], 4)


@given(SEEDS)
def test_overlap_is_found_if_and_only_if_it_exists(seed):
    rng = random.Random(seed)
    shape = random_shape(rng, rng.randrange(0, 4))
    pieces = tiled(rng, shape)
    planted = rng.random() < 0.7
    if planted:
        cuts = tiled(rng, shape)
        pieces = [*pieces, rng.choice(cuts)._replace(source=-7)]
    elif rng.random() < 0.5:
        pieces = rng.sample(pieces, rng.randrange(len(pieces) + 1))
    rng.shuffle(pieces)
    try:
        overlap = find_overlap(pieces, prod(shape))
    except NotAffine:
        return
    twice = twice_written(pieces)
    assert (overlap is not None) == bool(twice) == planted
    if overlap is not None:
        assert set(overlap.sources) <= set(twice[overlap.element])
        assert len(set(overlap.sources)) == 2


def test_overlap_is_rarely_undecided():
    undecided = 0
    for seed in range(200):
        rng = random.Random(seed)
        shape = random_shape(rng, 3)
        pieces = tiled(rng, shape)
        try:
            assert find_overlap(pieces, prod(shape)) is None
        except NotAffine:
            undecided += 1
    assert undecided < 60


def test_overlap_of_small_things():
    assert find_overlap([], 0) is None
    assert find_overlap([], 5) is None
    scalar = Piece(4, Box((), (), ()), 0, 0)
    assert find_overlap([scalar], 1) is None
    assert find_overlap([scalar, Piece(5, Box((0,), (1,), (1,)), 0, 0)], 1) is None
    assert find_overlap([scalar, scalar._replace(source=6)], 1) == Overlap(0, (4, 6))


@pytest.mark.parametrize(
    ("strides", "offset"),
    [((0,), 0), ((-1,), 3), ((1,), 1), ((1,), -1), ((2,), 0)],
    ids=["repeated", "negative", "too far", "before the start", "too wide"],
)
def test_overlap_refuses_pieces_that_are_no_boxes_of_the_target(strides, offset):
    with pytest.raises(NotAffine):
        find_overlap([Piece(0, Box((4,), (1,), strides), 0, offset)], 4)


def random_hole(rng, numel, shape):
    """Draw a narrowed or stepped view of a tensor, as a piece that moves it onto itself."""
    read = rng.choice(random_reads(rng, numel, shape))
    box = read.box._replace(target_strides=read.box.source_strides)
    return Piece(0, box, read.source_offset, read.source_offset)


def test_outside_of_a_view_is_what_the_view_does_not_write():
    failed, cut = 0, 0
    for seed in range(300):
        rng = random.Random(seed)
        shape = random_shape(rng, rng.randrange(0, 4))
        pieces = tiled(rng, shape)
        if rng.random() < 0.5:
            pieces = rng.sample(pieces, rng.randrange(len(pieces) + 1))
        view = random_hole(rng, prod(shape), shape)
        try:
            left = outside(pieces, view, prod(shape))
        except NotAffine:
            failed += 1
            continue
        hole = {element for _, element in pairs(view)}
        expected = {at: source for at, source in written(pieces).items() if at not in hole}
        assert written(left) == expected, seed
        assert all(piece.canonical() == piece and piece.box.numel for piece in left), seed
        cut += 0 < len(expected) < len(written(pieces))
    assert failed < 100
    assert cut > 100


@pytest.mark.parametrize("box", [Box((4, 6), (6, 1), (6, 1)), Box((24,), (1,), (1,))], ids=["rows", "run"])
def test_outside_of_views_in_each_place(box):
    whole = Piece(5, box, 100, 0)
    for first, last, start, stop in (
        (0, 4, 0, 6),
        (0, 4, 2, 4),
        (1, 3, 0, 6),
        (1, 3, 2, 4),
        (0, 1, 0, 1),
        (3, 4, 5, 6),
    ):
        shape = last - first, stop - start
        hole = Piece(0, Box(shape, (6, 1), (6, 1)), first * 6 + start, first * 6 + start)
        left = outside([whole], hole, 24)
        assert written(left).keys() == set(range(24)) - {element for _, element in pairs(hole)}
        assert all(source == (5, at + 100) for at, source in written(left).items())
        assert len(left) <= sum((first > 0, last < 4, start > 0, stop < 6))


def test_outside_of_what_is_elsewhere_is_everything():
    pieces = [Piece(1, Box((4,), (1,), (1,)), 3, 0), Piece(2, Box((4,), (1,), (1,)), 0, 8)]
    between = Piece(0, Box((4,), (1,), (1,)), 4, 4)
    assert outside(pieces, between, 12) == pieces
    assert outside([], between, 12) == []
    assert outside(pieces[:1], Piece(0, Box((0,), (1,), (1,)), 0, 0), 12) == pieces[:1]


def test_chain_of_whole_tensors_starts_where_they_start():
    """A tensor that is one run, or that is read as one, needs no radix: strides may be any."""
    run = Piece(7, Box((12,), (1,), (1,)), 50, 0)
    odd = Piece(0, Box((2, 2, 2), (5, 2, 1), (4, 1, 2)), 1, 3)
    assert chain([run], [odd], 12) == [Piece(7, odd.box.canonical(), 51, 3)]
    assert chain(
        [run, run._replace(source=8, box=Box((0,), (1,), (1,)))], [odd._replace(box=Box((2,), (1,), (3,)))], 12
    ) == [Piece(7, Box((2,), (1,), (3,)), 51, 3)]
    parts = [Piece(1, Box((2, 2), (9, 4), (5, 2)), 1, 0), Piece(2, Box((3,), (1,), (3,)), 0, 1)]
    assert chain(parts, [Piece(0, Box((12,), (1,), (1,)), 0, 30)], 12) == [
        part._replace(target_offset=part.target_offset + 30) for part in parts
    ]
    for every_second in (Piece(1, Box((12,), (2,), (1,)), 1, 0), Piece(1, Box((12,), (0,), (1,)), 1, 0)):
        read = Piece(0, Box((3,), (1,), (1,)), 4, 0)
        assert written(chain([every_second], [read], 12)) == through_the_middle([every_second], [read])
    turned = Piece(1, Box((3, 4), (1, 3), (4, 1)), 0, 0)
    assert written(chain([turned], [Piece(0, Box((12,), (1,), (1,)), 0, 0)], 12)) == written([turned])
