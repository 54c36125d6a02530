"""The pure-torch implementation of ``transpose``, for the host.

Does not import Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message

# Largest panel in bytes, so also the largest of the (at most two) scratch buffers of a call.
_PANEL_BYTES = 2 << 20
# Rows of a panel: as many as fit, in steps of whole cache lines. Fewer rows write shorter runs to the destination (128
# rows of bf16 are 256 bytes); more than 256 gain nothing. If not even the minimum fits, a panel has only a part of the
# columns, which costs one more copy.
_MIN_ROWS, _MAX_ROWS, _ROWS_STEP = 128, 256, 64
# Below this size, PyTorch's own strided copy loses less time than the panels take to set up.
_SMALLEST_SIDE = 16
_SMALLEST_NUMEL = 64 * 64

# Elements of 8 bytes are left to copy_, because panels gain nothing for them.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

# Only one function of PyTorch that can be called transposes float32 with SIMD: the channel shuffle of a channels-last
# tensor, through fbgemm. In cache it reaches 14 - 30 GB/s; a strided copy_ reaches 2 - 6. fbgemm needs AVX2. Without it
# the same shuffle is a slow loop, or raises.
_SIMD_SHUFFLE = hasattr(torch, "native_channel_shuffle") and (torch.backends.cpu.get_cpu_capability().startswith("AVX"))


@torch.no_grad()
def transpose_torch(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Transpose matrices: ``dst[k].copy_(src[k].t())`` for each ``k``, several times faster on the CPU.

    Reads a panel of rows as 32-bit words, transposes the words with SIMD, and splits each word into its elements when
    it writes them. Destinations that fill each other's gaps (gate and up, interleaved on the last dimension) are
    written together if they follow one another in the lists, at nearly twice the rate. One thread reaches 0.25 - 0.3 of
    the rate of a plain copy for bf16 in memory; ``copy_`` reaches 0.05.

    Args:
        dst: destinations ``[C, R]``, at any strides, which do not overlap each other or any source.
        src: sources ``[R, C]``, at any strides, fastest if contiguous. They are cast to the dtype of ``dst`` as
            ``Tensor.to`` casts, which does not specify which NaN a NaN becomes.

    Allocates at most 4 MiB of scratch, freed on return. Releases the GIL. PyTorch spreads the work over its intra-op
    threads, unless the calling thread has called ``torch.set_num_threads(1)``.

    Raises:
        ConversionError: the lists differ in length, or a pair in shape.

    Example:
        >>> src = torch.arange(6.0).view(2, 3)
        >>> dst = torch.empty(3, 2)
        >>> transpose_torch([dst], [src])
        >>> torch.equal(dst, src.t())
        True
    """
    if len(dst) != len(src):
        raise ConversionError(message("transpose needs one source per destination", expected=len(dst), found=len(src)))
    for index, (d, s) in enumerate(zip(dst, src, strict=True)):
        if d.dim() != 2 or s.dim() != 2 or d.shape != (s.shape[1], s.shape[0]):
            raise ConversionError(
                message(
                    "transpose needs sources [R, C] and destinations [C, R]",
                    where=f"pair {index}",
                    expected=f"dst {list(reversed(s.shape))}",
                    found=f"dst {list(d.shape)}",
                )
            )
    index = 0
    while index < len(dst):
        whole, lanes = dst[index], 1
        if is_worth_panels(whole, src[index], whole.shape):
            lanes = _interleaved_lanes(dst, src, index)
            if lanes > 1:
                columns, rows = whole.shape
                whole = whole.as_strided((columns, rows * lanes), (whole.stride(0), 1))
            _transpose_panels(whole, src[index : index + lanes])
        else:
            whole.copy_(src[index].t())
        index += lanes


def halves(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the even columns and the odd columns of each matrix."""
    return [matrix[:, half::2] for matrix in matrices for half in (0, 1)]


def is_worth_panels(dst: Tensor, src: Tensor, matrix: Sequence[int]) -> bool:
    """Return whether panels transpose matrices of this shape, from ``src`` to ``dst``, faster than ``copy_``."""
    return (
        min(matrix) >= _SMALLEST_SIDE
        and matrix[0] * matrix[1] >= _SMALLEST_NUMEL
        and dst.element_size() in _INTEGERS
        and dst.device.type == src.device.type == "cpu"
    )


def _interleaved_lanes(dst: Sequence[Tensor], src: Sequence[Tensor], start: int) -> int:
    """Return how many destinations from ``start`` on fill each other's gaps; 1 if this one has no such neighbour."""
    first = dst[start]
    lanes = first.stride(1)
    if not 2 <= lanes <= min(_MIN_ROWS, len(dst) - start):
        return 1
    for lane in range(1, lanes):
        other = dst[start + lane]
        if (
            other.dtype != first.dtype
            or other.shape != first.shape
            or other.stride() != first.stride()
            or other.data_ptr() != first.data_ptr() + lane * first.element_size()
            or other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or src[start + lane].device.type != "cpu"
        ):
            return 1
    return lanes


def _transpose_panels(dst: Tensor, sources: Sequence[Tensor]) -> None:
    """Write ``dst`` ``[C, lanes * R]`` from the sources ``[R, C]``: the first row of each, then the second of each."""
    lanes = len(sources)
    rows, columns = sources[0].shape
    per_word = 4 // dst.element_size()
    word_columns = columns - columns % per_word
    fitting = _PANEL_BYTES // (columns * dst.element_size()) // _ROWS_STEP * _ROWS_STEP
    rows_at_once = max(_MIN_ROWS, min(_MAX_ROWS, fitting))
    panel_columns = min(word_columns, _PANEL_BYTES // (rows_at_once * 4) * per_word)
    panel_rows = min(rows, rows_at_once // lanes)

    scratch = None
    if panel_columns < columns or not _readable_as_words(dst, sources):
        numel = panel_rows * lanes * panel_columns
        scratch = torch.empty(numel, dtype=dst.dtype, device="cpu")
    for row in range(0, rows, panel_rows):
        height = min(panel_rows, rows - row)
        for column in range(0, word_columns, panel_columns):
            width = min(panel_columns, word_columns - column)
            if scratch is None:
                panel = sources[0].narrow(0, row, height)
            else:
                panel = scratch[: height * lanes * width].view(height * lanes, width)
                for lane, source in enumerate(sources):
                    tile = source.narrow(0, row, height).narrow(1, column, width)
                    panel[lane::lanes].copy_(tile)
            piece = dst.narrow(0, column, width).narrow(1, row * lanes, height * lanes)
            _write_transposed(piece, panel)
    if word_columns < columns:
        for lane, source in enumerate(sources):
            dst[word_columns:, lane::lanes].copy_(source[:, word_columns:].t())


def _write_transposed(piece: Tensor, panel: Tensor) -> None:
    """Compute ``piece.copy_(panel.t())`` for a contiguous panel with rows of whole 32-bit words."""
    words = _transposed_words(panel.view(torch.float32))
    size = panel.element_size()
    elements = piece.view(_INTEGERS[size])
    per_word = 4 // size
    for element in range(per_word):
        if element:
            words >>= 8 * size
        # An integer copy_ to a narrower type keeps the low bits, which are first in memory.
        elements[element::per_word].copy_(words)


def _readable_as_words(dst: Tensor, sources: Sequence[Tensor]) -> bool:
    """Return whether rows of the sources can be panels without a copy: one source, no cast, contiguous, aligned."""
    source = sources[0]
    return (
        len(sources) == 1
        and source.dtype == dst.dtype
        and source.is_contiguous()
        and source.data_ptr() % 4 == 0
        and source.storage_offset() * source.element_size() % 4 == 0
    )


def _transposed_words(words: Tensor) -> Tensor:
    """Transpose contiguous float32 ``[R, C]`` into a new int32 ``[C, R]`` of the same bits."""
    rows, columns = words.shape
    if _SIMD_SHUFFLE:
        numel = words.numel()
        pixel = words.as_strided((1, numel, 1, 1), (numel, 1, numel, numel))
        out = torch.native_channel_shuffle(pixel, rows).as_strided((columns, rows), (rows, 1))
    else:
        # Not contiguous(), because that returns the source itself if a side is 1.
        out = words.t().clone(memory_format=torch.contiguous_format)
    return out.view(torch.int32)
