"""How many threads shall read: more than there are cores where they wait for a disk or a network, and that helps.

Pure: bytes and seconds in, a number of threads out.
"""

from __future__ import annotations

# One measurement takes at least so many bytes, jobs of each thread, and seconds.
_WINDOW_BYTES, _WINDOW_JOBS, _WINDOW_SECONDS = 32 << 20, 2, 0.05
# Threads that wait for less of their time are as fast as the cores.
_LEAST_WAITING = 0.6
# More threads stay if they read faster by this.
_GAIN = 1.25
# Measurements until more threads are tried again; doubled each time that they do not help.
_FIRST_PAUSE, _MOST_PAUSE = 8, 128


class ThreadPolicy:
    """The number of threads of one load, by what they have read.

    Args:
        threads: to begin with, and never fewer.
        most: never more.
    """

    def __init__(self, threads: int, most: int):
        self.threads = threads
        self.most = most
        self._before: tuple[int, float] | None = None  # threads and bytes a second before more were tried
        self._pause, self._next_pause = 0, _FIRST_PAUSE
        self._begin: float | None = None
        self._nbytes = self._jobs = 0
        self._waiting_seconds = self._seconds = 0.0

    def record(self, nbytes: int, waiting_seconds: float, seconds: float, now: float) -> None:
        """Take note of a job.

        Args:
            waiting_seconds: of its thread, for anything but a core.
            now: when it ended, in seconds by any clock.
        """
        if self._begin is None:
            self._begin = now - seconds
        self._nbytes += nbytes
        self._waiting_seconds += waiting_seconds
        self._seconds += seconds
        self._jobs += 1
        window = now - self._begin
        enough = self._nbytes >= _WINDOW_BYTES and self._jobs >= _WINDOW_JOBS * self.threads
        if enough and window >= _WINDOW_SECONDS:
            self._decide(self._nbytes / window, self._waiting_seconds / max(self._seconds, 1e-9))
            self._begin = now
            self._nbytes = self._jobs = 0
            self._waiting_seconds = self._seconds = 0.0

    def _decide(self, speed: float, waiting: float) -> None:
        if self._before is not None:
            threads, speed_before = self._before
            self._before = None
            if speed < _GAIN * speed_before:
                self.threads = threads
                self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _MOST_PAUSE)
                return
        if self._pause:
            self._pause -= 1
        elif waiting >= _LEAST_WAITING and self.threads < self.most:
            self._before = self.threads, speed
            self.threads = min(2 * self.threads, self.most)
