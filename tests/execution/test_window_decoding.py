"""Tests of windows of quantized sources against an oracle that decodes one element at a time in float64."""

from __future__ import annotations

import importlib.util
import itertools
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError
from automodel_conv.execution.stats import Work
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.execution.window_decoding import WindowDecoder
from automodel_conv.kernels.code_tables import CODE_VALUES, E8M0_VALUES
from automodel_conv.planning.boxes import Box, Piece, run_of
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.code_windows import code_windows
from automodel_conv.schedule.device import Window
from automodel_conv.schedule.jobs import Move, group_moves
from automodel_conv.testing import POISON
from tests.whole.test_memory_budget import torch_peak

SCALES = {"F32": np.float32, "BF16": None, "U8": None}


class File:
    """Tensors of one file, with the part of a checkpoint that schedules use."""

    def __init__(self):
        self.data = b""
        self.names, self.dtypes, self.shapes, self.offsets, self.nbytes = [], [], [], [], []
        self.files = ["a.safetensors"]

    @property
    def file_ids(self):
        return [0] * len(self.names)

    def add(self, name, dtype, array):
        self.data += b"\x7e" * (7 * len(self.names) % 13)  # a gap, so that nothing is aligned
        raw = array.tobytes()
        for column, value in (
            (self.names, name),
            (self.dtypes, dtype),
            (self.shapes, array.shape),
            (self.offsets, len(self.data)),
            (self.nbytes, len(raw)),
        ):
            column.append(value)
        self.data += raw
        return len(self.names) - 1


def add_source(file, random, name, *, code_format, matrices, rows, columns, block, scales, zero_points, has_global):
    """Add a quantized source. Return its row, its ``Decode`` and its values in float64, flat."""
    bits = 8 if code_format == "e4m3" else 4
    codes = random.integers(0, 1 << bits, (matrices, rows, columns))
    if bits == 8:
        codes[codes % 128 == 127] = 3  # no NaN, which never equals itself
    stored = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    row = file.add(name, "F8_E4M3" if bits == 8 else "U8", stored.astype(np.uint8))
    down, across = matrices * -(-rows // block[0]), -(-columns // block[1])
    if scales == "U8":
        raw = random.integers(120, 134, (down, across)).astype(np.uint8)
        values = np.array(E8M0_VALUES)[raw]
    else:
        values = random.normal(size=(down, across)).astype(np.float32)
        raw = values
        if scales == "BF16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
            values = (raw.astype(np.uint32) << 16).view(np.float32)
    at = file.add(f"{name}.scales", scales, raw)
    zeros_row = global_row = None
    zeros = np.full((down, across), 8)
    if zero_points:
        zeros = random.integers(0, 16, (down, across))
        padded = np.zeros((-(-down // 8) * 8, across), np.int64)
        padded[:down] = zeros
        packed = sum(padded[k::8] << (4 * k) for k in range(8)).astype(np.uint32).view(np.int32)
        zeros_row = file.add(f"{name}.zeros", "I32", packed)
    common = 1.0
    if has_global:
        common = float(np.float32(random.normal()))
        global_row = file.add(f"{name}.global", "F32", np.array([common], np.float32))
    decode = Decode(code_format, (rows, columns), block, at, zeros_row, global_row)
    numbers = np.empty((matrices, rows, columns), np.float64)
    for m, r, c in np.ndindex(numbers.shape):
        cell = m * -(-rows // block[0]) + r // block[0], c // block[1]
        number = CODE_VALUES[code_format][codes[m, r, c]]
        if zero_points:
            number = float(codes[m, r, c] - zeros[cell])
        numbers[m, r, c] = number * float(values[cell]) * common
    return row, decode, numbers.reshape(-1)


VIEWS = {
    "whole": lambda x: x,
    "flat run that begins and ends within rows": lambda x: x.flatten()[x.shape[2] // 2 : -max(1, x.shape[2] // 3)],
    "transposed": lambda x: x.transpose(1, 2),
    "columns": lambda x: x[:, :, x.shape[2] // 4 :],
    "an odd column": lambda x: x[:, :, 1:],
    "rows": lambda x: x[:, x.shape[1] // 3 :],
    "even rows": lambda x: x[:, 0::2],
    "odd rows transposed": lambda x: x[:, 1::2].transpose(1, 2),
    "every third row": lambda x: x[:, 0::3],
    "every other column": lambda x: x[:, :, 0::2],
    "matrices last": lambda x: x.permute(1, 2, 0),
    "one element": lambda x: x[0, 0, :1],
    "each twice": lambda x: x[None].expand(2, *x.shape),
    "halves of columns separately": lambda x: x.unflatten(2, (2, -1)).permute(2, 0, 1, 3) if x.shape[2] % 2 == 0 else x,
}


def taken(view, numel, shape):
    """Return a view of a source as a copy to a contiguous target, with the elements that it reads."""
    places = VIEWS[view](torch.arange(numel).view(shape))
    if not places.numel():
        return None
    box = Box(tuple(places.shape), tuple(places.stride()), contiguous(places.shape))
    return Piece(0, box, places.storage_offset(), 0), places.reshape(-1)


def contiguous(shape):
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


def windows_within(file, decodes, moves, limit):
    """Return windows of ``limit`` bytes, or of the size that the error asks for."""
    for _ in range(1 + len(decodes)):
        try:
            windows = list(code_windows(moves, file, decodes, limit, 0))
            assert all(window.nbytes <= limit for window in windows)
            return windows
        except ConversionError as error:
            needed = int(str(error).split("at least ")[1].split()[0]) // 2
            assert needed > limit
            limit = needed
    raise AssertionError("the size that the error asks for is not enough")


def decoded(file, decodes, moves, targets, limit, by_kernels=False):
    """Execute all windows, with kernels if possible. Return the targets, and the copies that torch executed."""
    windows = windows_within(file, decodes, moves, limit)
    tensors = [torch.full((4 * numel,), POISON, dtype=torch.uint8).view(torch.float32) for numel in targets]
    work = Work(0, 0)
    for number, window in enumerate(windows):
        region = torch.full((window.nbytes + 64,), POISON, dtype=torch.uint8)
        region = region[-region.data_ptr() % 64 :][: window.nbytes]
        written = np.zeros(window.nbytes, bool)
        for _, offset, nbytes, memory, start in window.reads:
            assert memory == number
            assert not written[start : start + nbytes].any()
            written[start : start + nbytes] = True
            raw = bytearray(file.data[offset : offset + nbytes])
            region[start : start + nbytes] = torch.frombuffer(raw, dtype=torch.uint8)
        grouped = Window(group_moves(window.moves), window.nbytes, 1, window.groups, window.rectangles)
        copies = WindowCopies([grouped], tensors, [region])
        work += copies.run(0, copies.variants(10**9) if by_kernels else None)
    return tensors, work


source_strategy = st.fixed_dictionaries(
    {
        "code_format": st.sampled_from(["e4m3", "e2m1", "int4"]),
        "matrices": st.integers(1, 3),
        "rows": st.sampled_from([1, 3, 4, 6, 8, 12]),
        "columns": st.sampled_from([2, 4, 8, 16, 24]),
        "block": st.tuples(st.sampled_from([1, 2, 3, 4, 16]), st.sampled_from([2, 4, 16, 1024])),
        "scales": st.sampled_from(list(SCALES)),
        "has_global": st.booleans(),
        "view": st.lists(st.sampled_from(list(VIEWS)), min_size=1, max_size=2),
    }
)


def check(sources, limit, seed, gap, by_kernels):
    random = np.random.default_rng(seed)
    file, decodes, moves, targets, expected = File(), {}, {}, [], []
    for number, source in enumerate(sources):
        source = dict(source)
        views = source.pop("view")
        zero_points = source["code_format"] == "int4" and number % 2 == 0
        row, decode, numbers = add_source(file, random, f"s{number}", **source, zero_points=zero_points)
        decodes[row] = decode
        shape = source["matrices"], source["rows"], source["columns"]
        for view in views:
            read = taken(view, prod(shape), shape)
            if read is None:
                continue
            piece, order = read
            # Targets have ``gap`` elements between the written ones.
            box = piece.box._replace(target_strides=tuple((1 + gap) * stride for stride in piece.box.target_strides))
            moves.setdefault(row, []).append(Move(len(targets), "F32", box, piece.source_offset, gap))
            targets.append((1 + gap) * len(order))
            expected.append(numbers[order.numpy()].astype(np.float32))
    tensors, work = decoded(file, decodes, moves, targets, limit, by_kernels)
    for tensor, numbers in zip(tensors, expected, strict=True):
        values = tensor.numpy().reshape(len(numbers), 1 + gap)
        assert np.array_equal(values[:, gap], numbers)
        assert (values[:, :gap].view(np.uint8) == POISON).all()
    return work


limits = st.sampled_from([4096, 6000, 20_000, 1 << 20])


@settings(max_examples=200, deadline=None)
@given(st.lists(source_strategy, min_size=1, max_size=3), limits, st.integers(0, 2**32), st.integers(0, 1))
def test_any_copies_in_any_window_are_decoded_like_single_elements(sources, limit, seed, gap):
    check(sources, limit, seed, gap, by_kernels=False)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@settings(max_examples=60, deadline=None)
@given(st.lists(source_strategy, min_size=1, max_size=2), limits, st.integers(0, 2**32), st.integers(0, 1))
def test_kernels_decode_them_too(sources, limit, seed, gap):
    check(sources, limit, seed, gap, by_kernels=True)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_many_matrices_that_end_within_blocks_stay_within_the_window(rows):
    """Their blocks of scales exceed their elements by those of a whole block."""
    file = File()
    shape = 2000, rows, 16
    codes = np.zeros(shape, np.uint8)
    row = file.add("w", "F8_E4M3", codes)
    scales = file.add("s", "F32", np.ones((2000 * -(-rows // 4), 8), np.float32))
    decodes = {row: Decode("e4m3", (rows, 16), (4, 2), scales)}
    moves = {row: [Move(0, "F32", run_of(codes.size), 0, 0)]}
    windows = list(code_windows(moves, file, decodes, 1 << 17, 0))
    assert len(windows) > 10
    assert all(window.nbytes <= 1 << 17 for window in windows)
    of_codes = range(file.offsets[row], file.offsets[row] + codes.size)
    assert (
        sum(read.nbytes for window in windows for read in window.reads if read.offset_bytes in of_codes) == codes.size
    )


def test_tables_of_many_scales_need_little_scratch():
    file, rows, columns = File(), 4096, 2048
    codes = np.zeros((1, rows, columns // 2), np.uint8)
    row = file.add("w", "U8", codes)
    scales = file.add("s", "BF16", np.full((rows, columns // 8), 0x3F80, np.uint16))
    zeros = file.add("z", "I32", np.full((rows // 8, columns // 8), 0x77777777, np.int32))
    common = file.add("g", "F32", np.array([2.0], np.float32))
    decodes = {row: Decode("int4", (rows, columns), (1, 8), scales, zeros, common)}
    moves = {row: [Move(0, "BF16", Box((rows, columns), (columns, 1), (columns, 1)), 0, 0)]}
    (window,) = code_windows(moves, file, decodes, 1 << 30, 0)
    (group,) = window.groups.values()
    assert group.count == rows * columns // 8  # their zero points would need 4 MiB
    region = torch.zeros(window.nbytes, dtype=torch.uint8)
    for _, offset, nbytes, _, start in window.reads:
        raw = bytearray(file.data[offset : offset + nbytes])
        region[start : start + nbytes] = torch.frombuffer(raw, dtype=torch.uint8)
    target = torch.empty(rows, columns, dtype=torch.bfloat16)
    decoder = WindowDecoder([group], [target], region.device)
    peak = torch_peak(lambda: decoder.compute_tables([group], region))
    assert peak < 4 << 20
    table = region[group.table_bytes : group.table_bytes + group.count * 32].view(torch.bfloat16).view(-1, 16)
    assert torch.equal(table, (2.0 * (torch.arange(16) - 7)).bfloat16().expand_as(table))
