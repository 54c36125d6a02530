"""The policy that chooses the size of new memory pages: the size that this machine creates faster, as measured so far.

The policy is pure: it sees bytes and seconds. ``new_memory`` creates the pages and measures.

On most machines Linux creates a huge page (2 MiB) 2 to 3 times faster than 512 small pages. On a virtual machine
that returns free memory to its host (free page reporting: Firecracker, Kata, balloons) a huge page is 2 to 6 times
slower, except for blocks that were freed a moment ago. So one machine can show both speeds within a second.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

from automodel_conv.errors import rate_text, size_text

# Each size is measured this many times before one is preferred. The lower of the two measurements counts, so one may be
# disturbed.
_TRIALS = 2
# The speed of a size is the median of this many recent measurements. Three disturbed measurements spoil a median of
# five, and on a busy machine this happens often enough to slow a load.
_RECENT = 7
# Bytes until the slower size is tried again. The gap doubles each time that it is still slower.
_FIRST_GAP_BYTES, _MOST_GAP_BYTES = 32 << 20, 256 << 20
# Share of the time that may be lost with trials of the slower size.
_LOSS = 0.01


class PageChoice(NamedTuple):
    """The size to use for the next pages."""

    huge: bool
    """Huge pages or small pages."""
    is_trial: bool
    """Whether this is a trial: one block, measured by itself, perhaps with the slower size."""


class PageUse(NamedTuple):
    """The new memory of a load by page size, and the last measured speed of each size."""

    huge_bytes: int = 0
    """Bytes for which the load asked for huge pages."""
    small_bytes: int = 0
    """Bytes for which the load asked for small pages."""
    huge_gb_per_s: float | None = None
    """Speed of huge pages: 10^9 bytes per second of one thread, or None if it was not measured."""
    small_gb_per_s: float | None = None
    """Speed of small pages, in the same unit."""

    def __str__(self) -> str:
        nbytes = self.huge_bytes + self.small_bytes
        if not nbytes:
            return "no new memory of 4 MiB or more"
        sizes = (("huge", self.huge_bytes, self.huge_gb_per_s), ("small", self.small_bytes, self.small_gb_per_s))
        parts = [
            f"{size} pages for {size_bytes / nbytes:.0%}" + (f" ({rate_text(speed)})" if speed else "")
            for size, size_bytes, speed in sorted(sizes, key=lambda size: -size[1])
            if size_bytes
        ]
        return f"{', '.join(parts)} of {size_text(nbytes)}"


class PagePolicy:
    """The choice of page sizes for one load, by measurement or fixed.

    The policy tries both sizes first, then stays with the faster one, and tries the slower one again now and then.

    Args:
        huge: the size of all choices; None chooses by measurement.
    """

    def __init__(self, huge: bool | None = None):
        self._fixed = huge
        self._trials = {True: 0, False: 0}
        self._recent: dict[bool, deque[float]] = {huge: deque(maxlen=_RECENT) for huge in (True, False)}
        self._recorded_bytes = {True: 0, False: 0}
        self._gap_bytes, self._since_trial_bytes = _FIRST_GAP_BYTES, 0
        self._total_seconds = self._lost_seconds = 0.0

    def choose(self, nbytes: int, may_try: bool = True) -> PageChoice:
        """Choose the size of the next pages.

        Args:
            nbytes: bytes that a trial would create.
            may_try: whether this choice may be a trial. Otherwise it is the size that is faster so far.
        """
        if self._fixed is not None:
            return PageChoice(self._fixed, False)
        if not may_try:
            return PageChoice(self._faster(), False)
        if min(self._trials.values()) < _TRIALS or not all(self._recent.values()):
            return self._trial(self._trials[True] <= self._trials[False])
        best = self._faster()
        loss = (self._seconds_per_byte(not best) - self._seconds_per_byte(best)) * nbytes
        may_lose = _LOSS * self._total_seconds - self._lost_seconds
        if self._since_trial_bytes >= self._gap_bytes and loss <= may_lose:
            return self._trial(not best)
        return PageChoice(best, False)

    def settle(self) -> None:
        """Keep the size that is faster so far, or huge pages if nothing was measured; a fixed size stays."""
        self._fixed = self._faster() if self._fixed is None else self._fixed

    def record(self, choice: PageChoice, nbytes: int, seconds: float | None) -> None:
        """Record pages that were created, and the time that this took.

        Args:
            choice: the choice that the pages follow.
            nbytes: bytes of the pages.
            seconds: seconds that one thread took; None if they were not measured or are no measure of the size.
        """
        self._recorded_bytes[choice.huge] += nbytes
        if seconds is None:
            return
        if self._fixed is not None:
            self._recent[choice.huge].append(seconds / nbytes)
            return
        both_measured = all(self._recent.values())
        best = self._faster() if both_measured else choice.huge
        self._recent[choice.huge].append(seconds / nbytes)
        self._total_seconds += seconds
        self._since_trial_bytes += nbytes
        if not both_measured:
            return
        if self._faster() != best:
            self._gap_bytes = _FIRST_GAP_BYTES
        elif choice.is_trial and choice.huge != best and min(self._trials.values()) >= _TRIALS:
            self._gap_bytes = min(2 * self._gap_bytes, _MOST_GAP_BYTES)
            self._lost_seconds += max(0.0, seconds - self._seconds_per_byte(best) * nbytes)

    def use(self) -> PageUse:
        """Return the pages recorded so far."""
        speeds = [
            1e-9 / max(self._seconds_per_byte(huge), 1e-12) if self._recent[huge] else None for huge in (True, False)
        ]
        return PageUse(self._recorded_bytes[True], self._recorded_bytes[False], *speeds)

    def _trial(self, huge: bool) -> PageChoice:
        self._trials[huge] += 1
        self._since_trial_bytes = 0
        return PageChoice(huge, True)

    def _faster(self) -> bool:
        return self._seconds_per_byte(True) <= self._seconds_per_byte(False)

    def _seconds_per_byte(self, huge: bool) -> float:
        """Return the lower median of recent measurements, so that one disturbed measurement of two does not count."""
        return statistics.median_low(self._recent[huge]) if self._recent[huge] else 0.0
