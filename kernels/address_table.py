"""Where matrices lie: absolute addresses, so that slices of one raw buffer and loose tensors are the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message

WIDEST = 16
"""Bytes of the widest access of a GPU; more alignment than that changes nothing."""


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


def as_matrices(name: str, tensors: Sequence[Tensor] | Matrices) -> Matrices:
    """Tensors by their addresses; ``name`` says in errors which argument they are.

    Raises:
        ConversionError: they are not all 2-D, of one shape, dtype, device and row stride, or the elements of a row are
            not adjacent.
    """
    if isinstance(tensors, Matrices):
        return tensors
    if not tensors:
        return Matrices(np.empty(0, np.int64), torch.uint8, 0, 0, 0, torch.device("cpu"))
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
    addresses = np.fromiter((tensor.data_ptr() for tensor in tensors), np.int64, len(tensors))
    return at_addresses(addresses, (first.shape[0], first.shape[1]), first.stride(0), first.dtype, first.device)


def bytes_moved(*operands: Sequence[Tensor] | Matrices) -> int:
    """Bytes that a verb moves between these operands: each byte of each is read or written once."""
    return sum(as_matrices("bytes_moved", operand).nbytes for operand in operands)


def alignment(numbers: np.ndarray) -> np.ndarray:
    """The largest power of two, at most ``WIDEST``, that divides each number.

    >>> alignment(np.array([0, 6, 24, 4096, 7])).tolist()
    [16, 2, 8, 16, 1]
    """
    capped = numbers | WIDEST
    return capped & -capped


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """An int64 table on a device, by one transfer that nobody waits for."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
