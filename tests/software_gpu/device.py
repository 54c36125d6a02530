"""The late device of ``tests/execution/simulated.py`` with kernels, which also checks its streams for races.

A race is when two streams, or a stream and the host, touch the same bytes without an event between them. The bytes may
come out right, as they mostly would on a GPU, but here a race is a fault.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.execution.buffers import span_bytes
from tests.execution import simulated
from tests.software_gpu.accesses import Box, GpuFault, conflict
from tests.software_gpu.memory import Allocations, Touched

_at_work = threading.local()

Clock = dict[int, int]  # operations done, by number of the stream


class _Done:
    """An operation of a stream that was done, and the boxes that it touched."""

    def __init__(self) -> None:
        self._touched: list[Touched] = []

    def touch(self, touched: Sequence[Touched]) -> None:
        self._touched += touched

    def boxes(self) -> list[Box]:
        """Return the touched boxes, except those in memory that was freed since and may have a new owner."""
        return [touched.box for touched in self._touched if touched.is_alive]


def touch(touched: Sequence[Touched]) -> None:
    """Record the boxes touched by the stream operation that this thread runs, if it runs one."""
    done = getattr(_at_work, "done", None)
    if done is not None:
        done.touch(touched)


class Stream(simulated.Stream):
    """A stream that tracks which operations are surely done before each of its own."""

    def __init__(self, device: SoftwareDevice):
        super().__init__(device)
        self.number = len(device.streams)
        self.done: list[_Done] = []
        self._known_to_host: list[Clock] = []
        self._clocks: list[Clock] = [{}]  # one after each operation

    def clock(self, position: int) -> Clock:
        """Return the operations that are done before a reached point of this stream."""
        return self._clocks[position] | {self.number: position}

    def _push(self, operation: object) -> None:
        with self.device.lock:
            self._known_to_host.append(dict(self.device.known_to_host))
            super()._push(operation)

    def step(self) -> None:
        operation = self.queue[self.finished]
        before = later(self._clocks[-1], self._known_to_host[self.finished])
        if isinstance(operation, simulated.Event):
            before = later(before, operation.stream.clock(operation.position))
        self._clocks.append(before)
        done = _Done()
        self.done.append(done)
        with working(done), _Watch(done, self.device.memory):
            super().step()
        self.device.check_alone(self, done, before)


def later(first: Clock, second: Clock) -> Clock:
    return {number: max(first.get(number, 0), second.get(number, 0)) for number in first | second}


@contextmanager
def working(done: _Done) -> Iterator[None]:
    _at_work.done = done
    try:
        yield
    finally:
        _at_work.done = None


class SoftwareDevice(simulated.SimulatedDevice):
    """A simulated device with kernels that checks for races.

    Args:
        memory: allocations in which touched addresses are looked up.
    """

    def __init__(self, memory: Allocations, seed: int = 0, eagerness: float = 0.3, **faults: int):
        super().__init__(seed, eagerness, **faults)
        self.memory = memory
        self.known_to_host: Clock = {}
        self._pinned: list[tuple[int, int, StorageWeakRef]] = []

    def pinned(self, nbytes: int) -> Tensor:
        slots = super().pinned(nbytes)
        self.memory.keep_from_kernels(slots)
        self._pinned.append((slots.data_ptr(), slots.data_ptr() + nbytes, StorageWeakRef(slots.untyped_storage())))
        return slots

    def stream(self) -> Stream:
        with self.lock:
            self.streams.append(Stream(self))
            return self.streams[-1]

    def check_alone(self, stream: Stream, done: _Done, before: Clock) -> None:
        """Keep a fault if another stream touched the boxes of ``done`` and may do so at the same time."""
        boxes = done.boxes()
        for other in self.streams if boxes else ():
            for earlier in other.done[before.get(other.number, 0) :] if other is not stream else ():
                shared = conflict_between(earlier.boxes(), boxes)
                if shared is not None and self.fault is None:
                    self.fault = f"GpuFault: two streams at once: {shared}"

    def host_writes(self, start: int, stop: int) -> None:
        """Check that bytes that the host writes are no longer being uploaded.

        Raises:
            GpuFault: an upload of them may be under way.
        """
        self._pinned = [span for span in self._pinned if not span[2].expired()]
        if not any(first < stop and start < last for first, last, _ in self._pinned):
            return
        written = Box("what the host writes", np.array([start]), (1, stop - start), (0, 1), 1, True)
        with self.lock:
            while self.eagerness and self.advance():  # either all queued work may be under way, or none of it
                pass
            for stream in self.streams:
                for done in stream.done[self.known_to_host.get(stream.number, 0) :]:
                    shared = conflict_between(done.boxes(), [written])
                    if shared is not None:
                        raise GpuFault(f"pinned memory is written while it is uploaded: {shared}")


def conflict_between(first: Sequence[Box], second: Sequence[Box]) -> str | None:
    """Return a text about a byte that one side writes and the other touches, or None."""
    for one in first:
        for two in second:
            if (one.is_written or two.is_written) and _spans_meet(one, two):
                # Each side was checked by itself: it may touch a byte twice.
                for a in _single(one):
                    for b in _single(two):
                        shared = conflict([a, b]) if _spans_meet(a, b) else None
                        if shared is not None:
                            return shared
    return None


def _spans_meet(one: Box, two: Box) -> bool:
    return bool(((one.starts[:, None] < two.stops) & (two.starts < one.stops[:, None])).any())


def _single(box: Box) -> Iterator[Box]:
    for at in range(len(box.starts)):
        yield box._replace(starts=box.starts[at : at + 1])


class _Watch(TorchDispatchMode):
    """A mode that sees what torch itself does for a stream: copies, and the steps that build tables."""

    def __init__(self, done: _Done, memory: Allocations):
        super().__init__()
        self._done, self._memory = done, memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu":
            self._memory.note(out)
        schema = func._schema
        if not any(given.alias_info and not given.alias_info.is_write for given in schema.arguments):  # else a view
            for given, value in zip(schema.arguments, args):  # noqa: B905  # the rest are defaults
                self._see(value, bool(given.alias_info and given.alias_info.is_write))
            for given in schema.arguments:
                if kwargs and given.name in kwargs:
                    self._see(kwargs[given.name], bool(given.alias_info and given.alias_info.is_write))
        return out

    def _see(self, value: object, is_written: bool) -> None:
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.numel():
                name = f"torch's {list(tensor.shape)}"
                self._memory.note(tensor)
                box = Box(name, np.array([tensor.data_ptr()]), *_flat(tensor), tensor.itemsize, is_written)
                self._done.touch([Touched(box, (StorageWeakRef(tensor.untyped_storage()),))])


def _flat(tensor: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return two dimensions with the bytes of a tensor, or its whole span if it has more."""
    size = tensor.itemsize
    sides = [(n, stride * size) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if tensor.is_contiguous():
        return (1, tensor.numel()), (0, size)
    if len(sides) > 2:
        return (1, span_bytes(tensor) // size), (0, size)
    sides = [(1, 0)] * (2 - len(sides)) + sides
    return (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])
