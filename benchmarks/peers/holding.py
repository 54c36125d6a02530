"""A process that takes memory in small pages and gives back 15 of 16 pages, so that no free block is large.

    python -m benchmarks.peers.holding NBYTES

It does so at each line that it reads, then prints ``held``, and holds the rest until its input ends.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy

_EVERY = 16
"""Pages. A free block is below 64 KiB then."""


def main() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to be killed, if it comes to that
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
