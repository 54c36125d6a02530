"""The dtypes of the safetensors format, as the strings its headers use.

Plans speak of dtypes by these codes, so they stay integers and strings; ``torch_dtype`` is the way to torch.
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

# Older torch lacks the newest dtypes; what is absent is reported where a tensor of it is met.
_TO_TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
_TO_CODE: dict[torch.dtype, str] = {dtype: code for code, dtype in _TO_TORCH.items()}

FLOATING: frozenset[str] = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes that ``dtype=`` may cast; fp8 and narrower hold codes of a quantized tensor and are never cast."""

DECODED: frozenset[str] = frozenset({"F16", "BF16", "F32"})
"""Dtypes that codes are decoded to."""


def torch_dtype(code: str) -> torch.dtype | None:
    """The torch dtype of a safetensors code; None where this torch has none (F6, or an older torch)."""
    return _TO_TORCH.get(code)


def dtype_code(dtype: torch.dtype) -> str | None:
    """The safetensors code of a torch dtype; None where the format has none (complex128, quantized)."""
    return _TO_CODE.get(dtype)


def promoted(codes: Iterable[str]) -> str:
    """The dtype of tensors of these dtypes stacked or concatenated, as torch promotes them."""
    first, *others = dict.fromkeys(codes)
    return reduce(lambda a, b: _TO_CODE[torch.promote_types(_TO_TORCH[a], _TO_TORCH[b])], others, first)


def nbytes(code: str, numel: int) -> int:
    """Bytes of ``numel`` elements as torch counts them (an F4 pair is one element of one byte)."""
    return numel * max(8, BITS[code]) // 8 if code == "F4" else numel * BITS[code] // 8


def itemsize(code: str) -> int:
    """Bytes of one element as torch counts them; only for dtypes that torch has."""
    return nbytes(code, 1)
