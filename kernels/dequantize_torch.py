"""The pure-torch implementation of ``dequantize``, for the host, and the checks that both implementations share.

Does not import Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch

# Bytes of codes that are decoded at once. With their indices of 4 or 8 bytes they stay in the second-level cache.
_PIECE_BYTES = 1 << 18
# Rows of a piece that is written transposed, the minimum of a panel of transpose_torch.
_TRANSPOSED_ROWS = 128
# A table of pairs of nibbles has 256 entries for each row of the code table. It is used for code tables of at most
# this many rows,
_MAX_PAIRED_ROWS = 1024
# and only if at least this many bytes of codes are decoded for each of its entries. Otherwise it costs too much.
_PAIRS_WORTH = 2

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INT32 = 2**31


class _Lookup(NamedTuple):
    """A table flattened to words.

    Each byte of codes looks up one word, or two if ``nibbles``.
    """

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
    """Decode matrices of codes by lookups in a table, as ``dequantize`` does.

    For each ``k``, with the code of row ``r`` and column ``c``:
    ``dst[k][r, c] = table[table_rows[k][(r + start[0]) // block[0], (c + start[1]) // block[1]], code]``.

    Args:
        dst: as for ``dequantize``, but each may have its own strides. Fastest if there are no gaps between rows.
        codes: as for ``dequantize``, at any strides.
        table_rows: as for ``dequantize``.
        table: as for ``dequantize``.
        bits: as for ``dequantize``.
        block: as for ``dequantize``.
        start: as for ``dequantize``.

    Allocates about 4 MiB of scratch, at most 8 (blocks of one byte), freed on return. Releases the GIL. PyTorch spreads
    the work over its intra-op threads, unless the calling thread has called ``torch.set_num_threads(1)``.

    Raises:
        ConversionError: the operands do not fit together. Nothing has been written.
        UnsupportedError: other bits, or a table with elements of another size.
        IndexError: a table row is beyond the table.

    Example:
        >>> from automodel_conv.kernels.code_tables import code_table
        >>> table, table_rows = code_table("int4", torch.tensor([[0.5, 2.0]]), torch.float32)
        >>> codes = torch.tensor([[0x98, 0xBA]], dtype=torch.uint8)  # 8, 9 under 0.5, then 10, 11 under 2
        >>> values = torch.empty(1, 4)
        >>> dequantize_torch([values], [codes], [table_rows], table, bits=4, block=(1, 2))
        >>> values
        tensor([[0.0000, 0.5000, 4.0000, 6.0000]])
    """
    check_dequantize(dst, codes, table_rows, table, bits=bits, block=block, start=start)
    if not dst or not dst[0].numel():
        return
    in_bytes = not any(columns * bits % 8 for columns in (block[1], start[1]))
    lookup = _lookup(table, bits, len(codes) * codes[0].numel(), in_bytes)
    block_bytes, first_byte = block[1] * bits // 8, start[1] * bits // 8
    for out, matrix, matrix_rows in zip(dst, codes, table_rows, strict=True):
        for rows, columns in _pieces(*matrix.shape, is_transposed=is_stored_by_columns(out)):
            index = _index(matrix[rows, columns], lookup)
            grid_rows = torch.arange(start[0] + rows.start, start[0] + rows.stop, device=table.device) // block[0]
            if in_bytes:
                begin, end = first_byte + columns.start, first_byte + columns.stop
                grid_columns = slice(begin // block_bytes, -(-end // block_bytes))
                selected = matrix_rows[:, grid_columns].index_select(0, grid_rows)
                _add_table_rows(index, selected, begin % block_bytes, block_bytes, lookup)
            else:
                first, last = (start[1] + byte * 2 for byte in (columns.start, columns.stop))
                grid_columns = torch.arange(first, last, device=table.device) // block[1]
                selected = matrix_rows.index_select(1, grid_columns).index_select(0, grid_rows)
                # The two offsets of a byte of codes, in the order of its two indices.
                index += selected.to(torch.int32).mul_(lookup.width).view(torch.int64)
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
    """Check the count, shapes, dtypes and device of all operands.

    Raises:
        ConversionError: an operand does not fit; the error names it.
        UnsupportedError: other bits, or a table with elements of another size.
    """
    if bits not in (4, 8) or table.element_size() not in (2, 4):
        raise UnsupportedError(
            message(
                "dequantize does not support these codes or values",
                expected="codes of 4 or 8 bits, values of 2 or 4 bytes",
                found=f"{bits} bits, {table.dtype}",
            )
        )
    per_byte = 8 // bits
    if min(block) < 1 or any(not 0 <= s < b for s, b in zip(start, block, strict=True)):
        raise ConversionError(
            message("a matrix must start inside its first block", found=f"start {start}, block {block}")
        )
    if table.dim() != 2 or table.shape[1] != 1 << bits or not table.is_contiguous() or not 0 < table.numel() < _INT32:
        raise ConversionError(
            message(
                "a table must have an entry for every code in each row",
                expected=f"contiguous, [T, {1 << bits}], up to 2**31 - 1 entries",
                found=f"{list(table.shape)}, strides {table.stride()}",
            )
        )
    if not len(dst) == len(codes) == len(table_rows):
        raise ConversionError(
            message(
                "dequantize needs codes and table_rows for each destination",
                found=[len(dst), len(codes), len(table_rows)],
            )
        )
    if not dst:
        return
    rows, columns = _matrix_shape(dst[0])
    shapes = {
        "dst": ((rows, columns), (table.dtype,)),
        "codes": ((rows, columns // per_byte), (torch.uint8,)),
        "table_rows": (
            (-(-(rows + start[0]) // block[0]), -(-(columns + start[1]) // block[1])),
            (torch.uint8, torch.int32),
        ),
    }
    for name, tensors in (("dst", dst), ("codes", codes), ("table_rows", table_rows)):
        shape, dtypes = shapes[name]
        for index, tensor in enumerate(tensors):
            fits = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == table.device
            if not fits or columns % per_byte:
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
        raise ConversionError(message("dequantize needs matrices", where="dst[0]", found=list(tensor.shape)))
    return tensor.shape[0], tensor.shape[1]


def is_stored_by_columns(out: Tensor) -> bool:
    """Return whether a matrix is stored by columns."""
    return min(out.shape) > 1 and out.stride(0) < out.stride(1)


def _pieces(rows: int, nbytes: int, *, is_transposed: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the rows, and the bytes of a row, of pieces of at most ``_PIECE_BYTES``."""
    width = max(1, min(nbytes, _PIECE_BYTES // min(rows, _TRANSPOSED_ROWS) if is_transposed else _PIECE_BYTES))
    height = max(1, _PIECE_BYTES // width)
    for row in range(0, rows, height):
        for byte in range(0, nbytes, width):
            yield slice(row, min(row + height, rows)), slice(byte, min(byte + width, nbytes))


def _lookup(table: Tensor, bits: int, nbytes: int, in_bytes: bool) -> _Lookup:
    """Return the fastest lookup for ``nbytes`` bytes of codes.

    Args:
        in_bytes: whether all codes of a byte are in one block.
    """
    words = table.view(_INTEGERS[table.element_size()])
    rows = len(table)
    if bits == 8:
        return _Lookup(words.view(-1), 256, nibbles=False)
    if not in_bytes or rows > _MAX_PAIRED_ROWS or 256 * rows * _PAIRS_WORTH > nbytes:
        return _Lookup(words.view(-1), 16, nibbles=True)
    pairs = torch.stack([words.repeat(1, 16), words.repeat_interleave(16, 1)], 2)
    return _Lookup(pairs.view(_INTEGERS[2 * table.element_size()]).view(-1), 256, nibbles=False)


@cache
def _nibbles(device: torch.device) -> Tensor:
    """Return the two nibbles of each byte, as two int32 in one int64, the low nibble first: ``[256]``."""
    byte = torch.arange(256, device=device)
    return byte & 15 | byte >> 4 << 32


def _index(codes: Tensor, lookup: _Lookup) -> Tensor:
    """Return the index of each code in a row of the table: int32 ``[rows, bytes]``; if ``nibbles``, two in an int64."""
    index = codes.to(torch.int32, memory_format=torch.contiguous_format)
    if not lookup.nibbles:
        return index
    return torch.index_select(_nibbles(codes.device), 0, index.view(-1)).view(index.shape)


def _add_table_rows(index: Tensor, table_rows: Tensor, begin: int, block_bytes: int, lookup: _Lookup) -> None:
    """Add the offset of each table row to the indices, in place.

    Args:
        index: indices within a row of the table, ``[rows, bytes]``.
        table_rows: table row of each block, ``[rows, blocks]``.
        begin: byte of the first block at which a row of ``index`` begins.
        block_bytes: bytes of codes in a row of a block.
        lookup: the table.
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
    words = torch.index_select(lookup.words, 0, flat)
    strided_copy_torch([out], [words.view(out.dtype).view(out.shape)])


def _as_line(out: Tensor, dtype: torch.dtype) -> Tensor | None:
    """View a matrix as one line of words of one or two elements; None if it has gaps or is not aligned to words."""
    per_word = dtype.itemsize // out.element_size()
    if not out.is_contiguous() or out.storage_offset() % per_word or out.data_ptr() % dtype.itemsize:
        return None
    return out.view(-1).view(dtype)
