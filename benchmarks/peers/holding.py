"""A process that allocates memory in small pages and frees 15 of 16 pages, so that no free block is large.

    python -m benchmarks.peers.holding NBYTES

It does so for each line that it reads, then prints ``held``, and holds the rest until its input ends.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy

_EVERY = 16
"""Number of pages between two held ones. A free block is then smaller than 64 KiB."""


def main() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first process to be killed if memory runs out
    nbytes = int(sys.argv[1]) // (_EVERY * mmap.PAGESIZE) * _EVERY * mmap.PAGESIZE
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    pages = numpy.frombuffer(memory, numpy.uint8)[:: mmap.PAGESIZE]
    for _ in sys.stdin:
        pages[:] = 1
        for start in range(0, nbytes, _EVERY * mmap.PAGESIZE):
            memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, (_EVERY - 1) * mmap.PAGESIZE)
        sys.stdout.write("held\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
