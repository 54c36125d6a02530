"""Where matrices lie: absolute addresses, so that slices of one raw buffer and loose tensors are the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, countOf
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message

MAX_ACCESS_BYTES = 16
"""Bytes of the widest access of a GPU; more alignment than that changes nothing."""


_Integers = TypeVar("_Integers", int, np.ndarray)


_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class Matrices(NamedTuple):
    """Equal matrices ``[rows, columns]`` at many places of one device; within a row, elements are adjacent.

    They keep nothing alive: whoever makes them holds the memory until the work queued on it is done.
    """

    addresses: np.ndarray  # int64 [n], in bytes
    dtype: torch.dtype
    rows: int
    columns: int
    row_stride: int  # in elements; 0 where there is only one row
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        return len(self.addresses) * self.rows * self.columns * self.dtype.itemsize

    @property
    def is_run(self) -> bool:
        """True if each matrix is one run of elements without gaps."""
        return self.rows <= 1 or self.row_stride == self.columns

    @property
    def steps_bytes(self) -> int:
        """A number with the alignment of a row's length and of the step between rows."""
        return (self.columns | self.row_stride) * self.dtype.itemsize


Operand = Sequence[Tensor] | Tensor | Matrices
"""Matrices as the verbs take them: a list of tensors ``[R, C]``, one tensor ``[..., R, C]`` of them in the order of its
leading dimensions, whatever their strides, or by addresses."""


def matrices_at(
    base: Tensor, offsets_bytes: Sequence[int] | np.ndarray, shape: tuple[int, int], row_stride: int, dtype: torch.dtype
) -> Matrices:
    """Matrices inside the memory of ``base``, by their offsets from its first element.

    Args:
        base: contiguous, any dtype; typically the raw bytes of a file.
        offsets_bytes: of any alignment.
        shape, row_stride: in elements of ``dtype``.

    Raises:
        ConversionError: ``base`` is not contiguous, or a matrix leaves it.
    """
    offsets = np.asarray(offsets_bytes, np.int64).reshape(-1)
    rows, columns = shape
    span = ((rows - 1) * row_stride + columns) * dtype.itemsize if rows and columns else 0
    if not base.is_contiguous():
        raise ConversionError(
            message("matrices lie at offsets of a contiguous tensor", found=f"strides {base.stride()}")
        )
    if row_stride < 0 or (len(offsets) and (offsets.min() < 0 or offsets.max() + span > base.nbytes)):
        raise ConversionError(
            message(
                "a matrix leaves the tensor it is said to lie in",
                expected=f"offsets from 0 to {base.nbytes - span}",
                found=f"offsets from {offsets.min(initial=0)} to {offsets.max(initial=0)}, row stride {row_stride}",
            )
        )
    return at_addresses(base.data_ptr() + offsets, shape, row_stride, dtype, base.device)


def at_addresses(
    addresses: np.ndarray, shape: tuple[int, int], row_stride: int, dtype: torch.dtype, device: torch.device
) -> Matrices:
    """Matrices by their absolute addresses, unchecked."""
    rows, columns = shape
    # A stride that is never taken must not spoil the alignment.
    return Matrices(addresses, dtype, rows, columns, row_stride if rows > 1 else 0, device)


def as_matrices(name: str, tensors: Operand) -> Matrices:
    """Tensors by their addresses; ``name`` says in errors which argument they are.

    A list costs about 0.4 us a tensor, for what is read and compared; a stack next to nothing.

    Raises:
        ConversionError: they are not all 2-D, of one shape, dtype, device and row stride, or the elements of a row are
            not adjacent.
    """
    if isinstance(tensors, Matrices):
        return tensors
    if isinstance(tensors, Tensor):
        return _of_stack(name, tensors)
    if not tensors:
        return Matrices(np.empty(0, np.int64), torch.uint8, 0, 0, 0, torch.device("cpu"))
    first = tensors[0]
    addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    if not _have_same_kind(tensors, addresses):
        _raise_mismatch(name, tensors)
    return at_addresses(addresses, (first.shape[0], first.shape[1]), first.stride(0), first.dtype, first.device)


def _of_stack(name: str, stack: Tensor) -> Matrices:
    if stack.dim() < 3 or (stack.stride(-1) != 1 and stack.shape[-1] > 1):
        raise ConversionError(
            message(
                f"{name} takes matrices with adjacent elements in a row",
                where=f"the tensor given for {name}",
                expected="3 dimensions or more, a stack of matrices, the last stride 1",
                found=f"shape {list(stack.shape)}, strides {stack.stride()}",
            )
        )
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(stack.shape[:-2], stack.stride()[:-2], strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    addresses = stack.data_ptr() + offsets * stack.itemsize
    return at_addresses(addresses, (stack.shape[-2], stack.shape[-1]), stack.stride(-2), stack.dtype, stack.device)


def _have_same_kind(tensors: Sequence[Tensor], addresses: np.ndarray) -> bool:
    """Whether all are matrices of one kind. Never yes where they are not; where it says no they may be, if odd ones.

    A layer has hundreds of tensors, and a call of Python for each costs more than what is read: so attribute by
    attribute, in loops that are not Python's and keep nothing.
    """
    first, count = tensors[0], len(tensors)
    shape, strides, index = first.shape, first.stride(), first.get_device()
    if len(shape) != 2 or (strides[1] != 1 and shape[1] > 1):
        return False
    if first.is_contiguous():
        # With the shape, that leaves no choice of strides but of those that are never taken.
        has_strides = all(map(Tensor.is_contiguous, tensors))
    else:
        has_strides = countOf(map(Tensor.stride, tensors), strides) == count
    return (
        has_strides
        and countOf(map(_SHAPE, tensors), shape) == count
        and countOf(map(_DTYPE, tensors), first.dtype) == count
        # torch has one kind of accelerator in a process, so an index is a device; and of those without an index, CPU
        # and meta, only the CPU has addresses. ``tensor.device`` would make an object for each tensor.
        and countOf(map(Tensor.get_device, tensors), index) == count
        and (index >= 0 or np.count_nonzero(addresses) == count)
    )


def _raise_mismatch(name: str, tensors: Sequence[Tensor]) -> None:
    """Find the first tensor that does not go with the others, if there is one; the errors of ``as_matrices``."""
    first = tensors[0]
    kind = (first.shape, first.dtype, first.device, first.stride())
    for index, tensor in enumerate(tensors):
        if tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            raise ConversionError(
                message(
                    f"{name} takes matrices with adjacent elements in a row",
                    where=f"{name}[{index}]",
                    expected="2 dimensions, the last stride 1",
                    found=f"shape {list(tensor.shape)}, strides {tensor.stride()}",
                )
            )
        found = (tensor.shape, tensor.dtype, tensor.device, tensor.stride())
        if found != kind:
            raise ConversionError(
                message(
                    f"{name} takes matrices of one kind in one call",
                    where=f"{name}[{index}]",
                    expected=f"{kind[1]} {list(kind[0])}, strides {kind[3]}, on {kind[2]}",
                    found=f"{found[1]} {list(found[0])}, strides {found[3]}, on {found[2]}",
                    do="one call for each kind",
                )
            )


def bytes_moved(*operands: Operand) -> int:
    """Bytes that a verb moves between these operands: each byte of each is read or written once."""
    return sum(as_matrices("bytes_moved", operand).nbytes for operand in operands)


def alignment(numbers: _Integers) -> _Integers:
    """The largest power of two, at most ``MAX_ACCESS_BYTES``, that divides each number.

    >>> alignment(np.array([0, 6, 24, 4096, 7])).tolist()
    [16, 2, 8, 16, 1]
    """
    capped = numbers | MAX_ACCESS_BYTES
    return capped & -capped
