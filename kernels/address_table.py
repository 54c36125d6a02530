"""Operands of the verbs as absolute addresses.

With addresses, slices of one raw buffer and separate tensors are treated the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, countOf
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message

MAX_ACCESS_BYTES = 16
"""Bytes of the widest access of a GPU; a larger alignment changes nothing."""


_Integers = TypeVar("_Integers", int, np.ndarray)


_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class Matrices(NamedTuple):
    """Matrices ``[rows, columns]`` of one dtype and row stride at many addresses of one device.

    Elements of a row are adjacent. ``Matrices`` do not keep the memory alive: the caller must hold it until the queued
    work is done.
    """

    addresses: np.ndarray  # int64 [n], bytes
    dtype: torch.dtype
    rows: int
    columns: int
    row_stride: int  # elements; 0 if there is only one row
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, without gaps between rows."""
        return len(self.addresses) * self.rows * self.columns * self.dtype.itemsize

    @property
    def is_run(self) -> bool:
        """True if each matrix is one run of contiguous elements."""
        return self.rows <= 1 or self.row_stride == self.columns

    @property
    def steps_bytes(self) -> int:
        """An integer with the alignment of both a row's length and the row stride, in bytes."""
        return (self.columns | self.row_stride) * self.dtype.itemsize


Operand = Sequence[Tensor] | Tensor | Matrices
"""Matrices as the verbs accept them: a list of tensors ``[R, C]``; a stack, which is one tensor ``[..., R, C]`` of
matrices in the order of its leading dimensions, at any strides; or ``Matrices``."""


def matrices_at(
    base: Tensor, offsets_bytes: Sequence[int] | np.ndarray, shape: tuple[int, int], row_stride: int, dtype: torch.dtype
) -> Matrices:
    """Return matrices inside the memory of ``base``, by their offsets from its first element.

    Args:
        base: contiguous tensor of any dtype; typically the raw bytes of a file.
        offsets_bytes: offset of each matrix, of any alignment.
        shape: rows and columns of a matrix.
        row_stride: step between rows, in elements of ``dtype``.
        dtype: dtype of the matrices.

    Raises:
        ConversionError: ``base`` is not contiguous, or a matrix extends beyond it.
    """
    offsets = np.asarray(offsets_bytes, np.int64).reshape(-1)
    rows, columns = shape
    span = ((rows - 1) * row_stride + columns) * dtype.itemsize if rows and columns else 0
    if not base.is_contiguous():
        raise ConversionError(message("offsets of matrices need a contiguous tensor", found=f"strides {base.stride()}"))
    if row_stride < 0 or (len(offsets) and (offsets.min() < 0 or offsets.max() + span > base.nbytes)):
        raise ConversionError(
            message(
                "a matrix extends beyond its tensor",
                expected=f"offsets from 0 to {base.nbytes - span}",
                found=f"offsets from {offsets.min(initial=0)} to {offsets.max(initial=0)}, row stride {row_stride}",
            )
        )
    return at_addresses(base.data_ptr() + offsets, shape, row_stride, dtype, base.device)


def at_addresses(
    addresses: np.ndarray, shape: tuple[int, int], row_stride: int, dtype: torch.dtype, device: torch.device
) -> Matrices:
    """Return matrices at absolute addresses, unchecked."""
    rows, columns = shape
    # The stride of a single row is never used, so it must not reduce the alignment.
    return Matrices(addresses, dtype, rows, columns, row_stride if rows > 1 else 0, device)


def as_matrices(name: str, tensors: Operand) -> Matrices:
    """Return the addresses of tensors, after a check that all are matrices of the same kind.

    A list costs about 0.4 us a tensor, to read and compare its attributes. A stack costs next to nothing.

    Args:
        name: name of the argument in errors.
        tensors: list or stack of tensors; ``Matrices`` are returned as they are.

    Raises:
        ConversionError: the tensors are not all 2-D, or differ in shape, dtype, device or row stride, or the elements
            of a row are not adjacent.
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
                f"{name} needs matrices with adjacent elements in each row",
                where=f"the tensor passed as {name}",
                expected="a stack of matrices: 3 or more dimensions, last stride 1",
                found=f"shape {list(stack.shape)}, strides {stack.stride()}",
            )
        )
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(stack.shape[:-2], stack.stride()[:-2], strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    addresses = stack.data_ptr() + offsets * stack.itemsize
    return at_addresses(addresses, (stack.shape[-2], stack.shape[-1]), stack.stride(-2), stack.dtype, stack.device)


def _have_same_kind(tensors: Sequence[Tensor], addresses: np.ndarray) -> bool:
    """Return whether all tensors are matrices of the same kind.

    True is certain; unusual tensors may yield False.

    A layer has hundreds of tensors, and a Python call for each costs more than reading its attributes. So this compares
    one attribute at a time, in loops that run in C and keep nothing.
    """
    first, count = tensors[0], len(tensors)
    shape, strides, index = first.shape, first.stride(), first.get_device()
    if len(shape) != 2 or (strides[1] != 1 and shape[1] > 1):
        return False
    if first.is_contiguous():
        # Together with the shape, that fixes all strides that are used.
        has_strides = all(map(Tensor.is_contiguous, tensors))
    else:
        has_strides = countOf(map(Tensor.stride, tensors), strides) == count
    return (
        has_strides
        and countOf(map(_SHAPE, tensors), shape) == count
        and countOf(map(_DTYPE, tensors), first.dtype) == count
        # torch has one kind of accelerator in a process, so an index identifies a device. Only the CPU and meta have no
        # index, and only the CPU has addresses. ``tensor.device`` would create an object for each tensor.
        and countOf(map(Tensor.get_device, tensors), index) == count
        and (index >= 0 or np.count_nonzero(addresses) == count)
    )


def _raise_mismatch(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise the error of ``as_matrices`` for the first tensor that differs from the others, if there is one."""
    first = tensors[0]
    kind = (first.shape, first.dtype, first.device, first.stride())
    for index, tensor in enumerate(tensors):
        if tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            raise ConversionError(
                message(
                    f"{name} needs matrices with adjacent elements in each row",
                    where=f"{name}[{index}]",
                    expected="2 dimensions, last stride 1",
                    found=f"shape {list(tensor.shape)}, strides {tensor.stride()}",
                )
            )
        actual = (tensor.shape, tensor.dtype, tensor.device, tensor.stride())
        if actual != kind:
            raise ConversionError(
                message(
                    f"{name} has matrices of several kinds",
                    where=f"{name}[{index}]",
                    expected=f"{kind[1]} {list(kind[0])}, strides {kind[3]}, on {kind[2]}",
                    found=f"{actual[1]} {list(actual[0])}, strides {actual[3]}, on {actual[2]}",
                    do="make one call for each kind",
                )
            )


def bytes_moved(*operands: Operand) -> int:
    """Return the bytes that a verb moves between these operands: it reads or writes each byte of each once."""
    return sum(as_matrices("bytes_moved", operand).nbytes for operand in operands)


def alignment(integers: _Integers) -> _Integers:
    """Return the largest power of two, at most ``MAX_ACCESS_BYTES``, that divides each integer.

    >>> alignment(np.array([0, 6, 24, 4096, 7])).tolist()
    [16, 2, 8, 16, 1]
    """
    capped = integers | MAX_ACCESS_BYTES
    return capped & -capped
