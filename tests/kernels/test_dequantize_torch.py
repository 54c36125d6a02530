"""Tests of the torch version of dequantize: against the definition, by coordinates, between guards."""

from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.kernels import dequantize_torch as twin
from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.testing import assert_bytes_equal, guarded
from tests.kernels.code_problems import BF16, F32, LAYOUTS, Problem, problems, random_bytes


def pieces(nbytes, pairs_worth=2):
    """Shrink the pieces so that small matrices have several."""
    return mock.patch.multiple(twin, _PIECE_BYTES=nbytes, _TRANSPOSED_ROWS=8, _PAIRS_WORTH=pairs_worth)


@settings(max_examples=200)
@given(
    problem=problems(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    nbytes=st.sampled_from([1, 7, 64, 1 << 18]),
    pairs_worth=st.sampled_from([0, 2]),
)
def test_torch_version_equals_the_definition(problem, layout, nbytes, pairs_worth):
    with pieces(nbytes, pairs_worth):
        problem.check(dequantize_torch, layout)


@given(problem=problems(), data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_part_with_its_start_is_the_part_of_the_whole(problem, data, layout):
    (rows, columns), block, start = problem.shape, problem.how["block"], problem.how["start"]
    bits = problem.how["bits"]
    step = 8 // bits
    r, c = (
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        for size in (rows, columns // step)
    )
    c = [step * n for n in c]
    whole, check = guarded(problem.shape, problem.dtype, strides=LAYOUTS[layout](rows, columns))
    first = [(at + begin) // of for at, begin, of in zip((r[0], c[0]), start, block, strict=True)]
    inside = tuple((at + begin) % of for at, begin, of in zip((r[0], c[0]), start, block, strict=True))
    last = [-(-(end + begin) // of) for end, begin, of in zip((r[1], c[1]), start, block, strict=True)]
    dequantize_torch(
        [whole[r[0] : r[1], c[0] : c[1]]],
        [problem.codes[0][r[0] : r[1], c[0] // step : c[1] // step]],
        [problem.table_rows[0][first[0] : last[0], first[1] : last[1]].contiguous()],
        problem.table,
        bits=bits,
        block=block,
        start=inside,
    )
    wanted = guarded(problem.shape, problem.dtype, strides=LAYOUTS[layout](rows, columns)).tensor
    wanted[r[0] : r[1], c[0] : c[1]] = problem.expected()[0][r[0] : r[1], c[0] : c[1]]
    assert_bytes_equal(whole, wanted)
    check()


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize(
    ("code_format", "bits", "scales", "block"),
    [
        ("e4m3", 8, torch.rand(3, 2), (128, 128)),
        ("e4m3", 8, torch.rand(300, 1), (1, 256)),
        ("e4m3", 8, torch.rand(1, 1), (300, 256)),
        ("e5m2", 8, torch.randint(100, 140, (300, 8), dtype=torch.uint8), (1, 32)),
        ("e2m1", 4, torch.randint(0, 255, (300, 8), dtype=torch.uint8), (1, 32)),
        ("e2m1", 4, torch.rand(300, 16).to(torch.float8_e4m3fn), (1, 16)),
        ("int4", 4, torch.rand(300, 8).to(BF16), (1, 32)),
        ("int8", 8, torch.rand(300, 1).to(BF16), (1, 256)),
    ],
)
def test_matrices_of_each_format_are_the_products(code_format, bits, scales, block, layout):
    codes = random_bytes((300, 256 * bits // 8), 0)
    numbers = torch.stack([codes % 16, codes // 16], 2).flatten(1) if bits == 4 else codes
    if code_format in ("e4m3", "e5m2"):
        numbers = numbers.view(torch.float8_e4m3fn if code_format == "e4m3" else torch.float8_e5m2).float()
    elif code_format == "int4":
        numbers = numbers.float() - 8
    elif code_format == "int8":
        numbers = numbers.view(torch.int8).float()
    else:
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[numbers.long()]
    of_scales = scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales.float()
    of_blocks = of_scales.repeat_interleave(block[0], 0)[:300].repeat_interleave(block[1], 1)[:, :256]
    made = code_table(code_format, scales, F32)
    out, check = guarded((300, 256), F32, strides=LAYOUTS[layout](300, 256))
    dequantize_torch([out], [codes], [made.table_rows], made.table, bits=bits, block=block)
    wanted = numbers * of_blocks
    assert torch.equal(out.isnan(), wanted.isnan())
    assert_bytes_equal(out.nan_to_num(), wanted.nan_to_num())
    check()


def test_scratch_stays_within_its_bound():
    sizes = []

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                sizes.append(out.untyped_storage().nbytes())
            return out

    for bits, layout in product((4, 8), ("rows", "transposed", "every other row")):
        problem = Problem(bits, (300, 9000), (1, 16), (0, 0), BF16, torch.int32, 300)
        out = guarded(problem.shape, BF16, strides=LAYOUTS[layout](*problem.shape)).tensor
        operands = [out], problem.codes, problem.table_rows, problem.table
        known = {t.untyped_storage().data_ptr() for t in (out, *problem.codes, *problem.table_rows, problem.table)}
        with Storages():
            dequantize_torch(*operands, **problem.how)
    assert 0 < max(sizes) <= 2 << 20


def test_table_row_beyond_the_table_is_an_error_in_torch():
    problem = Problem(8, (4, 4), (2, 2), (0, 0), BF16, torch.uint8, 3)
    problem.table_rows[0][1, 1] = 3
    with pytest.raises(IndexError):
        dequantize_torch(
            [torch.empty(4, 4, dtype=BF16)], problem.codes, problem.table_rows, problem.table, **problem.how
        )
