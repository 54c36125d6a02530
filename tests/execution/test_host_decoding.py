"""Tests of rectangles of codes decoded in host memory, against loops over elements in float64."""

import struct

import pytest
import torch

from automodel_conv.execution import host_decoding
from automodel_conv.execution.host_decoding import decode_codes
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.jobs import CodeRectangle, Grid

ROWS, COLUMNS = 7, 6
CODES, CODES_STRIDE = 64, 9
SCALES, ZEROS, GLOBAL = 192, 320, 384
VALUES, VALUES_STRIDE = 448, 8
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
GRID = (6, 3)


def rectangle(code_format="e4m3", dtype="F32", block=(2, 4), start=(1, 2), zeros=False, scaled=False, divides=False):
    return CodeRectangle(
        Decode(code_format, (ROWS, COLUMNS), block, 0, divides=divides),
        dtype,
        (ROWS, COLUMNS),
        start,
        CODES,
        CODES_STRIDE,
        VALUES,
        VALUES_STRIDE,
        Grid(SCALES, "F32", GRID),
        Grid(ZEROS, "I32", (2, GRID[1])) if zeros else None,
        3,
        GLOBAL if scaled else None,
        1,
        1,
    )


@pytest.fixture
def memory():
    """Return codes without NaN, scales that float32 can hold, zero points, and a global scale of 1.5."""
    raw = torch.full((1088,), 0x5C, dtype=torch.uint8)
    memory = raw[-raw.data_ptr() % 64 :][:1024]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (ROWS, CODES_STRIDE), generator=generator, dtype=torch.uint8)
    codes[codes % 128 == 127] = 3
    memory[CODES : CODES + codes.numel()] = codes.reshape(-1)
    scales = torch.rand(GRID, generator=generator) + 0.5
    memory[SCALES : SCALES + 4 * scales.numel()] = scales.reshape(-1).view(torch.uint8)
    zeros = torch.randint(-(2**31), 2**31, (2, GRID[1]), generator=generator).to(torch.int32)
    memory[ZEROS : ZEROS + 4 * zeros.numel()] = zeros.reshape(-1).view(torch.uint8)
    memory[GLOBAL : GLOBAL + 4] = torch.tensor([1.5]).view(torch.uint8)
    return memory


def expected(rectangle, memory):
    """Return each value by its definition."""
    data = bytes(memory.tolist())
    block, bits = rectangle.decode.block, rectangle.decode.bits
    values = []
    for r in range(ROWS):
        row = []
        for c in range(COLUMNS):
            if bits == 8:
                code = data[CODES + r * CODES_STRIDE + c]
                stored = torch.int8 if rectangle.decode.format == "int8" else torch.float8_e4m3fn
                value = torch.tensor([code], dtype=torch.uint8).view(stored).double().item()
            else:
                byte = data[CODES + r * CODES_STRIDE + c // 2]
                code = byte >> 4 if c % 2 else byte & 15
                value = E2M1[code] if rectangle.decode.format == "e2m1" else code - 8.0
            down = 1 + (rectangle.start[0] + r) // block[0]
            across = 1 + (rectangle.start[1] + c) // block[1]
            if rectangle.zero_points is not None:
                packed = struct.unpack_from("<I", data, ZEROS + 4 * ((down + 3) // 8 * GRID[1] + across))[0]
                value = float(code - (packed >> 4 * ((down + 3) % 8) & 15))
            value *= struct.unpack_from("<f", data, SCALES + 4 * (down * GRID[1] + across))[0]
            if rectangle.global_bytes is not None:
                value = value / 1.5 if rectangle.decode.divides else value * 1.5
            row.append(value)
        values.append(row)
    return torch.tensor(values, dtype=torch.float64)


def check(rectangle, memory):
    wanted, before = expected(rectangle, memory), memory.clone()
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[rectangle.dtype]
    before_values = before.view(dtype)[VALUES // dtype.itemsize :]
    for r in range(ROWS):
        before_values[r * VALUES_STRIDE : r * VALUES_STRIDE + COLUMNS] = wanted[r].to(dtype)
    decode_codes([rectangle], memory)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("entries", [1, 200, 1 << 18], ids=["bands of a block", "bands of some", "one band"])
@pytest.mark.parametrize("code_format", ["e4m3", "e2m1", "int4", "int8"])
@pytest.mark.parametrize(("block", "start"), [((2, 4), (1, 2)), ((3, 4), (2, 0)), ((64, 64), (9, 4)), ((2, 6), (0, 0))])
def test_values_are_codes_times_the_scale_of_their_block(monkeypatch, memory, code_format, block, start, entries):
    monkeypatch.setattr(host_decoding, "TABLE_ENTRIES", entries)
    check(rectangle(code_format, block=block, start=start), memory)


@pytest.mark.parametrize("entries", [1, 1 << 18])
def test_zero_points_are_unpacked_from_the_row_that_the_grid_begins_at(monkeypatch, memory, entries):
    monkeypatch.setattr(host_decoding, "TABLE_ENTRIES", entries)
    check(rectangle("int4", zeros=True), memory)


@pytest.mark.parametrize("divides", [False, True])
def test_global_scale_is_multiplied_or_divides(memory, divides):
    check(rectangle("e2m1", scaled=True, divides=divides), memory)


def test_values_are_rounded_once_to_the_targets_dtype(memory):
    check(rectangle(dtype="BF16"), memory)


def test_no_rectangles_change_nothing(memory):
    before = memory.clone()
    decode_codes([], memory)
    assert torch.equal(memory, before)
