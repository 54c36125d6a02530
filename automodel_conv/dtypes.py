"""The dtypes of the safetensors format, as the strings in its headers.

Plans use these codes for dtypes, so that they consist of integers and strings. ``torch_dtype`` converts them.
Source: safetensors 0.8.0, ``Dtype`` in ``tensor.rs`` and ``_TYPES`` in ``safetensors/torch.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of each dtype."""

_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

# Older versions of torch lack the newest dtypes. A tensor of such a dtype is reported when it is needed.
_TO_TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
_TO_CODE: dict[torch.dtype, str] = {dtype: code for code, dtype in _TO_TORCH.items()}

FLOATING: frozenset[str] = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes that ``dtype=`` may cast. FP8 and narrower ones are codes of quantized tensors, which are never cast."""

DECODED: frozenset[str] = frozenset({"F16", "BF16", "F32"})
"""Dtypes to which codes are decoded."""


def torch_dtype(code: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors code, or None if this version of torch has none (F6, or newer dtypes)."""
    return _TO_TORCH.get(code)


def dtype_code(dtype: torch.dtype) -> str | None:
    """Return the safetensors code of a torch dtype, or None if the format has none (complex128, quantized)."""
    return _TO_CODE.get(dtype)


def promoted(codes: Iterable[str]) -> str:
    """Return the dtype of stacked or concatenated tensors of these dtypes, as torch promotes them."""
    first, *others = dict.fromkeys(codes)
    return reduce(lambda a, b: _TO_CODE[torch.promote_types(_TO_TORCH[a], _TO_TORCH[b])], others, first)


def nbytes(code: str, numel: int) -> int:
    """Return the bytes of ``numel`` elements as torch counts them (an F4 pair is one element of one byte)."""
    return numel * max(8, BITS[code]) // 8 if code == "F4" else numel * BITS[code] // 8


def itemsize(code: str) -> int:
    """Return the bytes of one element as torch counts them, for a dtype that torch has."""
    return nbytes(code, 1)
