"""Tests of code tables: every entry against exact values rounded once, computed independently of the tables' code."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.kernels.code_tables import CANONICAL_NAN, bits_of, code_table
from automodel_conv.testing import assert_bytes_equal

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, F16, F32]
# Bits of the fraction, exponent of the smallest normal number, bits of infinity.
LAYOUTS = {BF16: (7, -126, 0x7F80), F16: (10, -14, 0x7C00), F32: (23, -126, 0x7F800000)}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# torch's own conversions, which the tables do not use.
NUMBERS = {
    "e4m3": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy(),
    "e5m2": torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).double().numpy(),
    "e2m1": np.array([*E2M1, *(-number for number in E2M1)]),
    "int4": np.arange(16) - 8.0,
    "int8": torch.arange(256).to(torch.uint8).view(torch.int8).double().numpy(),
}
HARD = [0.0, -0.0, 1.0, -1.0, 2.0**-149, 7 * 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-24, 2.0**-14, 65504.0, 1e30]
HARD += [float(torch.finfo(F32).max), float("inf"), float("-inf"), float("nan")]


def fitting(bits, dtype):
    """Return bit patterns as the signed integers that torch has."""
    size = dtype.itemsize
    return torch.from_numpy(bits.astype(np.uint32 if size == 4 else np.uint16).view(f"int{8 * size}")).view(dtype)


def rounded(exact, dtype):
    """Round float64 values once, to nearest even. ``rint`` decides halves."""
    fraction_bits, least, infinity = LAYOUTS[dtype]
    finite = np.isfinite(exact)
    size = np.where(finite, np.abs(exact), 0)
    exponent = np.maximum(np.where(size > 0, np.frexp(size)[1] - 1, least), least)
    units = np.rint(np.ldexp(size, fraction_bits - exponent)).astype(np.int64)
    bits = np.where(finite, np.minimum((np.int64(exponent - least) << fraction_bits) + units, infinity), infinity)
    bits |= np.signbit(exact).astype(np.int64) << (8 * dtype.itemsize - 1)
    return fitting(np.where(np.isnan(exact), CANONICAL_NAN[dtype], bits), dtype)


def rounded_fraction(exact, dtype):
    """Return the bits of a positive fraction rounded once, to nearest even, using only integers."""
    fraction_bits, least, infinity = LAYOUTS[dtype]
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    exponent = max(exponent, least)
    whole, rest = divmod(exact / Fraction(2) ** (exponent - fraction_bits), 1)
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    return min(((exponent - least) << fraction_bits) + whole, infinity)


def products(code_format, scales):
    with np.errstate(invalid="ignore", over="ignore"):
        return scales.double().reshape(-1, 1).numpy() * NUMBERS[code_format]


def entries(codes_table):
    """Decode a matrix of every code under every scale, ``[scales, codes]``."""
    return codes_table.table[codes_table.table_rows.reshape(-1).long()]


def random_scales(count, seed=0):
    """Return float32 values of every magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32).view(F32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code_format", NUMBERS)
def test_every_code_under_hard_scales_is_the_exact_product_rounded_once(code_format, dtype):
    scales = torch.cat([torch.tensor(HARD), random_scales(500), torch.rand(500) * 1e-3])[None]
    codes_table = code_table(code_format, scales, dtype)
    assert codes_table.table.shape == (scales.numel(), 1 << bits_of(code_format))
    assert codes_table.table_rows.shape == scales.shape
    assert_bytes_equal(entries(codes_table), rounded(products(code_format, scales), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [BF16, F16], ids=str)
@pytest.mark.parametrize("code_format", NUMBERS)
def test_every_code_under_scales_of_16_bits_is_the_exact_product_rounded_once(code_format, stored, dtype):
    step = 1 if bits_of(code_format) == 4 else 17
    scales = torch.arange(0, 2**16, step).to(torch.int16).view(stored)[:, None]
    codes_table = code_table(code_format, scales, dtype)
    assert_bytes_equal(entries(codes_table), rounded(products(code_format, scales), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("code_format", NUMBERS)
def test_every_code_under_every_scale_of_a_byte_is_the_exact_product_rounded_once(code_format, stored, dtype):
    scales = torch.arange(256).to(torch.uint8)[:, None]
    numbers = NUMBERS["e4m3"] if stored == torch.float8_e4m3fn else [*(2.0 ** (b - 127) for b in range(255)), np.nan]
    codes_table = code_table(code_format, scales.view(stored), dtype)
    assert_bytes_equal(codes_table.table_rows, scales)
    assert_bytes_equal(
        codes_table.table, rounded(products(code_format, torch.tensor(numbers, dtype=torch.float64)), dtype)
    )
    again = code_table(code_format, scales[:3].view(stored), dtype)
    assert again.table is codes_table.table


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_products_next_to_a_half_are_not_rounded_twice(dtype):
    """Check products that are just off a half exactly, and on it in float32, which would round to even."""
    fraction_bits, _, _ = LAYOUTS[dtype]
    shown = 0
    for mantissa, units, side in product(range(9, 16), (1, 3), (1, -1)):
        half = 2**27 + units * 2 ** (26 - fraction_bits)
        scale = (
            half // mantissa + 1 if side > 0 else (half - 1) // mantissa
        )  # in units of 2**-24; codes are in units of 1/8
        exact = Fraction(mantissa * scale, 2**27)
        assert 0 < side * (exact - Fraction(half, 2**27)) < Fraction(15, 2**27)
        once, twice = (
            code_table("e4m3", torch.tensor([[scale * 2.0**-24]]), dtype, like_upstream=upstream).table[
                0, 0x30 + mantissa
            ]
            for upstream in (False, True)
        )
        wanted = torch.tensor(rounded_fraction(exact, dtype), dtype=torch.int16).view(dtype)
        assert_bytes_equal(once, wanted)
        shown += not torch.equal(once.view(torch.int16), twice.view(torch.int16))
    assert shown > 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_upstream_is_the_float32_product_converted(dtype):
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    bytes_ = torch.arange(256).to(torch.uint8)
    wide = torch.cat([torch.tensor(HARD), random_scales(500), torch.rand(500) * 1e-3])
    for scales, numbers in (
        (wide, wide),
        (wide.to(BF16), wide.to(BF16).float()),
        (bytes_.view(torch.float8_e8m0fnu), bytes_.view(torch.float8_e8m0fnu).float()),
        (bytes_, (bytes_.float() - 127).exp2()),
    ):
        wanted = (codes.float() * numbers[:, None]).to(dtype)
        nan = wanted.isnan()
        wanted.view(torch.int32 if dtype == F32 else torch.int16)[nan] = CANONICAL_NAN[dtype]
        assert_bytes_equal(entries(code_table("e4m3", scales[None], dtype, like_upstream=True)), wanted)


def test_like_upstream_equals_transformers():
    finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes = torch.arange(256).to(torch.uint8).repeat(64, 1)
    scales = torch.rand(64, 1) * 1e-3
    wanted = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(codes.view(torch.float8_e4m3fn), scales, BF16)
    values = entries(code_table("e4m3", scales, BF16, like_upstream=True))
    finite = ~wanted.isnan()
    assert torch.equal(values.isnan(), wanted.isnan())
    assert_bytes_equal(values[finite], wanted[finite])


def test_every_int4_code_under_every_zero_point():
    zero_points = torch.arange(16).repeat(3, 1)
    scales = torch.tensor([[1.0], [0.3], [-7e-5]]).expand(3, 16).to(BF16)
    for dtype, kind in product(DTYPES, (torch.uint8, torch.int32)):
        codes_table = code_table("int4", scales, dtype, zero_points=zero_points.to(kind))
        exact = scales.double()[..., None].numpy() * (np.arange(16)[None, None] - np.arange(16)[None, :, None])
        assert_bytes_equal(codes_table.table, rounded(exact, dtype).view(48, 16))
    same = code_table("int4", scales, BF16, zero_points=torch.full((3, 16), 8))
    assert_bytes_equal(same.table, code_table("int4", scales, BF16).table)


def test_zero_points_under_scales_of_a_byte_take_a_row_each():
    scales = torch.tensor([[120, 130, 255]], dtype=torch.uint8)
    codes_table = code_table("int4", scales, F32, zero_points=torch.tensor([[8, 3, 8]]))
    exact = np.array([[2.0**-7], [8.0], [np.nan]]) * (np.arange(16) - np.array([[8], [3], [8]]))
    assert_bytes_equal(codes_table.table, rounded(exact, F32))
    assert codes_table.table_rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("common", [1.0, 0.37, 1.2345e-4, 3.7e5])
def test_every_nvfp4_code_under_every_scale_and_a_common_one(common, dtype, divide):
    scales = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)[None]
    common = torch.tensor([common])
    codes_table = code_table("e2m1", scales, dtype, global_scale=common, divide=divide)
    assert codes_table.table.shape == (256, 16)
    third = Fraction(common.item()) ** (-1 if divide else 1)
    wanted = np.full((256, 16), CANONICAL_NAN[dtype], dtype=np.int64)
    for (s, scale), (c, number) in product(enumerate(NUMBERS["e4m3"].tolist()), enumerate(NUMBERS["e2m1"].tolist())):
        if scale == scale:
            exact = abs(Fraction(scale) * Fraction(number)) * third
            negative = np.signbit(scale) != np.signbit(number)
            bits = rounded_fraction(exact, dtype) if exact else 0
            wanted[s, c] = bits | int(negative) << (8 * dtype.itemsize - 1)
    assert_bytes_equal(entries(codes_table), fitting(wanted, dtype))


@pytest.mark.parametrize("divide", [False, True])
def test_common_scale_of_wide_scales(divide):
    scales, common = torch.tensor([[0.3, 1e-38, 3e38]]), torch.tensor(1.7)
    exact = products("e4m3", scales)
    exact = exact / common.double().item() if divide else exact * common.double().item()
    for dtype in DTYPES:
        codes_table = code_table("e4m3", scales, dtype, global_scale=common, divide=divide)
        assert_bytes_equal(codes_table.table, rounded(exact, dtype))


def test_unsupported_operands_of_a_table_are_refused():
    scales = torch.ones(2, 3)
    for arguments in (("e3m4", scales, BF16), ("e4m3", scales.double(), BF16), ("e4m3", scales, torch.float64)):
        with pytest.raises(UnsupportedError, match="code tables do not support"):
            code_table(*arguments)
    for arguments, options in (
        (("e4m3", scales[0], BF16), {}),
        (("e4m3", scales, BF16), {"zero_points": torch.ones(2, 3)}),
        (("int4", scales, BF16), {"zero_points": torch.ones(3, 2)}),
        (("int4", scales, BF16), {"global_scale": torch.ones(2)}),
    ):
        with pytest.raises(ConversionError):
            code_table(*arguments, **options)
