"""Code tables: what each code of a quantized matrix stands for under each of its scales, rounded once.

``table[r, code]`` is the number that ``code`` means under scale ``r``; ``dequantize`` then only looks up. So a number
is computed in one place, here, and every device writes the same bytes.

The formats, and where they are laid down: e4m3 (bias 7, no infinity, NaN at 0x7f and 0xff) and e5m2 (bias 15), OCP
8-bit Floating Point Specification 1.0; e2m1 and the scale e8m0 (``2 ** (byte - 127)``, 255 is NaN), OCP Microscaling
Formats Specification 1.0; int4, ``code - 8``, ``compressed_tensors`` (``pack_quantized``).
"""

from __future__ import annotations

from functools import cache
from math import inf, ldexp, nan
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, message

# Entries of a table computed at a time: their float64 steps stay within the second-level cache of a CPU, and a GPU has
# enough to do with little memory.
_ENTRIES = {"cpu": 1 << 15, "cuda": 1 << 18}
_INT4_ZERO = 8

CANONICAL_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
"""The bits of every NaN in a table, by its dtype. Conversions leave open which NaN a NaN becomes."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_BYTE_SCALES = (torch.float8_e8m0fnu, torch.uint8, torch.float8_e4m3fn)
_WIDE_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class CodeTable(NamedTuple):
    """What ``dequantize`` takes besides codes."""

    table: Tensor  # [T, 2**bits], a row for each scale that there is
    table_rows: Tensor  # uint8 or int32 [SR, SC], which row each block takes


def _float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """The numbers of all codes of a small float without infinity and NaN, by code: sign, exponent, mantissa."""
    numbers = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        leading = (exponent > 0) << mantissa_bits
        numbers.append(ldexp(leading + mantissa, max(exponent, 1) - bias - mantissa_bits))
    return numbers


def _signed(numbers: list[float]) -> tuple[float, ...]:
    return (*numbers, *(-number for number in numbers))


CODE_VALUES: dict[str, tuple[float, ...]] = {
    "e4m3": _signed([*_float_values(4, 3, 7)[:127], nan]),
    "e5m2": _signed([*_float_values(5, 2, 15)[:124], inf, nan, nan, nan]),
    "e2m1": _signed(_float_values(2, 1, 1)),
    "int4": tuple(float(code - _INT4_ZERO) for code in range(16)),
}
"""Formats, and the number that each code stands for without a scale."""

E8M0_VALUES: tuple[float, ...] = (*(ldexp(1, byte - 127) for byte in range(255)), nan)
"""The number that each byte of an e8m0 scale stands for."""


def bits_of(code_format: str) -> int:
    """Bits of a code."""
    return len(CODE_VALUES[code_format]).bit_length() - 1


def code_table(
    code_format: str,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    zero_points: Tensor | None = None,
    global_scale: Tensor | None = None,
    divide: bool = False,
    like_upstream: bool = False,
) -> CodeTable:
    """The table of a quantized matrix, and which row of it each block takes.

    An entry is ``number of the code * scale``, exact, rounded once to ``dtype``, to nearest even: beyond the largest
    number to infinity, below the smallest to a zero that keeps its sign; a NaN is the ``CANONICAL_NAN``.

    Args:
        code_format: ``"e4m3"``, ``"e5m2"``, ``"e2m1"`` or ``"int4"``.
        scales: ``[SR, SC]``, one for each block, as stored: float32, bfloat16 or float16; float8_e8m0fnu, or uint8,
            which is the same; float8_e4m3fn (NVFP4).
        dtype: float32, bfloat16 or float16.
        zero_points: of int4, integers ``[SR, SC]``: the codes that stand for zero, as nibbles are stored, 0 to 15; 8 if
            not given.
        global_scale: one float32, by which every scale is multiplied too (``weight_scale_2`` of ``modelopt``), or
            divided if ``divide`` (``weight_global_scale`` of ``compressed_tensors``). The quotient alone is rounded to
            float64 before it is rounded to ``dtype``.
        like_upstream: the exact product is rounded to float32 and only then to ``dtype``, which is what
            ``Fp8Dequantize`` of transformers computes, NaN apart; a uint8 scale of 255 is infinity, as it is there.

    Returns:
        For scales of a byte without zero points a table of 256 rows, the scales' bytes as cells (uint8), and the table
        does not depend on the scales, so without ``global_scale`` it is made once for each device and shared: read
        only. Otherwise a row for each scale, as many entries as codes; so wide scales of small blocks of e4m3 make
        tables larger than what they decode.

    Raises:
        ConversionError: scales that are no matrix, zero points of another shape or format, a global scale of more than
            one number.
        UnsupportedError: another format, dtype, or dtype of the scales.
    """
    _check(code_format, scales, dtype, zero_points, global_scale)
    values = scales.reshape(-1)
    if scales.dtype in _BYTE_SCALES:
        table_rows = scales.view(torch.uint8).contiguous()
        if zero_points is None and global_scale is None:
            return CodeTable(
                byte_scale_table(code_format, scales.dtype, dtype, like_upstream, scales.device), table_rows
            )
        values = byte_scale_values(scales.dtype, like_upstream, scales.device)
        if zero_points is not None:
            values = values[table_rows.reshape(-1).to(torch.int32)]
    else:
        table_rows = None
    if table_rows is None or zero_points is not None:
        table_rows = torch.arange(scales.numel(), dtype=torch.int32, device=scales.device).view(scales.shape)
    table = scale_table(
        code_format,
        values,
        dtype,
        zero_points=None if zero_points is None else zero_points.reshape(-1),
        global_scales=global_scale,
        divide=divide,
        like_upstream=like_upstream,
    )
    return CodeTable(table, table_rows)


def check_table(code_format: str, scales: torch.dtype, dtype: torch.dtype) -> None:
    """There are tables of this format, for scales of one dtype, of numbers of another.

    Raises:
        UnsupportedError: there are none.
    """
    for what, found, known in (
        ("this format of codes", code_format, CODE_VALUES),
        ("scales of this dtype", scales, (*_BYTE_SCALES, *_WIDE_SCALES)),
        ("numbers of this dtype", dtype, CANONICAL_NAN),
    ):
        if found not in known:
            raise UnsupportedError(message(f"no table has {what}", expected=list(map(str, known)), found=found))


def _check(
    code_format: str, scales: Tensor, dtype: torch.dtype, zero_points: Tensor | None, global_scale: Tensor | None
) -> None:
    check_table(code_format, scales.dtype, dtype)
    if scales.dim() != 2:
        raise ConversionError(message("scales are a matrix, one for each block", found=list(scales.shape)))
    if zero_points is not None and (code_format != "int4" or zero_points.shape != scales.shape):
        raise ConversionError(
            message(
                "zero points do not fit",
                expected=f"int4, one for each of {list(scales.shape)} scales",
                found=f"{code_format}, {list(zero_points.shape)}",
            )
        )
    if global_scale is not None and global_scale.numel() != 1:
        raise ConversionError(
            message("a global scale is one number", where="global_scale", found=list(global_scale.shape))
        )


@cache
def byte_scale_table(
    code_format: str, scale: torch.dtype, dtype: torch.dtype, like_upstream: bool, device: torch.device
) -> Tensor:
    """The table ``[256, codes]`` of all scales of one byte, made once for each device; read only."""
    scales = byte_scale_values(scale, like_upstream, device)
    return _synchronized(scale_table(code_format, scales, dtype, like_upstream=like_upstream))


@cache
def byte_scale_values(scale: torch.dtype, like_upstream: bool, device: torch.device) -> Tensor:
    """The numbers that the 256 bytes of a scale stand for, float32; made once for each device; read only."""
    values = CODE_VALUES["e4m3"] if scale == torch.float8_e4m3fn else E8M0_VALUES
    if scale == torch.uint8 and like_upstream:
        values = (*E8M0_VALUES[:255], inf)
    # All of them are float32 numbers, the least a subnormal one.
    return _synchronized(torch.tensor(values, dtype=torch.float32, device=device))


@cache
def _code_values(code_format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _synchronized(torch.tensor(CODE_VALUES[code_format], dtype=dtype, device=device))


def _exact_dtype(scales: torch.dtype, has_global: bool) -> torch.dtype:
    """A dtype that holds the products of codes and scales.

    A product with at most 8 or 11 significant bits of a scale has at most 15, and is a multiple of 2**-149: every step
    is exact in float32, or as infinite as the result.
    """
    return torch.float32 if scales.itemsize == 2 and not has_global else torch.float64


def prepare_scale_table(code_format: str, scales: torch.dtype, has_global: bool, device: torch.device) -> None:
    """Make the constants of ``scale_table``, so that it does not wait for the device.

    Args:
        scales: the dtype of the scales that it will be given.
        has_global: whether it will be given global scales.
    """
    _code_values(code_format, _exact_dtype(scales, has_global), device)


def _synchronized(tensor: Tensor) -> Tensor:
    """A tensor that every stream may read from now on, because it has been made."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def scale_table(
    code_format: str,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    zero_points: Tensor | None = None,
    global_scales: Tensor | None = None,
    divide: bool = False,
    like_upstream: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A row of numbers for each scale, ``[T, codes]`` of ``dtype``; see ``code_table`` for how they are rounded.

    Args:
        scales: ``[T]``, floating.
        zero_points: integers ``[T]``, of int4.
        global_scales: float32, one number or ``[T]``.
        out: where the rows are written, contiguous; a new tensor if not given.

    Allocates up to 16 MiB of scratch on a GPU, 2 MiB elsewhere. Waits for the device once for each format, unless
    ``prepare_scale_table`` has.
    """
    exact = _exact_dtype(scales.dtype, global_scales is not None)
    numbers = _code_values(code_format, exact, scales.device)
    if out is None:
        out = torch.empty(len(scales), len(numbers), dtype=dtype, device=scales.device)
    common = None if global_scales is None else global_scales.reshape(-1, 1).expand(len(scales), 1)
    rows = _ENTRIES["cuda" if scales.is_cuda else "cpu"] // len(numbers)
    for at in range(0, len(scales), rows):
        some = slice(at, at + rows)
        of_rows = numbers
        if zero_points is not None:
            of_rows = numbers - (zero_points[some, None].to(exact) - _INT4_ZERO)
        products = of_rows * scales[some, None].to(exact)
        if common is not None:
            shared = common[some].to(exact)
            products = products / shared if divide else products * shared
        _round(products, out[some], like_upstream)
    return out


def _round(exact: Tensor, out: Tensor, like_upstream: bool) -> None:
    """Round numbers once, to nearest even; float32 is already no wider than needed, or like upstream's."""
    nearest = exact.to(torch.float32)
    if exact.dtype == torch.float64 and out.dtype != torch.float32 and not like_upstream:
        _to_odd(nearest, exact)
    out.copy_(nearest)
    out.view(_INTEGERS[out.dtype]).masked_fill_(nearest.isnan(), CANONICAL_NAN[out.dtype])


def _to_odd(nearest: Tensor, exact: Tensor) -> None:
    """Turn numbers rounded to nearest into the ones rounded to odd.

    Conversions of float64 to 16 bits go through float32. An inexact one that is odd there is never halfway between two
    numbers of 16 bits, so that rounding it again gives what rounding the exact one would have.
    """
    bits = nearest.view(torch.int32)
    wide = nearest.to(torch.float64)
    # Of the two neighbours of an exact number one is odd. Beyond the largest number that is the largest one.
    beyond = wide.abs() > exact.abs()
    short = wide.abs() < exact.abs()
    even = 1 - (bits & 1)
    bits += (short.to(torch.int32) - beyond.to(torch.int32)) * even
