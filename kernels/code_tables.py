"""Code tables: the value of each code of a quantized matrix under each of its scales, rounded once.

``table[r, code]`` is the value of ``code`` under scale ``r``, so ``dequantize`` only looks values up. All values are
computed here, so every device writes the same bytes.

Sources of the formats: e4m3 (bias 7, no infinity, NaN at 0x7f and 0xff) and e5m2 (bias 15), OCP 8-bit Floating Point
Specification 1.0; e2m1 and the scale e8m0 (``2 ** (byte - 127)``, 255 is NaN), OCP Microscaling Formats Specification
1.0; int4, ``code - 8``, ``compressed_tensors`` (``pack_quantized``); int8, two's complement.
"""

from __future__ import annotations

from functools import cache
from math import inf, ldexp, nan
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, message

# Entries of a table that are computed at once. On a CPU their float64 intermediates stay in the second-level cache. On
# a GPU they are enough work for little memory.
_ENTRIES = {"cpu": 1 << 15, "cuda": 1 << 18}
_INT4_ZERO = 8

CANONICAL_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
"""The bits of every NaN in a table, by dtype. Conversions do not specify which NaN a NaN becomes."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_BYTE_SCALES = (torch.float8_e8m0fnu, torch.uint8, torch.float8_e4m3fn)
_WIDE_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class CodeTable(NamedTuple):
    """A lookup table, and the row of it for each block: the arguments of ``dequantize`` besides the codes."""

    table: Tensor  # [T, 2**bits], a row for each distinct scale
    table_rows: Tensor  # uint8 or int32 [SR, SC], the row for each block


def _float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """Return the values of all codes of a small float with sign bit 0, as if none were an infinity or NaN.

    A code is the exponent bits, then the mantissa bits.
    """
    values = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        leading = (exponent > 0) << mantissa_bits
        values.append(ldexp(leading + mantissa, max(exponent, 1) - bias - mantissa_bits))
    return values


def _signed(values: list[float]) -> tuple[float, ...]:
    """Append the negative values; their codes have the sign bit set."""
    return (*values, *(-value for value in values))


CODE_VALUES: dict[str, tuple[float, ...]] = {
    "e4m3": _signed([*_float_values(4, 3, 7)[:127], nan]),
    "e5m2": _signed([*_float_values(5, 2, 15)[:124], inf, nan, nan, nan]),
    "e2m1": _signed(_float_values(2, 1, 1)),
    "int4": tuple(float(code - _INT4_ZERO) for code in range(16)),
    "int8": tuple(float(code - (code & 128) * 2) for code in range(256)),
}
"""The value of each code without a scale, by format."""

E8M0_VALUES: tuple[float, ...] = (*(ldexp(1, byte - 127) for byte in range(255)), nan)
"""The value of each byte of an e8m0 scale."""


def bits_of(code_format: str) -> int:
    """Return the bits per code of a format."""
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
    """Return the lookup table of a quantized matrix, and the row of it for each block.

    An entry is the exact product ``value of the code * scale``, rounded once to ``dtype``, to nearest even. A product
    beyond the largest finite value becomes infinity. One below the smallest becomes a zero that keeps its sign. A NaN
    becomes the ``CANONICAL_NAN``.

    Args:
        code_format: ``"e4m3"``, ``"e5m2"``, ``"e2m1"``, ``"int4"`` or ``"int8"``.
        scales: scales ``[SR, SC]`` as stored, one for each block: float32, bfloat16 or float16; float8_e8m0fnu, or
            uint8 for the same bytes; float8_e4m3fn (NVFP4).
        dtype: dtype of the values: float32, bfloat16 or float16.
        zero_points: for int4 only, integers ``[SR, SC]``: the codes with value zero, 0 to 15, as nibbles are stored. 8
            if not given.
        global_scale: one float32 that multiplies every scale (``weight_scale_2`` of ``modelopt``).
        divide: divide by ``global_scale`` instead (``weight_global_scale`` of ``compressed_tensors``). Only this
            quotient is rounded to float64 before it is rounded to ``dtype``.
        like_upstream: round the exact product to float32 and then to ``dtype``, as ``Fp8Dequantize`` of transformers
            does, except for the bits of NaN. As in transformers, a uint8 scale of 255 is infinity.

    Returns:
        For scales of one byte without zero points: a table of 256 rows, and the bytes of the scales as table rows
        (uint8). The table does not depend on the scales. Without ``global_scale`` it is computed once for each device
        and shared, so it must not be written.

        Otherwise: a row of ``2**bits`` entries for each scale, and int32 table rows. With wide scales and small blocks
        of e4m3 such a table is larger than the matrix that it decodes.

    Raises:
        ConversionError: the scales are not a matrix, the zero points have another shape or format, or the global scale
            is more than one value.
        UnsupportedError: another format, dtype, or dtype of the scales.

    Example:
        >>> scales = torch.tensor([[0.5, 2.0]])
        >>> table, table_rows = code_table("e2m1", scales, torch.float32)
        >>> table.shape, table_rows.tolist()
        (torch.Size([2, 16]), [[0, 1]])
        >>> table[1, :8].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
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
    """Check that tables support a format of codes, a dtype of scales and a dtype of values.

    Raises:
        UnsupportedError: one of them is not supported.
    """
    for what, value, supported in (
        ("this format of codes", code_format, CODE_VALUES),
        ("scales of this dtype", scales, (*_BYTE_SCALES, *_WIDE_SCALES)),
        ("values of this dtype", dtype, CANONICAL_NAN),
    ):
        if value not in supported:
            raise UnsupportedError(
                message(f"code tables do not support {what}", expected=list(map(str, supported)), found=value)
            )


def _check(
    code_format: str, scales: Tensor, dtype: torch.dtype, zero_points: Tensor | None, global_scale: Tensor | None
) -> None:
    check_table(code_format, scales.dtype, dtype)
    if scales.dim() != 2:
        raise ConversionError(
            message("scales must be a matrix, with one scale for each block", found=list(scales.shape))
        )
    if zero_points is not None and (code_format != "int4" or zero_points.shape != scales.shape):
        raise ConversionError(
            message(
                "zero points do not match the scales",
                expected=f"int4, one for each of {list(scales.shape)} scales",
                found=f"{code_format}, {list(zero_points.shape)}",
            )
        )
    if global_scale is not None and global_scale.numel() != 1:
        raise ConversionError(
            message("a global scale must be one value", where="global_scale", found=list(global_scale.shape))
        )


@cache
def byte_scale_table(
    code_format: str, scale: torch.dtype, dtype: torch.dtype, like_upstream: bool, device: torch.device
) -> Tensor:
    """Return the table ``[256, codes]`` of all scales of one byte; computed once for each device, read-only."""
    scales = byte_scale_values(scale, like_upstream, device)
    return _synchronized(scale_table(code_format, scales, dtype, like_upstream=like_upstream))


@cache
def byte_scale_values(scale: torch.dtype, like_upstream: bool, device: torch.device) -> Tensor:
    """Return the values of the 256 bytes of a scale, float32; computed once for each device, read-only."""
    values = CODE_VALUES["e4m3"] if scale == torch.float8_e4m3fn else E8M0_VALUES
    if scale == torch.uint8 and like_upstream:
        values = (*E8M0_VALUES[:255], inf)
    # float32 represents all of them exactly, the smallest as a subnormal.
    return _synchronized(torch.tensor(values, dtype=torch.float32, device=device))


@cache
def _code_values(code_format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _synchronized(torch.tensor(CODE_VALUES[code_format], dtype=dtype, device=device))


def _exact_dtype(scales: torch.dtype, has_global: bool) -> torch.dtype:
    """Return a dtype that holds the products of codes and scales.

    A scale of 16 bits has at most 8 or 11 significant bits, so a product has at most 18, and is a multiple of 2**-149.
    Every step is exact in float32, or infinite if the result is.
    """
    return torch.float32 if scales.itemsize == 2 and not has_global else torch.float64


def prepare_scale_table(code_format: str, scales: torch.dtype, has_global: bool, device: torch.device) -> None:
    """Compute the constants of ``scale_table`` in advance, so that it does not wait for the device.

    Args:
        code_format: format of the codes.
        scales: dtype of the scales that it will be called with.
        has_global: whether it will be called with global scales.
        device: device of the scales.
    """
    _code_values(code_format, _exact_dtype(scales, has_global), device)


def _synchronized(tensor: Tensor) -> Tensor:
    """Wait until a tensor is computed, so that every stream may read it."""
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
    """Return a row of values for each scale, ``[T, codes]`` of ``dtype``, rounded as ``code_table`` describes.

    Args:
        code_format: see ``code_table``, as for ``divide`` and ``like_upstream``.
        scales: floating scales ``[T]``.
        dtype: dtype of the values.
        zero_points: for int4 only, integers ``[T]``.
        global_scales: float32, one value or ``[T]``.
        out: contiguous tensor to write to; a new one if not given.

    Allocates up to 16 MiB of scratch on a GPU, 2 MiB elsewhere. Waits for the device once for each format, unless
    ``prepare_scale_table`` has already.
    """
    exact = _exact_dtype(scales.dtype, global_scales is not None)
    values = _code_values(code_format, exact, scales.device)
    if out is None:
        out = torch.empty(len(scales), len(values), dtype=dtype, device=scales.device)
    factors = None if global_scales is None else global_scales.reshape(-1, 1).expand(len(scales), 1)
    step = _ENTRIES["cuda" if scales.is_cuda else "cpu"] // len(values)
    for start in range(0, len(scales), step):
        rows = slice(start, start + step)
        shifted = values
        if zero_points is not None:
            shifted = values - (zero_points[rows, None].to(exact) - _INT4_ZERO)
        products = shifted * scales[rows, None].to(exact)
        if factors is not None:
            factor = factors[rows].to(exact)
            products = products / factor if divide else products * factor
        _round(products, out[rows], like_upstream)
    return out


def rounded_quotients(scales: Tensor, divisors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``scales / divisors`` in float32, of values that are rounded to ``dtype`` first.

    transformers casts all parts of a weight to the dtype of the parameter before it computes with them.
    Source: transformers 5.24.0, ``_materialize_copy`` and ``Inkling2LoopDequantizeExperts`` in
    ``core_model_loading.py``.
    """
    return scales.to(dtype).to(torch.float32) / divisors.to(dtype).to(torch.float32)


def _round(exact: Tensor, out: Tensor, like_upstream: bool) -> None:
    """Round values to ``out``, to nearest even: once, or first to float32 if ``like_upstream``.

    float32 products are exact, so they need no extra step.
    """
    nearest = exact.to(torch.float32)
    if exact.dtype == torch.float64 and out.dtype != torch.float32 and not like_upstream:
        _to_odd(nearest, exact)
    out.copy_(nearest)
    out.view(_INTEGERS[out.dtype]).masked_fill_(nearest.isnan(), CANONICAL_NAN[out.dtype])


def _to_odd(nearest: Tensor, exact: Tensor) -> None:
    """Change values that were rounded to nearest into values rounded to odd, in place.

    A conversion of float64 to 16 bits rounds to float32 first. An inexact float32 value that is odd is never halfway
    between two values of 16 bits, so rounding it again yields the same as rounding the exact value.
    """
    bits = nearest.view(torch.int32)
    wide = nearest.to(torch.float64)
    # One of the two float32 values around an exact value is odd. Around a value beyond the largest, it is the largest.
    beyond = wide.abs() > exact.abs()
    short = wide.abs() < exact.abs()
    even = 1 - (bits & 1)
    bits += (short.to(torch.int32) - beyond.to(torch.int32)) * even
