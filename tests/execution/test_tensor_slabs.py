"""Tests of files written by ranks that each hold a part: every file is complete, and no byte is written twice."""

from __future__ import annotations

import gc
import itertools
import os
import random
import tracemalloc
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError
from automodel_conv.execution import tensor_slabs as module
from automodel_conv.execution.tensor_slabs import LocalTensor, tensor_slabs
from automodel_conv.execution.writing import SlabGroup, write_slabs
from automodel_conv.files import system
from automodel_conv.planning import boxes, parts_of_sources
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.regions import box, whole
from automodel_conv.planning.sharding import placed
from automodel_conv.schedule.writes import filled_ranges
from automodel_conv.testing import POISON, address_valued
from tests.execution.simulated import SimulatedDevice
from tests.execution.support import LAYOUTS, MERGE, moe, naive, plan_of, table, target
from tests.planning.parts import coordinates, random_mesh, random_placements, torch_part
from tests.schedule.test_writes import laid_out, random_case, raw

SEEDS = st.integers(0, 2**32)
# Sizes of a slab, for elements of any width.
SIZES = st.integers(1, 50).map(lambda count: 8 * count) | st.just(1 << 16)


def oddly_strided(tensor, rng):
    """Return the same values in a tensor that is not contiguous."""
    if tensor.ndim < 2 or not tensor.numel():
        return tensor
    order = rng.sample(range(tensor.ndim), tensor.ndim)
    return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])


def held_by_rank(rng, tensors, mesh):
    """Return the holdings by row of each coordinate of a mesh, each part at its first holder, and the placements."""
    held = {coordinate: {} for coordinate in coordinates(mesh)}
    for row, tensor in enumerate(tensors):
        shape = tuple(tensor.shape)
        placements = random_placements(rng, shape, mesh)
        for coordinate in held:
            if any(at for at, p in zip(coordinate, placements, strict=True) if p.is_replicate()):
                continue
            part = torch_part(tensor, mesh, coordinate, placements)
            region = placed(shape, mesh, coordinate, placements)
            held[coordinate][row] = [LocalTensor(region, oddly_strided(part, rng) if rng.random() < 0.3 else part)]
    return held


def held_in_boxes(rng, tensors):
    """Return whole tensors on one rank, each cut into boxes along one dimension, in any order."""
    held = {}
    for row, tensor in enumerate(tensors):
        shape = tuple(tensor.shape)
        if not shape:
            held[row] = [LocalTensor(whole(shape), tensor)]
            continue
        dim = rng.randrange(len(shape))
        cuts = sorted(rng.choices(range(shape[dim] + 1), k=rng.randint(0, 3)))
        boxes = []
        for first, stop in itertools.pairwise([0, *cuts, shape[dim]]):
            offsets, lengths = [0] * len(shape), list(shape)
            offsets[dim], lengths[dim] = first, stop - first
            boxes.append(LocalTensor(box(shape, offsets, lengths), tensor.narrow(dim, first, stop - first)))
        rng.shuffle(boxes)
        held[row] = boxes
    return held


class Files:
    """Poisoned files, with a record of every byte that is written to them."""

    def __init__(self, directory, ends):
        self.paths = [os.path.join(directory, f"{number}") for number in range(len(ends))]
        for path, end in zip(self.paths, ends, strict=True):
            with open(path, "wb") as file:
                file.write(bytes([POISON]) * end)
        self.ends = ends
        self.written = [[0] * end for end in ends]

    def write(self, groups, threads):
        real = system.pwritev
        for number, path in enumerate(self.paths):

            def counted(fd, views, offset, number=number):
                count = real(fd, views, offset)
                for at in range(offset, offset + count):
                    self.written[number][at] += 1
                return count

            system.pwritev = counted
            try:
                slabs = [SlabGroup(group.by_file.get(number, []), group.start) for group in groups]
                write_slabs(slabs, path, threads, lambda nbytes: None)
            finally:
                system.pwritev = real

    def bytes(self):
        return [open(path, "rb").read() for path in self.paths]


def expected_bytes(plan, tensors, places, ends):
    data = [bytearray([POISON]) * end for end in ends]
    wanted = [[0] * end for end in ends]
    results = naive(plan, tensors)
    for t, (file, offset) in zip(plan.targets, places, strict=True):
        data[file][offset : offset + t.nbytes] = raw(results[t.name])
        wanted[file][offset : offset + t.nbytes] = [1] * t.nbytes
    return [bytes(file) for file in data], wanted


def aligned_places(rng, plan):
    """Return places in two files at multiples of element sizes, with gaps."""
    sizes = [-(-t.nbytes // 8) * 8 for t in plan.targets]
    places, ends = laid_out(rng, sizes)
    scaled = [(file, offset * 8) for file, offset in places]
    # laid_out packs sizes bytewise; with eight times the distance everything is aligned.
    return scaled, [end * 8 for end in ends]


def check(rng, directory, ranks, tensors, plan, most_bytes):
    """Write each rank into the same files, then check the files and how often each byte was written."""
    places, ends = aligned_places(rng, plan)
    files = Files(directory, ends)
    for held in ranks:
        groups = tensor_slabs(plan, held, places, most_bytes=most_bytes)
        for group in groups:
            assert all(slab.nbytes <= most_bytes for slabs in group.by_file.values() for slab in slabs)
        files.write(groups, rng.choice((1, 2)))
    data, wanted = expected_bytes(plan, tensors, places, ends)
    assert files.written == wanted
    assert files.bytes() == data


@settings(max_examples=100)
@given(SEEDS, SIZES)
def test_ranks_together_write_every_byte_of_the_file_once(tmp_path_factory, seed, most_bytes):
    rng = random.Random(seed)
    tensors, plan = random_case(rng)
    held = held_by_rank(rng, tensors.values(), random_mesh(rng, 3))
    ranks = list(held.values())
    rng.shuffle(ranks)
    check(rng, tmp_path_factory.mktemp("files"), ranks, tensors, plan, most_bytes)


@settings(max_examples=60)
@given(SEEDS, SIZES)
def test_tensor_held_in_boxes_is_written_like_one(tmp_path_factory, seed, most_bytes):
    rng = random.Random(seed)
    tensors, plan = random_case(rng)
    held = held_in_boxes(rng, tensors.values())
    check(rng, tmp_path_factory.mktemp("files"), [held], tensors, plan, most_bytes)


@settings(max_examples=30)
@given(SEEDS)
def test_parts_on_a_device_are_written_the_same(tmp_path_factory, seed):
    rng = random.Random(seed)
    tensors, plan = random_case(rng)
    held = held_by_rank(rng, tensors.values(), random_mesh(rng, 2))
    real = module.transfer_device
    module.transfer_device = lambda device: SimulatedDevice(seed)
    try:
        check(rng, tmp_path_factory.mktemp("files"), list(held.values()), tensors, plan, 256)
    finally:
        module.transfer_device = real


@settings(max_examples=60)
@given(SEEDS, SIZES)
def test_single_rank_keeps_the_bytes_of_other_ranks(tmp_path_factory, seed, most_bytes):
    """Check it also for files that others have written: the bytes in between are not read and written back."""
    rng = random.Random(seed)
    tensors, plan = random_case(rng)
    mesh = random_mesh(rng, 3)
    held = rng.choice(list(held_by_rank(rng, tensors.values(), mesh).values()))
    places, ends = aligned_places(rng, plan)
    files = Files(tmp_path_factory.mktemp("files"), ends)
    files.write(tensor_slabs(plan, held, places, most_bytes=most_bytes), 1)
    data, _ = expected_bytes(plan, tensors, places, ends)
    for actual, whole_file, counts in zip(files.bytes(), data, files.written, strict=True):
        assert set(counts) <= {0, 1}
        wanted = [byte if count else POISON for byte, count in zip(whole_file, counts, strict=True)]
        assert list(actual) == wanted
    # Elements of a source go to as many places as the plan has for them.
    reads = [[0] * prod(shape) for shape in plan.sources.shapes]
    widths = {}
    for t in plan.targets:
        zeros = sum(fill.numel for fill in t.fills) * itemsize(t.dtype)
        last = t.copied_numel - 1 if zeros else None
        for copy in t.copies:
            for piece in copy.pieces():
                row = t.sources[piece.source]
                for index in itertools.product(*map(range, piece.box.shape)):
                    at = piece.source_offset + sum(i * s for i, s in zip(index, piece.box.source_strides, strict=True))
                    reads[row][at] += 1
                    to = piece.target_offset + sum(i * s for i, s in zip(index, piece.box.target_strides, strict=True))
                    nbytes = itemsize(t.dtype) + (zeros if to == last else 0)
                    widths[row, at] = widths.get((row, at), 0) + nbytes
    owned = 0
    for row, local_tensors in held.items():
        numbers = torch.arange(prod(plan.sources.shapes[row])).reshape(plan.sources.shapes[row])
        for holding in local_tensors:
            for piece in holding.region.pieces():
                elements = numbers.reshape(-1).as_strided(
                    piece.box.shape, piece.box.source_strides, piece.source_offset
                )
                owned += sum(widths.get((row, at), 0) for at in elements.reshape(-1).tolist())
    assert sum(map(sum, files.written)) == owned


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((3,), [Shard(0)]),
        ((3,), [Shard(1)]),
        ((4,), [Shard(2)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(2)]),
        ((8,), [Shard(0)]),
    ],
    ids=str,
)
def test_grouped_experts_of_every_layout_are_split_by_their_ranks(tmp_path, layout, mesh, placements):
    """Split experts, whole and cut over ranks, into per-expert tensors, with some ranks empty."""
    tensors, _, plan = moe(tmp_path / "source", *LAYOUTS[layout], shape=(5, 7, 6))
    grouped, back = naive(plan, tensors), plan.inverse()
    ranks = []
    for coordinate in coordinates(mesh):
        held = {}
        for row, name in enumerate(back.sources.names):
            shape = tuple(grouped[name].shape)
            fitting = [p if p.is_replicate() or p.dim < len(shape) else Replicate() for p in placements]
            if not any(at for at, p in zip(coordinate, fitting, strict=True) if p.is_replicate()):
                part = torch_part(grouped[name], mesh, coordinate, fitting)
                held[row] = [LocalTensor(placed(shape, mesh, coordinate, fitting), part)]
        ranks.append(held)
    rng = random.Random(0)
    check(rng, tmp_path, ranks, {name: grouped[name] for name in back.sources.names}, back, 200)


def test_rank_of_whole_experts_writes_them_without_copies(tmp_path):
    """There is no copy in memory if a part of the source is a run of the target's bytes."""
    tensors, _, plan = moe(tmp_path, shape=(6, 8, 4))
    grouped, back = naive(plan, tensors), plan.inverse()
    row = back.sources.names.index("gate_up")
    region = placed((6, 16, 4), (3,), (1,), [Shard(0)])
    held = {row: [LocalTensor(region, grouped["gate_up"][2:4].contiguous())]}
    places = [(0, 64 * n) for n in range(len(back.targets))]
    [group] = tensor_slabs(back, held, places, most_bytes=1 << 20)
    assert all(slab.reads and not slab.moves for slab in group.by_file[0])
    assert group.nbytes == 2 * 16 * 4 * 2


def kept_bytes(make):
    """Return the bytes that the result of ``make`` keeps alive."""
    make()  # fill caches
    gc.collect()
    tracemalloc.start()
    try:
        result = make()
        gc.collect()
        return result, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_slabs_of_columns_store_nothing_per_row():
    kept = []
    for rows in (50, 5000):
        sources = table({"a": torch.zeros(rows, 8)})
        plan = plan_of(sources, target(sources, "a", "BF16", [["a"]]))
        region = placed((rows, 8), (4,), (1,), [Shard(1)])
        held = {0: [LocalTensor(region, torch.zeros(region.local_shape))]}
        [group], nbytes = kept_bytes(lambda p=plan, h=held: tensor_slabs(p, h, [(0, 0)], most_bytes=1 << 20))
        [slab] = group.by_file[0]
        assert filled_ranges(slab) == [(16 * row, 4) for row in range(rows)]
        kept.append(nbytes)
    assert kept[1] < kept[0] + 1000, kept


def layers(count, shape=(4, 6)):
    """Return ``count`` tensors of one shape, each transposed by the same copies object."""
    tensors = {f"t{n}": address_valued(shape, torch.bfloat16, n * prod(shape)) for n in range(count)}
    sources = table(tensors)
    transpose = Operation("Transpose", (("dim0", 0), ("dim1", 1), ("check_dims", False)))
    targets = [target(sources, f"{name} made", "BF16", [[name]], [transpose]) for name in tensors]
    return tensors, plan_of(sources, *(t._replace(copies=targets[0].copies) for t in targets))


def test_layers_held_in_the_same_way_are_chained_once(monkeypatch):
    tensors, plan = layers(20)
    region = placed((4, 6), (2,), (0,), [Shard(0)])
    held = {row: [LocalTensor(region, tensor[:2])] for row, tensor in enumerate(tensors.values())}
    chained = []
    chain = boxes.chain
    monkeypatch.setattr(parts_of_sources, "chain", lambda *arguments: chained.append(arguments) or chain(*arguments))
    tensor_slabs(plan, held, [(0, 48 * n) for n in range(20)], most_bytes=1000)
    assert len(chained) == 1


def test_layers_held_in_different_ways_are_each_written_right(tmp_path):
    tensors, plan = layers(3)
    placements = [Shard(0)], [Shard(1)], [Shard(0)]
    ranks = [{}, {}]
    for at, held in enumerate(ranks):
        for row, (tensor, how) in enumerate(zip(tensors.values(), placements, strict=True)):
            part = torch_part(tensor, (2,), (at,), how)
            held[row] = [LocalTensor(placed((4, 6), (2,), (at,), how), part)]
    check(random.Random(0), tmp_path, ranks, tensors, plan, 1000)


def test_tensors_held_elsewhere_are_not_written():
    tensors = {"a": address_valued((4, 2), torch.bfloat16), "b": address_valued((0, 2), torch.bfloat16)}
    sources = table(tensors)
    plan = plan_of(sources, *(target(sources, name, "BF16", [[name]]) for name in tensors))
    assert tensor_slabs(plan, {}, [(0, 0), (0, 16)], most_bytes=64) == []
    empty = placed((4, 2), (8,), (7,), [Shard(0)])
    assert empty.local_shape == (0, 2)
    groups = tensor_slabs(plan, {0: [LocalTensor(empty, tensors["a"][4:])]}, [(0, 0), (0, 16)], most_bytes=64)
    assert all(not group.by_file for group in groups)


def test_parts_of_one_target_on_several_devices_are_refused():
    tensors = {"a": address_valued((2, 2), torch.bfloat16), "b": address_valued((2, 2), torch.bfloat16, 4)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "ab", "BF16", [["a", "b"]], [MERGE]))
    held = {
        0: [LocalTensor(whole((2, 2)), tensors["a"])],
        1: [LocalTensor(whole((2, 2)), tensors["b"].to("meta"))],
    }
    with pytest.raises(ConversionError, match="the parts of ab are on several devices"):
        tensor_slabs(plan, held, [(0, 0)], most_bytes=64)
