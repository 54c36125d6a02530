"""The protocols of a device: its memory, its streams and its events; tests implement them with a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor


class Event(Protocol):
    """A point in the queue of a stream."""

    def synchronize(self) -> None:
        """Wait until all work queued before this point is done; raise the error that the work failed with."""


class Stream(Protocol):
    """A queue of a device, which runs its work in order."""

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies ``(dst, src)`` of bytes between pinned memory and the device, and return at once."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue everything that ``work`` launches."""

    def scratch(self, nbytes: int) -> Tensor:
        """Allocate device memory that only this stream uses, uint8 ``[nbytes]``, at a multiple of 256."""
        ...

    def record(self, event: Any = None) -> Event:
        """Record an event after everything that is queued, and return it.

        Args:
            event: an event of this stream to record again. Work that already waits for it keeps waiting for its earlier
                point.
        """
        ...

    def wait(self, event: Any) -> None:
        """Make everything queued from now on wait for an event of another stream."""


class Device(Protocol):
    """A source of memory and streams; memory is freed when no tensor holds it."""

    def pinned(self, nbytes: int) -> Tensor:
        """Allocate pinned host memory, uint8 ``[nbytes]``."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Allocate device memory, uint8 ``[nbytes]``, at a multiple of 256."""
        ...

    def stream(self) -> Stream:
        """Create a stream that waits for what is queued on the current one."""
        ...
