"""Matrices at any byte of one raw buffer, on the device and, the same, on the CPU, where plain indexing moves them."""

from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import Matrices, matrices_at
from automodel_conv.testing import POISON

MARGIN_BYTES = 64


class Raw(NamedTuple):
    """Equal matrices; what lies between and around them is margin."""

    device: Tensor  # uint8
    host: Tensor  # the same bytes
    offsets_bytes: list[int]
    shape: tuple[int, int]
    row_stride: int  # in elements
    dtype: torch.dtype

    @property
    def matrices(self) -> Matrices:
        return matrices_at(self.device, self.offsets_bytes, self.shape, self.row_stride, self.dtype)

    def raw_elements(self, index: int) -> Tensor:
        """A matrix on the CPU as a view ``[R, C, bytes of an element]``; no dtype can be viewed at every address."""
        size = self.dtype.itemsize
        rows, columns = self.shape
        strides = (self.row_stride * size, size, 1)
        return self.host.as_strided((rows, columns, size), strides, self.offsets_bytes[index])

    def read(self, index: int) -> Tensor:
        """A matrix on the CPU, copied to where its dtype can be viewed."""
        return self.raw_elements(index).clone(memory_format=torch.contiguous_format).flatten(1).view(self.dtype)

    def write(self, index: int, values: Tensor) -> None:
        """Write a matrix on the CPU alone."""
        size = self.dtype.itemsize
        # Not contiguous(): that returns a single column of any stride as it is, and view refuses the stride.
        dense = values.clone(memory_format=torch.contiguous_format)
        self.raw_elements(index).copy_(dense.view(torch.uint8).view(*self.shape, size))


def random(shape, dtype, phases, gap, device, *, finite=False) -> Raw:
    """Matrices of random bits; ``finite``: no NaN and no infinity."""
    made = _laid_out(shape, dtype, phases, gap)
    # Bytes that are neither 0 nor 1 are no bool: torch may make them 1.
    made.host.random_(0, 2 if dtype == torch.bool else 256)
    if finite:
        word, mask = {2: (torch.int16, ~0x4000), 4: (torch.int32, ~0x40000000)}[dtype.itemsize]
        for index in range(len(phases)):
            values = made.read(index)
            values.view(word).bitwise_and_(mask)
            made.write(index, values)
    return made._replace(device=made.host.to(device, copy=True))


def poisoned(shape, dtype, phases, gap, device) -> Raw:
    made = _laid_out(shape, dtype, phases, gap)
    made.host.fill_(POISON)
    return made._replace(device=made.host.to(device, copy=True))


def _laid_out(shape, dtype, phases, gap) -> Raw:
    """One matrix for each phase, which starts that many bytes past a multiple of 16; ``gap`` elements between rows."""
    rows, columns = shape
    stride = columns + gap
    step = -(-rows * stride * dtype.itemsize // 16) * 16 + MARGIN_BYTES
    host = torch.empty(step * len(phases) + 2 * MARGIN_BYTES, dtype=torch.uint8)
    return Raw(host, host, [MARGIN_BYTES + k * step + phase for k, phase in enumerate(phases)], shape, stride, dtype)


def aligned(made: Raw) -> bool:
    """Whether the buffers start where the phases count from; every allocator that we know sees to it."""
    return made.device.data_ptr() % 16 == made.host.data_ptr() % 16 == 0
