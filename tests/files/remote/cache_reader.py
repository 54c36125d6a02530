"""Processes that read a whole file of a web server through a directory, as a load does.

    python -m tests.files.remote.cache_reader URL DIRECTORY PROCESSES [--fork]

One process imports everything, then forks the readers. Each prints its number when it begins to read, and then the
CRC-32 of the bytes. With ``--fork`` a reader reads half of the file, forks, and both then read all of it.
``open_through`` and ``read_all`` are for tests in their own process.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import zlib
from collections import deque

from automodel_conv.files.remote.folders import find_folder
from automodel_conv.files.remote.node_cache import CachedFile
from automodel_conv.files.source import OpenSource, opened

NAME = "model.safetensors"
GROUP_BYTES = 16 << 20
READ_BYTES = 3 << 20


def open_through(url: str, directory: object, name: str = NAME) -> CachedFile:
    """Return a file of a server, of which the first bytes have been read as its header."""
    folder = find_folder(url, "", None)
    source = CachedFile(folder.file(name, 4096, None), str(directory))
    with opened(source) as file:
        file.read_into([memoryview(bytearray(8))], 0)
    return source


def read_all(source: CachedFile, threads: int = 4, part: float = 1.0) -> bytearray:
    """Return the bytes of a file, which threads read group after group; the rest is poison."""
    with opened(source) as file:
        data = bytearray(b"\xa5" * file.size())
        todo = deque(range(0, int(part * len(data)), GROUP_BYTES))
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while todo:
                    start = todo.popleft()
                    read_group(file, memoryview(data), start, min(start + GROUP_BYTES, len(data)))
            except IndexError:
                pass
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for error in errors:
            raise error
    return data


def read_group(file: OpenSource, data: memoryview, start: int, stop: int) -> None:
    """Read a range in several steps, as the jobs of a group do."""
    file.expect([(start, stop)])
    for first in range(start, stop, READ_BYTES):
        last = min(first + READ_BYTES, stop)
        middle = (first + last) // 2
        file.read_into([data[first:middle], data[middle:last]], first)


def main() -> None:
    url, directory, processes, *options = sys.argv[1:]
    readers = [_forked(url, directory, "--fork" in options) for _ in range(int(processes))]
    for reader in readers:
        os.waitpid(reader, 0)


def _forked(url: str, directory: str, forks: bool) -> int:
    reader = os.fork()
    if reader:
        return reader
    try:
        source = open_through(url, directory)
        os.write(1, b"%d\n" % os.getpid())
        child = 0
        if forks:
            read_all(source, part=0.5)
            child = os.fork()
        os.write(1, b"crc %d\n" % zlib.crc32(read_all(source)))
        if child:
            os.waitpid(child, 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
