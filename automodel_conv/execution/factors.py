"""The matrices of adapters, read when they are needed and kept in bounded memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from automodel_conv.dtypes import nbytes
from automodel_conv.execution.buffers import byte_view, dtype_of
from automodel_conv.execution.reading import read_each, read_whole
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.source import opened
from automodel_conv.planning.deltas import Delta

KEPT_BYTES = 48 << 20
"""Bytes of factors that are kept besides those that are needed at once."""
# Tensors between two that need the same factors, which are kept meanwhile. The projections of an expert are nearer.
_NEAR = 64
# Size and number of the blocks of a file behind a URL that are kept.
_BLOCK_BYTES = 4 << 20
_BLOCKS = 4


class AdapterTensors(Protocol):
    """The tensors of an adapter, in columns by row."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def dtypes(self) -> Sequence[str]:
        """Dtype codes."""
        ...

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]: ...

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Return tensors by their rows; they are not changed.

        Raises:
            ReadError: the file cannot be read.
        """
        ...


class FileTensors:
    """The tensors of an adapter in a file.

    A file behind a URL is read in blocks, the last of which are kept, because a request for each matrix would take
    longer than its bytes.
    """

    def __init__(self, file: Checkpoint):
        self.names, self.dtypes, self.shapes = file.names, file.dtypes, file.shapes
        self._file = file
        self._blocks: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        if not self._file.is_remote:
            return list(read_each(rows, self._file))
        return [self._read_by_blocks(row) for row in rows]

    def _read_by_blocks(self, row: int) -> Tensor:
        file, offset, nbytes = self._file.file_ids[row], self._file.offsets[row], self._file.nbytes[row]
        if nbytes > _BLOCK_BYTES:
            return read_whole(row, self._file)
        tensor = torch.empty(self.shapes[row], dtype=dtype_of(self.dtypes[row], self.names[row]), device="cpu")
        view, stop = byte_view(tensor), offset + nbytes
        while offset < stop:
            number, start = divmod(offset, _BLOCK_BYTES)
            part = self._block(file, number)[start : start + stop - offset]
            view[: len(part)], view = part, view[len(part) :]
            offset += len(part)
        return tensor

    def _block(self, file: int, number: int) -> memoryview:
        key = file, number
        if key not in self._blocks:
            with opened(self._file.sources[file]) as source:
                start = number * _BLOCK_BYTES
                block = memoryview(bytearray(min(_BLOCK_BYTES, source.size() - start)))
                source.read_into([block], start)
            self._blocks[key] = block
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]


class Factors:
    """The matrices of all deltas, read when they are needed, by any thread.

    Args:
        adapters: the tensors of each adapter.
        deltas: the deltas, by number.
        uses: numbers of the deltas of each tensor, in the order in which tensors are computed.

    Attributes:
        kept_bytes: the most bytes of factors in memory: enough that none is read again for the next tensor of a layer.
    """

    def __init__(
        self, adapters: Sequence[AdapterTensors], deltas: Sequence[Delta], uses: Iterable[Collection[int]] = ()
    ):
        self.deltas = deltas
        self._adapters = adapters
        self.kept_bytes = KEPT_BYTES + most_at_once(uses, self._nbytes)
        self._kept: OrderedDict[int, tuple[Tensor, Tensor | None]] = OrderedDict()
        self._free = self.kept_bytes
        self._lock = threading.Lock()

    def dtypes(self, number: int) -> tuple[str, str]:
        """Return the dtype codes of A and B; for a delta without B, that of its tensor twice."""
        delta = self.deltas[number]
        codes = self._adapters[delta.adapter].dtypes
        return codes[delta.a], codes[delta.a if delta.b is None else delta.b]

    def stored_shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of A in its file, or of the tensor of a delta without B."""
        delta = self.deltas[number]
        return self._adapters[delta.adapter].shapes[delta.a]

    def of(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return A as ``[stack, rank, columns]`` and B as ``[stack, rows, rank]``.

        For a delta without B, return its tensor as ``[stack, rows, columns]`` and None.

        Raises:
            ReadError: the file cannot be read.
        """
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            while self._kept and self._free < self._nbytes(number):
                self._free += self._nbytes(self._kept.popitem(last=False)[0])
            self._kept[number] = self._read(self.deltas[number])
            self._free -= self._nbytes(number)
            return self._kept[number]

    def _nbytes(self, number: int) -> int:
        delta = self.deltas[number]
        file = self._adapters[delta.adapter]
        rows = (delta.a,) if delta.b is None else (delta.a, delta.b)
        return sum(nbytes(file.dtypes[row], prod(file.shapes[row])) for row in rows)

    def _read(self, delta: Delta) -> tuple[Tensor, Tensor | None]:
        stack, rows, columns = delta.shape
        tensors = self._adapters[delta.adapter]
        if delta.b is None:
            [tensor] = tensors.read([delta.a])
            return tensor.view(stack, rows, columns), None
        a, b = tensors.read([delta.a, delta.b])
        b = b.view(rows, stack, delta.rank).transpose(1, 2) if delta.is_b_grouped else b.view(rows, delta.rank, stack)
        return a.view(stack, delta.rank, columns), b.permute(2, 0, 1).contiguous()


def most_at_once(uses: Iterable[Collection[int]], nbytes_of: Callable[[int], int]) -> int:
    """Return the most bytes that are needed at once, if an item is needed between two uses that are near each other.

    Args:
        uses: the items of each step, in order.
        nbytes_of: returns the bytes of an item.
    """
    last: dict[int, int] = {}
    changes: Counter[int] = Counter()
    for step, numbers in enumerate(uses):
        for number in numbers:
            before = last.get(number, step - 1)
            begin = before + 1 if step - before <= _NEAR else step
            changes[begin] += nbytes_of(number)
            changes[step + 1] -= nbytes_of(number)
            last[number] = step
    return max(accumulate(changes[step] for step in sorted(changes)), default=0)
