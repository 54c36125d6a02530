"""The policy that chooses how many threads read: more than the cores, if threads wait and more of them read faster.

Threads wait for a disk or a network. Pure: bytes and seconds in, a number of threads out.
"""

from __future__ import annotations

# The minimum of one measurement: bytes, jobs of each thread, and seconds.
_WINDOW_BYTES, _WINDOW_JOBS, _WINDOW_SECONDS = 32 << 20, 2, 0.05
# Threads that wait for a smaller share of their time are limited by the cores.
_LEAST_WAITING = 0.6
# More threads stay if they read faster by this factor.
_GAIN = 1.25
# Measurements until more threads are tried again. The pause doubles each time that they do not help.
_FIRST_PAUSE, _MOST_PAUSE = 8, 128


class ThreadPolicy:
    """The number of threads of one load, chosen by the speed of its past jobs.

    Args:
        threads: initial and smallest number of threads.
        most: largest number of threads.
    """

    def __init__(self, threads: int, most: int):
        self.threads = threads
        self.most = most
        self._before: tuple[int, float] | None = None  # threads and bytes per second before more threads were tried
        self._pause, self._next_pause = 0, _FIRST_PAUSE
        self._start: float | None = None
        self._nbytes = self._jobs = 0
        self._waiting_seconds = self._seconds = 0.0

    def record(self, nbytes: int, waiting_seconds: float, seconds: float, now: float) -> None:
        """Record a finished job; the end of a measurement may change ``threads``.

        Args:
            nbytes: bytes that the job read.
            waiting_seconds: seconds that its thread waited for anything other than a core.
            seconds: seconds that the job took.
            now: time at which the job ended, in seconds of any clock.
        """
        if self._start is None:
            self._start = now - seconds
        self._nbytes += nbytes
        self._waiting_seconds += waiting_seconds
        self._seconds += seconds
        self._jobs += 1
        window = now - self._start
        enough = self._nbytes >= _WINDOW_BYTES and self._jobs >= _WINDOW_JOBS * self.threads
        if enough and window >= _WINDOW_SECONDS:
            self._decide(self._nbytes / window, self._waiting_seconds / max(self._seconds, 1e-9))
            self._start = now
            self._nbytes = self._jobs = 0
            self._waiting_seconds = self._seconds = 0.0

    def _decide(self, speed: float, waiting_share: float) -> None:
        """Choose the number of threads for the next measurement.

        Args:
            speed: bytes per second of the last measurement.
            waiting_share: share of their time that threads waited, from 0 to 1.
        """
        if self._before is not None:
            threads, speed_before = self._before
            self._before = None
            if speed < _GAIN * speed_before:
                self.threads = threads
                self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _MOST_PAUSE)
                return
        if self._pause:
            self._pause -= 1
        elif waiting_share >= _LEAST_WAITING and self.threads < self.most:
            self._before = self.threads, speed
            self.threads = min(2 * self.threads, self.most)
