"""Tests of slabs as plain values: the bytes of each file, complete, once, from the right sources, by execution."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.dtypes import itemsize, torch_dtype
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.operations import Operation
from automodel_conv.schedule.writes import slab_schedule
from automodel_conv.testing import address_valued
from tests.execution.support import (
    CONCATENATE,
    LAYOUTS,
    MERGE,
    PAD,
    expert_names,
    experts,
    naive,
    plan_of,
    table,
    target,
)

SEEDS = st.integers(0, 2**32)
CASTS = {"BF16": ("BF16", "F32"), "F32": ("F32", "BF16", "F64"), "U8": ("U8",), "F64": ("F64", "F32")}


class Sources(NamedTuple):
    """Places of sources, with the attributes of ``slabs.Places``."""

    dtypes: list[str]
    file_ids: list[int]
    offsets: list[int]


def random_case(rng):
    """Return tensors, and a plan of experts, parts of tensors and plain tensors, in one direction or the other."""
    code = rng.choice(list(CASTS))
    dtype = torch_dtype(code)
    layout = rng.choice(list(LAYOUTS))
    columns = (2, 4, 6) if layout == "interleaved" else (1, 2, 3, 5, 7)
    shape = (rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 5, 7)), rng.choice(columns))
    tensors = experts(*shape, dtype)
    start = sum(tensor.numel() for tensor in tensors.values())
    tensors["norm"] = address_valued((rng.randint(1, 9),), dtype, start)
    tensors["scalar"] = address_valued((), dtype, start + 9)
    tensors["qkv"] = address_valued((rng.randint(1, 3) * 2, rng.randint(1, 4)), dtype, start + 10)
    tensors["rope"] = address_valued((8, rng.randint(1, 3)), dtype, start + 40)
    tensors["head"] = address_valued((rng.randint(1, 5), rng.randint(1, 3)), dtype, start + 70)
    sources = table(tensors)
    gate, up, down = (expert_names(shape[0], projection) for projection in ("gate", "up", "down"))
    operations = LAYOUTS[layout]
    chunk = Operation("Chunk", (("dim", 0),))
    rope = Operation("PermuteForRope", (("heads", 2), ("permute_layer_names", None), ("inverse", rng.random() < 0.5)))
    targets = [
        target(sources, "gate_up", code, [gate, up], [MERGE, CONCATENATE, *operations]),
        target(sources, "down", code, [down], [MERGE, *operations]),
        *(target(sources, name, code, [[name]]) for name in ("norm", "scalar")),
        target(sources, "rope", code, [["rope"]], [rope]),
        target(sources, "padded", code, [["head"]], [PAD]),
        *(target(sources, name, code, [["qkv"]], [chunk], ["q", "k"]) for name in "qk"),
    ]
    plan = plan_of(sources, *targets)
    if rng.random() < 0.5:
        tensors = naive(plan, tensors)
        plan = plan.inverse()
        tensors = {name: tensors[name] for name in plan.sources.names}
    wanted = CASTS[code]
    return tensors, plan_of(plan.sources, *(t._replace(dtype=rng.choice(wanted)) for t in plan.targets))


def laid_out(rng, sizes):
    """Return a file and an offset for each size, without overlap, with or without gaps, aligned to nothing."""
    ends, placed = [0, 0], [None] * len(sizes)
    for number in rng.sample(range(len(sizes)), len(sizes)) if rng.random() < 0.3 else range(len(sizes)):
        file = rng.choice((0, 0, 0, 1))
        ends[file] += rng.choice((0, 0, 0, 1, 2, 3, 8))
        placed[number] = (file, ends[file])
        ends[file] += sizes[number]
    return placed, ends


def raw(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def executed(slabs, plan, tensors, sources, blobs):
    """Execute the slabs: file -> byte -> value. Each byte is written once, and each slab writes all of its own."""
    written = {}
    for slab in slabs.slabs:
        assert not (slab.reads and slab.moves)
        own = {}
        if slab.is_zeros:
            put(own, 0, bytes(slab.nbytes))
        for file, offset, nbytes, memory, start in slab.reads:
            assert memory == 0
            sizes = map(plan.sources.nbytes, range(len(sources.offsets)))
            rows = zip(sources.file_ids, sources.offsets, sizes, strict=True)
            assert any(file == of and first <= offset <= offset + nbytes <= first + size for of, first, size in rows)
            put(own, start, blobs[file][offset : offset + nbytes])
        for row, moves in slab.moves.items():
            for move in moves:
                code = slabs.dtypes[move.target]
                elements = raw(tensors[plan.sources.names[row]].to(torch_dtype(code)))
                size = itemsize(code)
                assert move.dtype == plan.sources.dtypes[row]
                for index in itertools.product(*map(range, move.box.shape)):
                    read = move.source_offset + dot(index, move.box.source_strides)
                    write = move.target_offset + dot(index, move.box.target_strides)
                    put(own, write * size, elements[read * size : (read + 1) * size])
        assert sorted(own) == list(range(slab.nbytes))
        put(written, 0, own.values(), [(slab.file, slab.offset_bytes + at) for at in own])
    return written


def put(data, start, values, places=None):
    for place, value in zip(places or itertools.count(start), values, strict=places is not None):
        assert place not in data, f"{place} is written twice"
        data[place] = value


def dot(index, strides):
    return sum(i * s for i, s in zip(index, strides, strict=True))


def check(rng, most_bytes):
    tensors, plan = random_case(rng)
    sizes = [plan.sources.nbytes(row) for row in range(len(tensors))]
    placed, ends = laid_out(rng, sizes)
    sources = Sources(list(plan.sources.dtypes), [file for file, _ in placed], [offset for _, offset in placed])
    blobs = [bytearray(end) for end in ends]
    for (file, offset), size, tensor in zip(placed, sizes, tensors.values(), strict=True):
        blobs[file][offset : offset + size] = raw(tensor)
    places, _ = laid_out(rng, [t.nbytes for t in plan.targets])
    copies = [t.copies for t in plan.targets]
    slabs = slab_schedule(plan.targets, copies, sources, places, most_bytes=most_bytes)
    actual = executed(slabs, plan, tensors, sources, blobs)
    expected = {}
    for t, (file, offset) in zip(plan.targets, places, strict=True):
        data = raw(naive(plan_of(plan.sources, t), tensors)[t.name])
        put(expected, 0, data, [(file, offset + at) for at in range(len(data))])
    assert actual == expected
    assert all(slab.nbytes <= most_bytes for slab in slabs.slabs)
    assert [(s.file, s.offset_bytes) for s in slabs.slabs] == sorted((s.file, s.offset_bytes) for s in slabs.slabs)
    grouped = slabs.by_file()
    assert [slab for file in sorted(grouped) for slab in grouped[file]] == slabs.slabs
    return slabs


@given(SEEDS, st.integers(8, 200) | st.just(1 << 20))
def test_slabs_write_every_byte_of_every_target_once_and_nothing_else(seed, most_bytes):
    check(random.Random(seed), most_bytes)


def test_slabs_of_one_element_each_do_the_same():
    for seed in range(5):
        check(random.Random(seed), 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("code", ["BF16", "F32"])
@pytest.mark.parametrize("most_bytes", [64, 1000, 5000])
def test_slabs_are_well_filled(layout, code, most_bytes):
    """Cutting that keeps copies whole may leave some room, but must not cut large targets into many small slabs."""
    tensors = experts(4, 20, 30, torch.bfloat16)
    sources = table(tensors)
    gate, up = (expert_names(4, projection) for projection in ("gate", "up"))
    plan = plan_of(sources, target(sources, "gate_up", code, [gate, up], [MERGE, CONCATENATE, *LAYOUTS[layout]]))
    places = Sources(list(sources.dtypes), list(range(len(tensors))), [0] * len(tensors))
    slabs = slab_schedule(plan.targets, [plan.targets[0].copies], places, [(0, 3)], most_bytes=most_bytes)
    nbytes = plan.bytes_written
    assert sum(slab.nbytes for slab in slabs.slabs) == nbytes
    assert len(slabs.slabs) <= 3 * -(-nbytes // most_bytes)


def neighbours(count, code="BF16", wanted="BF16", gap=0):
    tensors = {f"t{n}": address_valued((4,), torch_dtype(code), 4 * n) for n in range(count)}
    sources = table(tensors)
    plan = plan_of(sources, *(target(sources, name, wanted, [[name]]) for name in tensors))
    size = plan.targets[0].nbytes
    source_places = Sources(list(sources.dtypes), [0] * count, [n * 8 for n in range(count)])
    places = [(0, n * (size + gap)) for n in range(count)]
    return slab_schedule(
        plan.targets, [t.copies for t in plan.targets], source_places, places, most_bytes=1 << 20
    ).slabs


@pytest.mark.parametrize("wanted", ["BF16", "F32"])
def test_small_neighbours_are_one_slab(wanted):
    [slab] = neighbours(100, wanted=wanted)
    assert bool(slab.reads) == (wanted == "BF16")
    assert slab.nbytes == 100 * 4 * itemsize(wanted)
    assert len(neighbours(100, wanted=wanted, gap=1)) == 100


def test_slab_has_no_more_parts_than_a_system_call_accepts():
    slabs = neighbours(2 * IOV_MAX + 5)
    assert [len(slab.reads) for slab in slabs] == [IOV_MAX, IOV_MAX, 5]


def test_moved_and_converted_bytes_are_never_in_one_slab():
    tensors = {"a": address_valued((4,), torch.bfloat16), "b": address_valued((4,), torch.float32)}
    sources = table(tensors)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in "ab"))
    source_places = Sources(list(sources.dtypes), [0, 0], [0, 8])
    slabs = slab_schedule(
        plan.targets, [t.copies for t in plan.targets], source_places, [(0, 0), (0, 16)], most_bytes=1000
    )
    assert [bool(slab.reads) for slab in slabs.slabs] == [False, True]


def test_elements_of_a_slab_are_at_multiples_of_their_size():
    """Bytes before wider elements in one slab would leave the latter misaligned."""
    tensors = {"a": address_valued((3,), torch.bfloat16), "b": address_valued((2,), torch.bfloat16)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "a", "F16", [["a"]]), target(sources, "b", "F32", [["b"]]))
    source_places = Sources(list(sources.dtypes), [0, 0], [0, 6])
    slabs = slab_schedule(
        plan.targets, [t.copies for t in plan.targets], source_places, [(0, 0), (0, 6)], most_bytes=1000
    )
    assert [slab.nbytes for slab in slabs.slabs] == [6, 8]


def test_large_targets_that_only_move_are_cut_at_any_byte():
    tensors = {"a": address_valued((1000,), torch.bfloat16)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "a", "BF16", [["a"]]))
    source_places = Sources(["BF16"], [7], [40])
    slabs = slab_schedule(plan.targets, [plan.targets[0].copies], source_places, [(3, 11)], most_bytes=300).slabs
    assert [slab.nbytes for slab in slabs] == [300] * 6 + [200]
    assert [read.offset_bytes for slab in slabs for read in slab.reads] == list(range(40, 2040, 300))
    assert {(slab.file, *(read.file for read in slab.reads)) for slab in slabs} == {(3, 7)}
