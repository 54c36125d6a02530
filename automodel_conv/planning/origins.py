"""Origins of elements: a source, a constant, or code that computes them; and what casts and views make of them."""

from __future__ import annotations

from math import copysign
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.casts import check_cast


class Read(NamedTuple):
    """Elements of a source."""

    row: int
    """Row of the source."""
    stored: torch.dtype
    """Dtype that its bytes are read as."""
    value: torch.dtype
    """Dtype that its elements are cast to."""


class Number(NamedTuple):
    """A constant."""

    number: float
    dtype: torch.dtype
    sign: float = 1
    """1 or -1: zeros of both signs are equal numbers, and different constants."""

    @property
    def tensor(self) -> Tensor:
        """The constant as a tensor of one element."""
        return torch.tensor([self.number], dtype=self.dtype)


class Unknown(NamedTuple):
    """Values that only the loading code itself can make."""

    reason: str
    rows: frozenset[int] = frozenset()
    """Rows of the sources that they may depend on."""


Origin = Read | Number | Unknown


def cast(origin: Origin, dtype: torch.dtype) -> Origin:
    """Return the origin of elements after a cast."""
    if isinstance(origin, Unknown):
        return origin
    if isinstance(origin, Number):
        return constant(origin.tensor.to(dtype))
    row, stored, value = origin
    if value == dtype:
        return origin
    if not _is_exact(stored, value):
        return Unknown(f"casts twice: {stored}, {value}, {dtype}", frozenset([row]))
    if stored == dtype or _is_castable(stored, dtype):
        return Read(row, stored, dtype)
    return Unknown(f"casts {stored} to {dtype}", frozenset([row]))


def reinterpreted(origin: Origin, dtype: torch.dtype) -> Origin:
    """Return the origin of elements whose bytes are viewed as another dtype of the same size."""
    if isinstance(origin, Unknown):
        return origin
    if isinstance(origin, Number):
        return viewed_constant(origin.tensor, dtype)
    row, stored, value = origin
    if value != stored:
        return Unknown(f"views {value}, cast from {stored}, as {dtype}", frozenset([row]))
    return Read(row, dtype, dtype)


def constant(value: Tensor) -> Number | Unknown:
    """Return the origin of elements that equal the only element of a tensor."""
    if value.is_complex():
        return Unknown("makes complex numbers")
    return Number(value.item(), value.dtype, copysign(1, value.item()))


def viewed_constant(parts: Tensor, dtype: torch.dtype) -> Number | Unknown:
    """Return the origin of elements whose bytes are those of constants, viewed as another dtype."""
    value = constant(parts.view(dtype))
    if isinstance(value, Number) and value.number != value.number:  # a Python number does not keep the bits of a NaN
        return Unknown("views a constant as NaN")
    return value


def rows_of(origin: Origin) -> frozenset[int]:
    """Return the rows of the sources that elements with an origin come from."""
    if isinstance(origin, Read):
        return frozenset([origin.row])
    return origin.rows if isinstance(origin, Unknown) else frozenset()


def _is_exact(dtype: torch.dtype, wider: torch.dtype) -> bool:
    if dtype == wider:
        return True
    if dtype.is_complex or wider.is_complex or dtype.is_floating_point != wider.is_floating_point:
        return False
    if dtype.is_floating_point:
        return dtype.itemsize < wider.itemsize and torch.promote_types(dtype, wider) == wider
    (least, most), (lower, upper) = _range(dtype), _range(wider)
    return lower <= least and most <= upper


def _range(dtype: torch.dtype) -> tuple[int, int]:
    """Return the least and the greatest integer of a dtype."""
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _is_castable(dtype: torch.dtype, to: torch.dtype) -> bool:
    codes = dtype_code(dtype), dtype_code(to)
    try:
        check_cast("", codes[0] or "", "", codes[1] or "")
    except UnsupportedError:
        return False
    return None not in codes
