"""The kept bytes of one remote file, in blocks that the processes of this machine share.

The format is this package's own: one sparse file with each byte at its own offset, and behind them a record of eight
bytes for each block. A record is written after the bytes of its block. So a process that is killed leaves no record of
an incomplete block, and bytes that a disk loses or changes do not have the checksum in the record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly, write_exactly

BLOCK_BYTES = 1 << 20
"""Bytes of a block, which is fetched whole.

One request fetches many adjacent blocks. Larger blocks would fetch more bytes that no process of this machine needs.
"""
# The CRC-32 of a block and its complement, little-endian. Zeros, as in a new file, are no record.
_RECORD = struct.Struct("<II")
_ALIGN_BYTES = 4096
# Bytes that are verified at once, few enough to stay in the cache of a core.
_WINDOW_BYTES = 128 << 10


class CacheBlocks:
    """The blocks of one file.

    Args:
        path: path of the file that keeps them. It is created, with its directory, unless it exists.
        nbytes: size of the remote file in bytes.

    Raises:
        OSError: the file cannot be created or opened.
    """

    def __init__(self, path: str, nbytes: int):
        self.path = path
        self.nbytes = nbytes
        self.count = -(-nbytes // BLOCK_BYTES)
        self._records = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        whole = self._records + self.count * _RECORD.size
        system.make_directory(os.path.dirname(path))
        system.open_append(path).close()
        self._file = system.open_existing(path)
        if system.size(self._file.fileno()) < whole:
            system.truncate(self._file.fileno(), whole)

    def range_of(self, block: int) -> tuple[int, int]:
        """Return the offsets of the first byte of a block and of the byte after the last."""
        start = block * BLOCK_BYTES
        return start, min(start + BLOCK_BYTES, self.nbytes)

    def blocks_of(self, start: int, stop: int) -> range:
        """Return the blocks that hold the bytes from ``start`` to ``stop``."""
        return range(start // BLOCK_BYTES, min(-(-stop // BLOCK_BYTES), self.count))

    def is_complete(self, block: int) -> bool:
        """Return whether a block is here and its bytes have the checksum in its record; read all of it.

        Raises:
            ReadError: the file cannot be read.
        """
        record = bytearray(_RECORD.size)
        self.read([memoryview(record)], self._records + block * _RECORD.size)
        checksum, complement = _RECORD.unpack(record)
        if checksum ^ complement != 0xFFFFFFFF:
            return False
        start, stop = self.range_of(block)
        window, found = memoryview(bytearray(_WINDOW_BYTES)), 0
        for offset in range(start, stop, _WINDOW_BYTES):
            part = window[: stop - offset]
            self.read([part], offset)
            found = zlib.crc32(part, found)
        return found == checksum

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill ``views`` with consecutive bytes, of blocks that are complete.

        Raises:
            ReadError: the file cannot be read.
        """
        read_exactly(self._file.fileno(), views, offset, self.path)

    def write(self, block: int, data: memoryview) -> None:
        """Write all bytes of a block, and then its record.

        Raises:
            WriteError: the file cannot be written.
        """
        checksum = zlib.crc32(data)
        record = memoryview(_RECORD.pack(checksum, checksum ^ 0xFFFFFFFF))
        write_exactly(self._file.fileno(), [data], self.range_of(block)[0], self.path)
        write_exactly(self._file.fileno(), [record], self._records + block * _RECORD.size, self.path)

    @contextmanager
    def claimed(self, blocks: Iterable[int]) -> Iterator[Claims]:
        """Claim those of some blocks that nobody else has claimed, for the length of a ``with`` block.

        Claims end with their process. Where a system cannot lock ranges of a file, everybody can claim a block.

        Raises:
            OSError: the file cannot be opened or locked.
        """
        if not system.can_lock_ranges():
            yield Claims(self, None, list(blocks))
            return
        # Locks are those of an open file, so each claim opens it: threads and forked processes exclude each other too.
        with system.open_again(self._file) as file:
            try:
                yield Claims(self, file, [block for block in blocks if self._lock(file, block)])
            finally:
                system.unlock_range(file.fileno(), 0, 0)

    def _lock(self, file: system.File, block: int) -> bool:
        start, stop = self.range_of(block)
        return system.lock_range(file.fileno(), start, stop - start)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Claims:
    """Blocks that only this thread fetches.

    Args:
        owner: the blocks of the file.
        file: the open file that holds the locks; None without locks.
        blocks: numbers of the blocks.
    """

    def __init__(self, owner: CacheBlocks, file: system.File | None, blocks: list[int]):
        self.blocks = blocks
        self._owner = owner
        self._file = file

    def end(self, block: int) -> None:
        """End the claim to one block."""
        if self._file is not None:
            start, stop = self._owner.range_of(block)
            system.unlock_range(self._file.fileno(), start, stop - start)
