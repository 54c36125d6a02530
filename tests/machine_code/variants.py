"""Every variant that the verbs can launch, collected from the choosers that the verbs use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from automodel_conv.kernels.deinterleave import deinterleave_variant
from automodel_conv.kernels.dequantize import DequantizeConstants, dequantize_variant
from automodel_conv.kernels.interleave import interleave_variant
from automodel_conv.kernels.strided_copy import byte_variant, cast_variant
from automodel_conv.kernels.transpose import transpose_variant
from automodel_conv.kernels.variants import CASTS, Variant

ALIGNMENTS = (1, 2, 4, 8, 16)
MOVED = (torch.uint8, torch.bfloat16, torch.float32)
DTYPE_PAIRS = [(dtype, dtype) for dtype in MOVED] + [(dst, src) for dst in CASTS for src in CASTS if dst != src]
ROWS_NBYTES = (64, 4096)  # a narrow tile and a wide one


def _all() -> Iterator[Variant]:
    for alignment in ALIGNMENTS:
        for nbytes in ROWS_NBYTES:
            yield byte_variant(alignment, nbytes)
    for dst, src in DTYPE_PAIRS:
        for of_dst in ALIGNMENTS:
            for of_src in ALIGNMENTS:
                if of_dst < dst.itemsize:
                    continue  # refused
                if dst != src:
                    for nbytes in ROWS_NBYTES:
                        yield cast_variant(dst, src, of_dst, of_src, nbytes // max(dst.itemsize, src.itemsize))
                yield transpose_variant(dst, src, of_dst, of_src)
                yield interleave_variant(dst, src, of_dst, of_src)
                yield deinterleave_variant(dst, src, of_dst, of_src)
    flags = (False, True)
    for bits, table_row, by_shifts, is_transposed, is_stepped in product(
        (4, 8), ("uint8", "int32"), flags, flags, flags
    ):
        decoding = DequantizeConstants(bits, table_row, by_shifts, is_transposed, is_stepped)
        for dst in (torch.bfloat16, torch.float32):
            for aligned in ALIGNMENTS:
                yield dequantize_variant(dst, decoding, 16, aligned, 16)


def launchable() -> list[Variant]:
    return list(dict.fromkeys(_all()))
