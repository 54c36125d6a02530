"""Helpers for tests of code that moves tensors: compare bytes, guard outputs, distinguish elements.

The assertions raise ``AssertionError`` themselves, so they also work under ``python -O``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

POISON = 0xA5
"""The byte that fills memory before a test writes it."""

_GUARD = 0x5C
_GUARD_BYTES = 256


def assert_bytes_equal(actual: Tensor, expected: Tensor, *, strides: bool = False) -> None:
    """Assert that two tensors have the same shape, dtype and bytes: a NaN equals itself, 0.0 is not -0.0.

    Args:
        actual: the tensor to check, of any device and strides.
        expected: the tensor that it should equal.
        strides: also compare strides.

    Raises:
        AssertionError: the tensors differ. For bytes, the text has the first coordinate, both values,
            and the number of elements that differ.

    Example:
        >>> assert_bytes_equal(torch.ones(2, 3), torch.ones(2, 3))
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"dtype {actual.dtype}, expected {expected.dtype}")
    if strides and actual.stride() != expected.stride():
        raise AssertionError(f"strides {actual.stride()}, expected {expected.stride()}")
    actual_bytes, expected_bytes = _bytes(actual), _bytes(expected)
    if torch.equal(actual_bytes, expected_bytes):
        return
    differs = (actual_bytes != expected_bytes).any(dim=1)
    first = int(differs.to(torch.uint8).argmax())
    raise AssertionError(
        f"{int(differs.sum())} of {actual.numel()} elements differ; "
        f"first at {_at(first, actual.shape)}: "
        f"{_show(actual, actual_bytes, first)}, expected {_show(expected, expected_bytes, first)}"
    )


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes as ``[elements, bytes per element]`` on the CPU, copied if not contiguous."""
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
    """Return a contiguous CPU tensor in which every byte is ``POISON``, for ``assert_written``.

    Example:
        >>> poisoned([2], torch.uint8)
        tensor([165, 165], dtype=torch.uint8)
    """
    return guarded(shape, dtype).tensor


def assert_written(tensor: Tensor) -> None:
    """Assert that no element of a poisoned tensor still has all its bytes poisoned.

    The data must not contain the poison itself. ``address_valued`` does not if it has fewer than
    ``0xA5A5`` elements, or ``0xA5`` elements of one byte.

    Raises:
        AssertionError: an element is poisoned. The text has the first such element and their number.

    Example:
        >>> tensor = poisoned([2, 3], torch.float32)
        >>> assert_written(tensor.fill_(0.5))
    """
    untouched = (_bytes(tensor) == POISON).all(dim=1)
    if untouched.any():
        first = _at(int(untouched.to(torch.uint8).argmax()), tensor.shape)
        count = int(untouched.sum())
        raise AssertionError(f"{count} of {tensor.numel()} elements were never written, first {first}")


class Guarded(NamedTuple):
    """A poisoned tensor, and a check that the memory around it was not written."""

    tensor: Tensor
    """The tensor to write."""
    check: Callable[[], None]
    """Raises AssertionError if memory around the elements of the tensor was written."""


def guarded(shape: Sequence[int], dtype: torch.dtype, *, strides: Sequence[int] | None = None) -> Guarded:
    """Return a poisoned CPU tensor between guard bands.

    Its ``check()`` raises AssertionError if a band, or a gap between strided elements, was written.

    Args:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        strides: strides in elements. No two elements may share memory. None: contiguous.

    Example:
        >>> output = guarded([2, 3], torch.float32, strides=[4, 1])
        >>> _ = output.tensor.fill_(1.0)
        >>> output.check()
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
            first = int(touched.to(torch.uint8).argmax()) - _GUARD_BYTES
            raise AssertionError(
                f"{int(touched.sum())} guard bytes were overwritten, first at byte {first} from the "
                f"start of a buffer of {nbytes} bytes"
            )

    return Guarded(tensor, check)


def address_valued(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return a contiguous tensor in which element i has the bits of the integer ``start + i``.

    Swapped, duplicated or misplaced elements then cannot look right by chance. Integers wrap at the
    width of the dtype, at most 8 bytes; bool has the lowest bit. Floats are bit patterns, which
    include NaN and subnormals, so compare bytes.

    Example:
        >>> address_valued([2, 3], torch.int32)
        tensor([[0, 1, 2],
                [3, 4, 5]], dtype=torch.int32)
    """
    numel = prod(shape)
    integers = torch.arange(start, start + numel, dtype=torch.int64)
    if dtype == torch.bool:
        return (integers & 1).to(torch.bool).reshape(tuple(shape))
    raw = integers.view(torch.uint8).reshape(numel, 8)[:, : dtype.itemsize]
    return raw.contiguous().reshape(-1).view(dtype).reshape(tuple(shape))
