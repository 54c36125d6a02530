"""Tests of windows of quantized sources against an oracle that decodes one element at a time in float64."""

from __future__ import annotations

import importlib.util
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.execution.window_decoding import WindowDecoder
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode, ZeroPacking
from automodel_conv.schedule.code_windows import code_windows
from automodel_conv.schedule.device import Window
from automodel_conv.schedule.jobs import Move, group_moves
from automodel_conv.testing import POISON
from tests.schedule.coded import SCALES, VIEWS, File, add_source, taken
from tests.whole.test_memory_budget import torch_peak


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
    counts = CopyCounts(0, 0)
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
        counts += copies.run(0, copies.variants(10**9) if by_kernels else None)
    return tensors, counts


source_strategy = st.fixed_dictionaries(
    {
        "code_format": st.sampled_from(["e4m3", "e2m1", "int4", "int8"]),
        "matrices": st.integers(1, 3),
        "rows": st.sampled_from([1, 3, 4, 6, 8, 12]),
        "columns": st.sampled_from([2, 4, 8, 16, 24]),
        "block": st.tuples(st.sampled_from([1, 2, 3, 4, 16]), st.sampled_from([1, 2, 3, 4, 16, 1024])),
        "scales": st.sampled_from(list(SCALES)),
        "has_global": st.sampled_from([False, True, "each"]),
        "has_divisor": st.booleans(),
        "packing": st.sampled_from([ZeroPacking(), ZeroPacking(by_columns=True), ZeroPacking(True, 0x11111111)]),
        "word": st.sampled_from([(), (4, 2)]),
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
        if -(-source["columns"] // source["block"][1]) % 8:
            source["word"] = ()
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
    tensors, counts = decoded(file, decodes, moves, targets, limit, by_kernels)
    for tensor, numbers in zip(tensors, expected, strict=True):
        values = tensor.numpy().reshape(len(numbers), 1 + gap)
        assert np.array_equal(values[:, gap], numbers)
        assert (values[:, :gap].view(np.uint8) == POISON).all()
    return counts


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
