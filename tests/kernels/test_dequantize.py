"""Tests of dequantize against the definition, by coordinates, and of operands that it and its torch version refuse."""

from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.kernels import dequantize as module
from automodel_conv.kernels import jit, launch
from automodel_conv.kernels.code_tables import bits_of, code_table
from automodel_conv.kernels.dequantize import dequantize
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.kernels.code_problems import BF16, F32, LAYOUTS, Problem, problems
from tests.kernels.test_code_tables import NUMBERS, rounded
from tests.machine_code.variants import launchable

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")


@pytest.fixture
def launched():
    """Return the launched variants, after checking the promise that the interpreter does not check."""
    seen = []

    def spy(variant, grid, table, integers):
        number = 2 if variant.dst == "uint16" else 4
        assert not (table[:, 0] % (number * variant.dst_vector)).any()
        assert not (table[:, 1] % variant.src_vector).any()
        seen.append(variant)
        return real(variant, grid, table, integers)

    real = launch.queue
    with mock.patch.object(launch, "queue", spy):
        yield seen


def small_tiles():
    """Shrink the tiles so that small matrices have several, the last ones partial."""
    return mock.patch.multiple(module, _TILE=(8, 64), _TRANSPOSED_TILE=(32, 32), _SCALAR_TILE=(16, 16))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_kernel_equals_the_definition(problem, layout):
    with small_tiles():
        problem.check(dequantize, layout)


@needs_triton
def test_every_variant_decodes_right_and_its_machine_code_is_checked(launched):
    known = {variant for variant in launchable() if variant.kernel.name == "dequantize_tiles"}
    cases = product((4, 8), (BF16, F32), (torch.uint8, torch.int32), [(1, 16), (12, 48)], LAYOUTS, (0, 1))
    for bits, dtype, table_row_dtype, block, layout, gap in cases:
        problem = Problem(bits, (32, 48), block, (0, 0), dtype, table_row_dtype, 300, gap)
        out = guarded(problem.shape, dtype, strides=LAYOUTS[layout](*problem.shape)).tensor
        before = len(launched)
        with mock.patch.object(launch, "queue", lambda variant, *_: launched.append(variant)):
            dequantize([out], problem.codes, problem.table_rows, problem.table, **problem.how)
        if launched[-1] not in launched[:before]:
            problem.check(dequantize, layout)
    assert set(launched) == known


@needs_triton
@pytest.mark.parametrize(
    ("block", "start", "vector"),
    [
        ((128, 128), (0, 0), 8),
        ((128, 128), (5, 64), 8),
        ((128, 128), (5, 60), 1),
        ((100, 60), (0, 0), 1),
        ((100, 64), (0, 32), 8),
        ((1, 90), (0, 0), 8),  # one block for all columns
    ],
)
def test_vectors_are_as_long_as_blocks_allow(launched, block, start, vector):
    Problem(8, (33, 64 if block[1] == 90 else 160), block, start, BF16, torch.uint8, 9).check(dequantize, "rows")
    assert [variant.dst_vector for variant in launched] == [vector]


@needs_triton
@pytest.mark.parametrize("block", [(128, 128), (1, 40), (64, 40), (1, 1 << 20), (1 << 30, 1 << 30)])
def test_blocks_of_powers_of_two_or_whole_matrices_need_no_division(launched, block):
    Problem(8, (3, 40), block, (0, 0), BF16, torch.uint8, 9).check(dequantize, "rows")
    assert [variant.details.by_shifts for variant in launched] == [True]


@needs_triton
def test_empty_operands_launch_nothing(launched):
    table = address_valued((1, 256), BF16)
    for shape in ((0, 4), (4, 0)):
        codes = torch.empty(shape, dtype=torch.uint8)
        for verb in (dequantize, dequantize_torch):
            verb([codes.to(BF16)], [codes], [torch.empty(shape, dtype=torch.uint8)], table, bits=8, block=(1, 1))
            verb([], [], [], table, bits=8, block=(1, 1))
    assert not launched


def misfits():
    """Return changes to a valid call, by the misfit that they cause."""
    fits = Problem(4, (6, 8), (2, 4), (0, 0), BF16, torch.uint8, 3)
    out = torch.zeros(6, 8, dtype=BF16)
    good = {"dst": [out], "codes": fits.codes, "table_rows": fits.table_rows, "table": fits.table, **fits.how}
    codes, table_rows, table = fits.codes[0], fits.table_rows[0], fits.table
    changes = {
        "another shape": {"dst": [out[:5]]},
        "another dtype": {"dst": [out.float()]},
        "one dimension": {"dst": [out[0]]},
        "too many codes": {"codes": [codes, codes]},
        "no table rows": {"table_rows": []},
        "signed codes": {"codes": [codes.view(torch.int8)]},
        "wide table rows": {"table_rows": [table_rows.long()]},
        "a row of blocks missing": {"table_rows": [table_rows[:-1]]},
        "begins beyond the block": {"start": (2, 0)},
        "an empty block": {"block": (0, 4)},
        "a table of bytes": {"table": address_valued((3, 256), BF16)},
        "no row in the table": {"table": table[:0]},
        "a table with gaps": {"table": address_valued((3, 32), BF16)[:, ::2]},
        "elsewhere": {"table": table.to("meta")},
    }
    return {name: good | change for name, change in changes.items()}


@pytest.mark.parametrize("verb", [dequantize_torch, pytest.param(dequantize, marks=needs_triton)])
@pytest.mark.parametrize("name", misfits())
def test_operands_that_do_not_fit_are_refused_before_anything_is_written(name, verb):
    operands = misfits()[name]
    with pytest.raises(ConversionError):
        verb(**operands)
    assert not any(bool(out.any()) for out in operands["dst"])


@pytest.mark.parametrize("verb", [dequantize_torch, pytest.param(dequantize, marks=needs_triton)])
@pytest.mark.parametrize(("bits", "dtype"), [(2, BF16), (8, torch.float64)])
def test_other_codes_and_numbers_are_refused(bits, dtype, verb):
    with pytest.raises(UnsupportedError, match="does not support"):
        verb([], [], [], torch.zeros(1, 1 << bits, dtype=dtype), bits=bits, block=(1, 1))


@needs_triton
def test_destinations_of_two_kinds_are_refused_by_the_kernel():
    problem = Problem(8, (4, 4), (2, 2), (0, 0), BF16, torch.uint8, 3, count=2)
    out = [torch.zeros(4, 4, dtype=BF16), torch.zeros(4, 4, dtype=BF16).t()]
    with pytest.raises(ConversionError, match="of several kinds"):
        dequantize(out, problem.codes, problem.table_rows, problem.table, **problem.how)
    dequantize_torch(out, problem.codes, problem.table_rows, problem.table, **problem.how)
    for actual, wanted in zip(out, problem.expected(), strict=True):
        assert_bytes_equal(actual.contiguous(), wanted)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code_format", NUMBERS)
def test_kernel_decodes_every_code_under_every_scale_of_a_byte(code_format, stored, dtype):
    """Check exponents and FP8, zero and NaN among them, and bfloat16 with infinities and subnormal numbers."""
    bits = bits_of(code_format)
    codes = torch.arange(256 if bits == 8 else 128, dtype=torch.int32)
    codes = (codes if bits == 8 else codes % 8 * 2 + (codes % 8 * 2 + 1) * 16).to(torch.uint8).repeat(256, 1)
    if stored == torch.bfloat16:
        scales = (torch.arange(256) * 257).to(torch.uint16).view(torch.bfloat16)[:, None]
    else:
        scales = torch.arange(256).to(torch.uint8).view(stored)[:, None]
    wide = scales.view(torch.float8_e8m0fnu).double() if stored == torch.uint8 else scales.double()
    columns = codes.shape[1] * 8 // bits
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = wide.numpy() * np.tile(NUMBERS[code_format], columns // (1 << bits))
    made = code_table(code_format, scales, dtype)
    out, check = guarded((256, columns), dtype)
    dequantize([out], [codes], [made.table_rows], made.table, bits=bits, block=(1, columns))
    assert_bytes_equal(out, rounded(wanted, dtype))
    check()
