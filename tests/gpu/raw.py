"""Matrices at any byte of a raw buffer on the device, and a copy on the CPU that plain indexing moves."""

from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import Matrices, matrices_at
from automodel_conv.testing import POISON

MARGIN_BYTES = 64


class Raw(NamedTuple):
    """Equal matrices in a buffer whose other bytes are margin."""

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
        """Return a matrix on the CPU as a view ``[R, C, element bytes]``; its dtype may not allow its address."""
        size = self.dtype.itemsize
        rows, columns = self.shape
        strides = (self.row_stride * size, size, 1)
        return self.host.as_strided((rows, columns, size), strides, self.offsets_bytes[index])

    def read(self, index: int) -> Tensor:
        """Return a copy of a matrix on the CPU, at an address where its dtype can be viewed."""
        return self.raw_elements(index).clone(memory_format=torch.contiguous_format).flatten(1).view(self.dtype)

    def write(self, index: int, values: Tensor) -> None:
        """Write a matrix on the CPU only."""
        size = self.dtype.itemsize
        # Not contiguous(): it returns a single column of any stride unchanged, and view refuses that stride.
        dense = values.clone(memory_format=torch.contiguous_format)
        self.raw_elements(index).copy_(dense.view(torch.uint8).view(*self.shape, size))


def random(shape, dtype, phases, gap, device, *, finite=False) -> Raw:
    """Build matrices of random bits. ``finite`` excludes NaN and infinity."""
    raw = _laid_out(shape, dtype, phases, gap)
    # Bytes other than 0 and 1 are not valid as bool: torch may turn them into 1.
    raw.host.random_(0, 2 if dtype == torch.bool else 256)
    if finite:
        word, mask = {2: (torch.int16, ~0x4000), 4: (torch.int32, ~0x40000000)}[dtype.itemsize]
        for index in range(len(phases)):
            values = raw.read(index)
            values.view(word).bitwise_and_(mask)
            raw.write(index, values)
    return raw._replace(device=raw.host.to(device, copy=True))


def poisoned(shape, dtype, phases, gap, device) -> Raw:
    raw = _laid_out(shape, dtype, phases, gap)
    raw.host.fill_(POISON)
    return raw._replace(device=raw.host.to(device, copy=True))


def _laid_out(shape, dtype, phases, gap) -> Raw:
    """Lay out one matrix per phase, which starts that many bytes past a multiple of 16, with ``gap`` between rows."""
    rows, columns = shape
    stride = columns + gap
    step = -(-rows * stride * dtype.itemsize // 16) * 16 + MARGIN_BYTES
    host = torch.empty(step * len(phases) + 2 * MARGIN_BYTES, dtype=torch.uint8)
    return Raw(host, host, [MARGIN_BYTES + k * step + phase for k, phase in enumerate(phases)], shape, stride, dtype)


def aligned(raw: Raw) -> bool:
    """Return whether the buffers start at a multiple of 16, on which phases rely; every known allocator ensures it."""
    return raw.device.data_ptr() % 16 == raw.host.data_ptr() % 16 == 0
