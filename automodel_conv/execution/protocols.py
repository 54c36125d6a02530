"""The protocols of a device: its memory, streams and events. Tests implement them by a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Return once all that was queued before this point is done; raise what it failed with."""


class Stream(Protocol):
    """A queue of a device, worked off in order."""

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies ``(dst, src)`` of bytes between pinned memory and the device; returns at once."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` launches."""

    def scratch(self, nbytes: int) -> Tensor:
        """Device memory that only this stream uses, uint8 ``[nbytes]``, at a multiple of 256."""
        ...

    def record(self, event: Any = None) -> Event:
        """An event after all that is queued; one that is given is moved there. What waits for it already is not."""
        ...

    def wait(self, event: Any) -> None:
        """Queue that what follows waits for an event of another stream."""


class Device(Protocol):
    """Memory and streams; memory is given back when no tensor holds it."""

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory that the device can read by itself, uint8 ``[nbytes]``."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Device memory, uint8 ``[nbytes]``, at a multiple of 256."""
        ...

    def stream(self) -> Stream:
        """A new stream, behind what has been queued on the current one."""
        ...
