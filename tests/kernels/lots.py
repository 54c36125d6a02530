"""Equal matrices at any address between guards, and loops that move their elements."""

import math
import struct
from typing import NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st

from automodel_conv.kernels.address_table import matrices_at
from automodel_conv.testing import address_valued
from tests.kernels.support import CASTABLE, DTYPE_PAIRS

POISON = 0x5C
SIDES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40]


class Lot(NamedTuple):
    """Equal matrices at arbitrary addresses in one buffer of raw bytes."""

    raw: bytearray
    offsets: list[int]
    shape: tuple[int, int]
    row_stride: int
    dtype: torch.dtype

    def at(self, matrix, row, column):
        return self.offsets[matrix] + (row * self.row_stride + column) * self.dtype.itemsize

    def read(self, matrix, row, column):
        at = self.at(matrix, row, column)
        return bytes(self.raw[at : at + self.dtype.itemsize])

    def write(self, matrix, row, column, value):
        at = self.at(matrix, row, column)
        self.raw[at : at + self.dtype.itemsize] = value

    @property
    def tensor(self):
        return torch.frombuffer(self.raw, dtype=torch.uint8)

    @property
    def matrices(self):
        return matrices_at(self.tensor, self.offsets, self.shape, self.row_stride, self.dtype)


def lot(shape, dtype, phases, gap, *, poisoned=False):
    """Build one matrix per phase, which starts that many bytes past a multiple of 16, with ``gap`` between rows."""
    rows, columns = shape
    stride = columns + gap
    size = max(rows * stride * dtype.itemsize, 1)
    step = -(-size // 16) * 16 + 64
    raw = bytearray([POISON]) * (step * len(phases) + 64)
    aligned = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 16
    matrices = Lot(raw, [aligned + k * step + 16 + phase for k, phase in enumerate(phases)], shape, stride, dtype)
    if not poisoned:
        values = iter(address_valued((rows * columns * len(phases),), dtype).view(torch.uint8).tolist())
        for k in range(len(phases)):
            for r in range(rows):
                for c in range(columns):
                    matrices.write(k, r, c, bytes(next(values) for _ in range(dtype.itemsize)))
    return matrices


def number(value, dtype):
    """Return the number that the bits of an element represent."""
    if dtype == torch.bfloat16:
        return struct.unpack("<f", b"\0\0" + value)[0]
    return struct.unpack("<e" if dtype == torch.float16 else "<f", value)[0]


def rounded(value, src, dst):
    """Return the element of ``dst`` nearest to one of ``src``, ties to even. Doubles are exact at every step."""
    if src == dst:
        return value
    x = number(value, src)
    fraction_bits, least, bias = {
        torch.bfloat16: (7, -126, 127),
        torch.float16: (10, -14, 15),
        torch.float32: (23, -126, 127),
    }[dst]
    sign = (math.copysign(1, x) < 0) << (dst.itemsize * 8 - 1)
    infinity = (2 * bias + 1) << fraction_bits
    if math.isnan(x):
        bits = infinity + 1
    elif math.isinf(x):
        bits = infinity
    elif x == 0:
        bits = 0
    else:
        exponent = max(math.frexp(abs(x))[1] - 1, least)
        # round() is to nearest even.
        units = round(math.ldexp(abs(x), fraction_bits - exponent))
        bits = min(((exponent - least) << fraction_bits) + units, infinity)
    return (bits | sign).to_bytes(dst.itemsize, "little")


def same(actual, expected, dtype):
    if actual == expected:
        return True
    return dtype in CASTABLE and math.isnan(number(actual, dtype)) and math.isnan(number(expected, dtype))


def check(dst, expected, *, cast):
    """Check that bytes are as expected, also in gaps and margins. A cast may turn a NaN into any NaN."""
    for written, wanted in zip(dst, expected, strict=True):
        if written.raw == wanted.raw:
            continue
        assert cast
        for k in range(len(written.offsets)):
            for r in range(written.shape[0]):
                for c in range(written.shape[1]):
                    assert same(written.read(k, r, c), wanted.read(k, r, c), written.dtype), (k, r, c)
                    written.write(k, r, c, wanted.read(k, r, c))
        assert written.raw == wanted.raw, "bytes outside of the matrices were written"


def run(verb, dst, src, element):
    """Call a verb and compare with a loop: element (k, r, c) of ``dst[n]`` is ``element(n, r, c)`` of a source."""
    expected = [d._replace(raw=bytearray(d.raw)) for d in dst]
    for n, wanted in enumerate(expected):
        for k in range(len(wanted.offsets)):
            for r in range(wanted.shape[0]):
                for c in range(wanted.shape[1]):
                    source, row, column = element(n, r, c)
                    value = src[source].read(k, row, column)
                    wanted.write(k, r, c, rounded(value, src[source].dtype, wanted.dtype))
    before = [bytes(s.raw) for s in src]
    verb(*(d.matrices for d in dst), *(s.matrices for s in src))
    check(dst, expected, cast=dst[0].dtype != src[0].dtype)
    assert [bytes(s.raw) for s in src] == before


@st.composite
def phases(draw, count, dtype, *, whole=False):
    """Draw bytes past a multiple of 16, mostly equal. ``whole`` keeps elements at multiples of their size."""
    step = dtype.itemsize if whole else 1
    one = st.sampled_from(sorted({0, 8, 4, 2, 1, 3, 12}) if step == 1 else [0, 0, 8, 4 if step <= 4 else 0, step])
    common = draw(one)
    return [draw(one) if draw(st.integers(0, 3)) == 0 else common for _ in range(count)]


@st.composite
def problems(draw, multiple=1):
    """Draw dtypes, sides, counts and gaps, some of which allow long vectors."""
    dst, src = draw(st.sampled_from(DTYPE_PAIRS))
    sides = st.sampled_from(SIDES) | st.sampled_from([16, 32, 48])
    rows, columns, count = draw(sides), draw(sides), draw(st.sampled_from([0, 1, 2, 3]))
    assume(rows * columns * count <= 2500)
    gap = st.sampled_from([0, 0, 16, 8, 1, 3])
    return dst, src, rows, columns, count, draw(gap), draw(gap)
