"""Cases for tests of the verbs, wherever they run: verbs, dtypes, alignments, shapes, values that are hard to cast."""

import torch

from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.interleave import interleave
from automodel_conv.kernels.strided_copy import strided_copy
from automodel_conv.kernels.transpose import transpose

CASTABLE = [torch.bfloat16, torch.float16, torch.float32]
MOVED = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.int32, torch.float32]
DTYPE_PAIRS = [(d, d) for d in MOVED] + [(d, s) for d in CASTABLE for s in CASTABLE if d != s]
# Bytes past a multiple of 16, one for each alignment that a kernel distinguishes.
PHASES = (0, 8, 4, 2, 1)
# With the number of destinations and of sources.
VERBS = {
    "strided_copy": (strided_copy, 1, 1),
    "transpose": (transpose, 1, 1),
    "interleave": (interleave, 1, 2),
    "deinterleave": (deinterleave, 2, 1),
}


def shapes(name, rows, columns):
    """Return the shapes of a destination and of a source."""
    return {
        "strided_copy": ((rows, columns), (rows, columns)),
        "transpose": ((columns, rows), (rows, columns)),
        "interleave": ((columns, 2 * rows), (rows, columns)),
        "deinterleave": ((columns, rows), (rows, 2 * columns)),
    }[name]


def casting_cases(dtype):
    """Return every value of a 16-bit dtype; for float32 every exponent, on and around halfway points."""
    if dtype.itemsize == 2:
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    else:
        # Every exponent, on and around the halfway points of both narrower formats.
        exponents = torch.arange(512, dtype=torch.int64)[:, None, None] << 23
        mantissas = torch.tensor([0, 1, 0x5555, 0x7FFFFF - 0xFFFF])[None, :, None]
        halves = torch.tensor([0, 1, -1, 0x8000, 0x8001, 0x7FFF, 0x18000, 0x1000, 0x1001, 0xFFF, 0x3000, 0x2FFF])
        bits = ((exponents + mantissas + halves) & 0xFFFFFFFF).reshape(-1).to(torch.int32)
    return bits.view(dtype).reshape(64, -1)
