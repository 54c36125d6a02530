"""The pure-torch twin of ``dequantize``, which the host uses, and the checks of both; imports no Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch

# Bytes of codes decoded at once: with their indices, of 4 or 8 bytes each, they stay in the second-level cache.
_PIECE_BYTES = 1 << 18
# Rows of a piece that is written transposed: as many as transpose_torch takes at once.
_TRANSPOSED_ROWS = 128
# A table of pairs of nibbles has up to this many rows of 256, and is made for this many times as many bytes to decode.
_MAX_PAIRED_ROWS = 1024
_PAIRS_WORTH = 2

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INT32 = 2**31


class _Lookup(NamedTuple):
    """A table as one line of words, of which each byte of codes takes one, or two if ``nibbles``."""

    words: Tensor  # 1-D, integers
    width: int  # words of a row of the table
    nibbles: bool


@torch.no_grad()
def dequantize_torch(
    dst: Sequence[Tensor],
    codes: Sequence[Tensor],
    table_rows: Sequence[Tensor],
    table: Tensor,
    *,
    bits: int,
    block: tuple[int, int],
    start: tuple[int, int] = (0, 0),
) -> None:
    """``dst[k][r, c] = table[table_rows[k][(r + start[0]) // block[0], (c + start[1]) // block[1]], code[r, c]]``.

    Args:
        dst, codes, table_rows, table, bits, block, start: as for ``dequantize``; any strides of ``codes``, and of each
            ``dst`` its own. Fastest where rows of ``dst`` follow each other without a gap.

    Allocates some 4 MiB of scratch, at most 8 (blocks of one byte), freed on return. Releases the GIL. PyTorch spreads
    the work over its intra-op threads, unless the calling thread has called ``torch.set_num_threads(1)``.

    Raises:
        ConversionError: operands that do not fit together; nothing is written then.
        UnsupportedError: other bits, or a table of elements of another size.
        IndexError: a row beyond the table.
    """
    check_dequantize(dst, codes, table_rows, table, bits=bits, block=block, start=start)
    if not dst or not dst[0].numel():
        return
    lookup = _lookup(table, bits, len(codes) * codes[0].numel())
    block_bytes, first_byte = block[1] * bits // 8, start[1] * bits // 8
    for out, code, table_row in zip(dst, codes, table_rows, strict=True):
        for rows, columns in _pieces(*code.shape, is_transposed=is_stored_by_columns(out)):
            index = _index(code[rows, columns], lookup)
            of_rows = torch.arange(start[0] + rows.start, start[0] + rows.stop, device=table.device) // block[0]
            begin, end = first_byte + columns.start, first_byte + columns.stop
            of_columns = table_row[:, begin // block_bytes : -(-end // block_bytes)]
            _add_table_rows(index, of_columns.index_select(0, of_rows), begin % block_bytes, block_bytes, lookup)
            _look_up(out[rows, columns.start * 8 // bits : columns.stop * 8 // bits], index, lookup)


def check_dequantize(
    dst: Sequence[Tensor],
    codes: Sequence[Tensor],
    table_rows: Sequence[Tensor],
    table: Tensor,
    *,
    bits: int,
    block: tuple[int, int],
    start: tuple[int, int],
) -> None:
    """All operands are as many, of the shapes, dtypes and device that they must have.

    Raises:
        ConversionError: names the operand that is not.
        UnsupportedError: other bits, or a table of elements of another size.
    """
    if bits not in (4, 8) or table.element_size() not in (2, 4):
        raise UnsupportedError(
            message(
                "dequantize does not decode these",
                expected="codes of 4 or 8 bits, numbers of 2 or 4 bytes",
                found=f"{bits} bits, {table.dtype}",
            )
        )
    step = 8 // bits
    if min(block) < 1 or any(not 0 <= s < b for s, b in zip(start, block, strict=True)):
        raise ConversionError(message("matrices begin within a block", found=f"start {start}, block {block}"))
    if block[1] % step or start[1] % step:
        raise ConversionError(
            message(
                "blocks are of whole bytes of codes", expected="even columns", found=f"start {start}, block {block}"
            )
        )
    if table.dim() != 2 or table.shape[1] != 1 << bits or not table.is_contiguous() or not 0 < table.numel() < _INT32:
        raise ConversionError(
            message(
                "a table has an entry for every code in every row",
                expected=f"contiguous, [T, {1 << bits}], up to 2**31 - 1 entries",
                found=f"{list(table.shape)}, strides {table.stride()}",
            )
        )
    if not len(dst) == len(codes) == len(table_rows):
        raise ConversionError(
            message(
                "dequantize takes codes and table_rows for each destination",
                found=[len(dst), len(codes), len(table_rows)],
            )
        )
    if not dst:
        return
    rows, columns = _matrix_shape(dst[0])
    shapes = {
        "dst": ((rows, columns), (table.dtype,)),
        "codes": ((rows, columns // step), (torch.uint8,)),
        "table_rows": (
            (-(-(rows + start[0]) // block[0]), -(-(columns + start[1]) // block[1])),
            (torch.uint8, torch.int32),
        ),
    }
    for name, tensors in (("dst", dst), ("codes", codes), ("table_rows", table_rows)):
        shape, dtypes = shapes[name]
        for index, tensor in enumerate(tensors):
            if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != table.device or columns % step:
                raise ConversionError(
                    message(
                        "the operands of dequantize do not fit together",
                        where=f"{name}[{index}]",
                        expected=f"{' or '.join(map(str, dtypes))} {list(shape)} on {table.device}, whole bytes",
                        found=f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}",
                    )
                )


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ConversionError(message("dequantize takes matrices", where="dst[0]", found=list(tensor.shape)))
    return tensor.shape[0], tensor.shape[1]


def is_stored_by_columns(out: Tensor) -> bool:
    """Whether ``out`` is stored by columns."""
    return min(out.shape) > 1 and out.stride(0) < out.stride(1)


def _pieces(rows: int, nbytes: int, *, is_transposed: bool) -> Iterator[tuple[slice, slice]]:
    """Rows, and bytes of a row, in pieces of at most ``_PIECE_BYTES``."""
    width = max(1, min(nbytes, _PIECE_BYTES // min(rows, _TRANSPOSED_ROWS) if is_transposed else _PIECE_BYTES))
    height = max(1, _PIECE_BYTES // width)
    for row in range(0, rows, height):
        for byte in range(0, nbytes, width):
            yield slice(row, min(row + height, rows)), slice(byte, min(byte + width, nbytes))


def _lookup(table: Tensor, bits: int, nbytes: int) -> _Lookup:
    """How to look up ``nbytes`` bytes of codes."""
    words = table.view(_INTEGERS[table.element_size()])
    rows = len(table)
    if bits == 8:
        return _Lookup(words.view(-1), 256, nibbles=False)
    if rows > _MAX_PAIRED_ROWS or 256 * rows * _PAIRS_WORTH > nbytes:
        return _Lookup(words.view(-1), 16, nibbles=True)
    pairs = torch.stack([words.repeat(1, 16), words.repeat_interleave(16, 1)], 2)
    return _Lookup(pairs.view(_INTEGERS[2 * table.element_size()]).view(-1), 256, nibbles=False)


@cache
def _nibbles(device: torch.device) -> Tensor:
    """The two nibbles of each byte as int32, the low one first, both in one int64 ``[256]``."""
    byte = torch.arange(256, device=device)
    return byte & 15 | byte >> 4 << 32


def _index(codes: Tensor, lookup: _Lookup) -> Tensor:
    """Where in a row of the table the codes are: int32 ``[rows, bytes]``, or int64 of two int32 if ``nibbles``."""
    index = codes.to(torch.int32, memory_format=torch.contiguous_format)
    if not lookup.nibbles:
        return index
    return torch.index_select(_nibbles(codes.device), 0, index.view(-1)).view(index.shape)


def _add_table_rows(index: Tensor, table_rows: Tensor, begin: int, block_bytes: int, lookup: _Lookup) -> None:
    """Add where rows of the table begin.

    Args:
        index: ``[rows, bytes]``.
        table_rows: ``[rows, blocks]``.
        begin: the byte of the first block at which a row of ``index`` begins.
    """
    offsets = table_rows.to(index.dtype).mul_(lookup.width * (1 + (1 << 32)) if lookup.nibbles else lookup.width)
    nbytes = index.shape[1]
    head = min(block_bytes - begin, nbytes)
    index[:, :head] += offsets[:, :1]
    whole = (nbytes - head) // block_bytes
    tail = head + whole * block_bytes
    if whole:
        index[:, head:tail].unflatten(1, (whole, block_bytes)).add_(offsets[:, 1 : whole + 1, None])
    if tail < nbytes:
        index[:, tail:] += offsets[:, -1:]


def _look_up(out: Tensor, index: Tensor, lookup: _Lookup) -> None:
    flat = (index.view(torch.int32) if lookup.nibbles else index).view(-1)
    target = _as_line(out, lookup.words.dtype)
    if target is not None:
        torch.index_select(lookup.words, 0, flat, out=target)
        return
    made = torch.index_select(lookup.words, 0, flat)
    strided_copy_torch([out], [made.view(out.dtype).view(out.shape)])


def _as_line(out: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A matrix without gaps as one line of words, which hold one or two elements; None if it has gaps or lies askew."""
    per_word = dtype.itemsize // out.element_size()
    if not out.is_contiguous() or out.storage_offset() % per_word or out.data_ptr() % dtype.itemsize:
        return None
    return out.view(-1).view(dtype)
