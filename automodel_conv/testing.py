"""Helpers for tests of what moves tensors: compare bytes, guard outputs, tell elements apart.

The assertions raise ``AssertionError`` themselves, so they also work under ``python -O``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

POISON = 0xA5
"""The byte that fills memory nobody has written yet."""

_GUARD = 0x5C
_GUARD_BYTES = 256


def assert_bytes_equal(actual: Tensor, expected: Tensor, *, strides: bool = False) -> None:
    """Both tensors have the same shape, dtype and bytes: a NaN equals itself, 0.0 is not -0.0.

    Args:
        strides: also compare strides.

    Raises:
        AssertionError: what differs; for bytes the first coordinate, both values, and how many.

    >>> assert_bytes_equal(torch.ones(2, 3), torch.ones(2, 3))
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"dtype {actual.dtype}, expected {expected.dtype}")
    if strides and actual.stride() != expected.stride():
        raise AssertionError(f"strides {actual.stride()}, expected {expected.stride()}")
    found, wanted = _bytes(actual), _bytes(expected)
    if torch.equal(found, wanted):
        return
    differs = (found != wanted).any(dim=1)
    first = int(differs.to(torch.uint8).argmax())
    raise AssertionError(
        f"{int(differs.sum())} of {actual.numel()} elements differ; "
        f"first at {_at(first, actual.shape)}: "
        f"{_show(actual, found, first)}, expected {_show(expected, wanted, first)}"
    )


def _bytes(tensor: Tensor) -> Tensor:
    """``[elements, bytes of an element]`` on the CPU; copies where the tensor is not contiguous."""
    plain = tensor.detach().cpu().contiguous()
    # A contiguous tensor of one element or none may have any strides, which view(uint8) refuses.
    plain = plain.as_strided((plain.numel(),), (1,))
    return plain.view(torch.uint8).reshape(-1, tensor.element_size())


def _at(index: int, shape: Sequence[int]) -> list[int]:
    coordinate = []
    for size in reversed(shape):
        index, digit = divmod(index, size)
        coordinate.append(digit)
    return coordinate[::-1]


def _show(tensor: Tensor, raw: Tensor, index: int) -> str:
    bits = "0x" + bytes(raw[index].tolist()[::-1]).hex()
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        value = tensor.detach().cpu().contiguous().reshape(-1)[index].item()
        return f"{value!r} ({bits})"
    return bits


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor, every byte ``POISON``; ``assert_written`` finds what stays so."""
    return guarded(shape, dtype).tensor


def assert_written(tensor: Tensor) -> None:
    """No element of a poisoned tensor still has all its bytes poisoned.

    Only for data that cannot hold the poison itself, such as ``address_valued`` of less than
    ``0xA5A5`` elements, or ``0xA5`` where elements have one byte.

    Raises:
        AssertionError: names the first such element, and how many there are.
    """
    untouched = (_bytes(tensor) == POISON).all(dim=1)
    if untouched.any():
        first = _at(int(untouched.to(torch.uint8).argmax()), tensor.shape)
        count = int(untouched.sum())
        raise AssertionError(f"{count} of {tensor.numel()} elements were never written, first {first}")


class Guarded(NamedTuple):
    """A poisoned tensor, and a check that nobody wrote around it."""

    tensor: Tensor
    check: Callable[[], None]


def guarded(shape: Sequence[int], dtype: torch.dtype, *, strides: Sequence[int] | None = None) -> Guarded:
    """A poisoned CPU tensor between guard bands; ``check()`` raises AssertionError if a band, or a
    gap between strided elements, was touched.

    Args:
        strides: in elements; contiguous if not given. No two elements may share memory.
    """
    itemsize = dtype.itemsize
    span = prod(shape)
    if strides is not None and span:
        span = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    nbytes = span * itemsize
    memory = torch.full((nbytes + 2 * _GUARD_BYTES,), _GUARD, dtype=torch.uint8)
    inner = memory[_GUARD_BYTES : _GUARD_BYTES + nbytes].view(dtype)
    start = _GUARD_BYTES // itemsize
    tensor = inner.view(tuple(shape)) if strides is None else inner.as_strided(shape, strides, start)
    mask = torch.ones(memory.shape, dtype=torch.bool)
    places = torch.arange(span).as_strided(tensor.shape, tensor.stride()).reshape(-1, 1) * itemsize
    mask[_GUARD_BYTES + (places + torch.arange(itemsize)).reshape(-1)] = False
    memory[~mask] = POISON

    def check() -> None:
        touched = (memory != _GUARD) & mask
        if touched.any():
            at = int(touched.to(torch.uint8).argmax()) - _GUARD_BYTES
            raise AssertionError(
                f"{int(touched.sum())} guard bytes were overwritten, first at byte {at} from the "
                f"start of a buffer of {nbytes} bytes"
            )

    return Guarded(tensor, check)


def address_valued(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> Tensor:
    """A contiguous tensor of which element i holds the bits of the integer ``start + i``.

    Swapped, doubled or misplaced elements then cannot look right by chance. Integers wrap at the
    width of the dtype, at most 8 bytes; bool holds the lowest bit. Floats are bit patterns, NaN and
    subnormals among them, so compare bytes.
    """
    numel = prod(shape)
    numbers = torch.arange(start, start + numel, dtype=torch.int64)
    if dtype == torch.bool:
        return (numbers & 1).to(torch.bool).reshape(tuple(shape))
    raw = numbers.view(torch.uint8).reshape(numel, 8)[:, : dtype.itemsize]
    return raw.contiguous().reshape(-1).view(dtype).reshape(tuple(shape))
