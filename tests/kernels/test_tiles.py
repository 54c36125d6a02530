"""Tests of the building blocks of kernels, each in a kernel of its own in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from automodel_conv.kernels import tiles
from automodel_conv.kernels.jit import INTERPRETED
from automodel_conv.kernels.strided_copy import cast_variant
from automodel_conv.kernels.tiles import cast, grouped_tile, load
from tests.kernels.support import CASTABLE, casting_cases

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
SIZE = 8


@triton.jit
def tile_of_program(out, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    row, column = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@triton.jit
def cast_line(src, dst, COUNT: tl.constexpr, DST: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(dst + at, cast(tl.load(src + at), DST))


@triton.jit
def load_line(memory, dst, start, COUNT: tl.constexpr, wanted, T: tl.constexpr, BYTEWISE: tl.constexpr):
    at = tl.arange(0, COUNT)
    address = memory.to(tl.pointer_type(tl.uint8), bitcast=True).to(tl.int64) + start
    x = load(address, 1, at, at < wanted, T, 1, BYTEWISE)
    tl.store(dst + at, x, mask=at < wanted)


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (33, 4), (40, 20), (70, 9)])
def test_programs_take_every_tile_once_up_to_8_along_the_rows_before_the_next_columns(rows, columns):
    down, across = -(-rows // 4), -(-columns // 8)
    out = torch.full((down * across, 2), -1, dtype=torch.int32)
    tile_of_program[(down * across,)](out, rows, columns, 4, 8)
    wanted = [
        [4 * row, 8 * column]
        for group in range(0, down, 8)
        for column in range(across)
        for row in range(group, min(group + 8, down))
    ]
    assert out.tolist() == wanted


@interpreted
@pytest.mark.parametrize(("dst", "src"), [(d, s) for d in CASTABLE for s in CASTABLE], ids=str)
def test_cast_rounds_as_torch_does_and_keeps_nan(dst, src):
    values = casting_cases(src).reshape(-1)[:: 7 if src.itemsize == 2 else 5]
    values = values[: 1 << (len(values).bit_length() - 1)].contiguous()
    made = torch.zeros(len(values), dtype=dst)
    cast_line[(1,)](values, made, len(values), getattr(tl, str(dst).removeprefix("torch.")))
    wanted = values.to(dst)
    assert torch.equal(made.isnan(), wanted.isnan())
    same = torch.int16 if dst.itemsize == 2 else torch.int32
    assert torch.equal(made.view(same)[~wanted.isnan()], wanted.view(same)[~wanted.isnan()])


@interpreted
@pytest.mark.parametrize("wanted", [0, 1, SIZE - 1, SIZE])
@pytest.mark.parametrize(("start", "bytewise"), [(0, False), (0, True), (1, True), (3, True)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.int16, "uint16"), (torch.int32, "uint32")], ids=str)
def test_elements_are_loaded_from_any_byte_on_request(dtype, name, start, bytewise, wanted):
    memory = (torch.arange(64) * 37 % 256).to(torch.uint8)
    made = torch.full((SIZE,), -1, dtype=dtype)
    load_line[(1,)](memory, made.view(getattr(torch, name)), start, SIZE, wanted, getattr(tl, name), bytewise)
    skip = start + dtype.itemsize  # the base is one element
    raw = memory[skip : skip + SIZE * dtype.itemsize].clone().view(dtype)
    assert made.tolist() == raw.tolist()[:wanted] + [-1] * (SIZE - wanted)


def test_compile_time_arguments_are_those_of_the_variant_and_others():
    variant = cast_variant(torch.float32, torch.bfloat16, 16, 16, 4096)
    assert tiles.constants(variant, VECTOR=4) == {
        "SRC": tl.bfloat16,
        "DST": tl.float32,
        "TILE_ROWS": variant.tile_rows,
        "TILE_COLUMNS": variant.tile_columns,
        "BYTEWISE": False,
        "VECTOR": 4,
    }
