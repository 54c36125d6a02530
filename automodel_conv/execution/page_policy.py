"""Which size the pages of new memory shall have: the one that this machine makes faster, by what it has taken so far.

Pure: choices out, bytes and seconds in. ``new_memory`` makes the pages and measures.

On most machines a huge page (2 MiB) is made 2 to 3 times faster than 512 small ones. On a virtual machine whose free
memory goes back to the host (free page reporting: Firecracker, Kata, balloons) it is 2 to 6 times slower, but for
blocks that were freed a moment ago; so one machine can be both within a second.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

# Each size is tried this often before one is preferred. Of two measurements the lower one counts, so one may be
# disturbed.
_TRIES = 2
# As many of the last measurements tell how fast a size is. With five, three disturbed ones come together often enough
# to slow a load on a busy machine.
_RECENT = 7
# Bytes until the other size is tried again; doubled each time that it is still slower.
_FIRST_GAP_BYTES, _MOST_GAP_BYTES = 32 << 20, 256 << 20
# Part of the time that may be lost with such tries.
_LOSS = 0.01


class PageChoice(NamedTuple):
    """The size of the next pages."""

    huge: bool
    is_trial: bool
    """Whether this is to be measured alone: the other size may be the faster one."""


class PageUse(NamedTuple):
    """New memory by the size of pages that a load has asked for, and how fast each size was when last measured."""

    huge_bytes: int = 0
    small_bytes: int = 0
    huge_gb_per_s: float | None = None
    """10^9 bytes per second of one thread; None where none was measured."""
    small_gb_per_s: float | None = None

    def __str__(self) -> str:
        nbytes = self.huge_bytes + self.small_bytes
        if not nbytes:
            return "no new memory of 4 MiB or more"
        sizes = (("huge", self.huge_bytes, self.huge_gb_per_s), ("small", self.small_bytes, self.small_gb_per_s))
        said = [
            f"{size} pages for {made / nbytes:.0%}" + (f" ({speed:.1f} GB/s)" if speed else "")
            for size, made, speed in sorted(sizes, key=lambda size: -size[1])
            if made
        ]
        return f"{', '.join(said)} of {nbytes / 1e9:.2f} GB"


class PagePolicy:
    """Choices for one load. First both sizes in turn, then the faster one, and now and then the other one again.

    Args:
        huge: what every choice shall be; None: by measuring.
    """

    def __init__(self, huge: bool | None = None):
        self._fixed = huge
        self._tries = {True: 0, False: 0}
        self._recent: dict[bool, deque[float]] = {huge: deque(maxlen=_RECENT) for huge in (True, False)}
        self._made = {True: 0, False: 0}
        self._gap_bytes, self._since_try_bytes = _FIRST_GAP_BYTES, 0
        self._seconds = self._lost_seconds = 0.0

    def choose(self, nbytes: int, may_try: bool = True) -> PageChoice:
        """The size of the next pages.

        Args:
            nbytes: that a try would make.
            may_try: whether the size may be another one than the one that is faster so far.
        """
        if self._fixed is not None:
            return PageChoice(self._fixed, False)
        if not may_try:
            return PageChoice(self._faster(), False)
        if min(self._tries.values()) < _TRIES or not all(self._recent.values()):
            return self._try(self._tries[True] <= self._tries[False])
        best = self._faster()
        loss = (self._seconds_a_byte(not best) - self._seconds_a_byte(best)) * nbytes
        may_lose = _LOSS * self._seconds - self._lost_seconds
        if self._since_try_bytes >= self._gap_bytes and loss <= may_lose:
            return self._try(not best)
        return PageChoice(best, False)

    def settle(self) -> None:
        """Stay with the faster size from now on, huge pages if none was measured, unless a size is given."""
        self._fixed = self._faster() if self._fixed is None else self._fixed

    def record(self, choice: PageChoice, nbytes: int, seconds: float | None) -> None:
        """Take note of pages that were asked for, and of the seconds that one thread took to make them.

        Args:
            seconds: None if they say nothing of the size, or are not known.
        """
        self._made[choice.huge] += nbytes
        if seconds is None:
            return
        if self._fixed is not None:
            self._recent[choice.huge].append(seconds / nbytes)
            return
        known = all(self._recent.values())
        best = self._faster() if known else choice.huge
        self._recent[choice.huge].append(seconds / nbytes)
        self._seconds += seconds
        self._since_try_bytes += nbytes
        if not known:
            return
        if self._faster() != best:
            self._gap_bytes = _FIRST_GAP_BYTES
        elif choice.is_trial and choice.huge != best and min(self._tries.values()) >= _TRIES:
            self._gap_bytes = min(2 * self._gap_bytes, _MOST_GAP_BYTES)
            self._lost_seconds += max(0.0, seconds - self._seconds_a_byte(best) * nbytes)

    def use(self) -> PageUse:
        """The pages made so far."""
        speeds = [
            1e-9 / max(self._seconds_a_byte(huge), 1e-12) if self._recent[huge] else None for huge in (True, False)
        ]
        return PageUse(self._made[True], self._made[False], *speeds)

    def _try(self, huge: bool) -> PageChoice:
        self._tries[huge] += 1
        self._since_try_bytes = 0
        return PageChoice(huge, True)

    def _faster(self) -> bool:
        return self._seconds_a_byte(True) <= self._seconds_a_byte(False)

    def _seconds_a_byte(self, huge: bool) -> float:
        """The lower median, so that of two measurements a disturbed one does not count."""
        return statistics.median_low(self._recent[huge]) if self._recent[huge] else 0.0
