"""A device in host memory that runs queued work as late, and its streams in as odd an order, as allowed."""

from __future__ import annotations

import random
import threading
import weakref

import torch

from automodel_conv.testing import POISON


class DeviceFault(RuntimeError):
    """The error of a planted device fault."""


class Memory(bytearray):
    """Bytes that can be observed."""


class Event:
    def __init__(self, stream, position):
        self.stream, self.position = stream, position

    @property
    def done(self):
        return self.stream.finished >= self.position

    def synchronize(self):
        device = self.stream.device
        with device.lock:
            while not self.done:
                if not device.advance():
                    raise DeviceFault("streams wait for each other")
        if device.fault is not None:
            raise DeviceFault(device.fault)


class Stream:
    def __init__(self, device):
        self.device, self.queue, self.finished = device, [], 0

    def copy_all(self, pairs):
        for dst, src in pairs:
            assert dst.numel() == src.numel() > 0
            self._push(lambda dst=dst, src=src: dst.copy_(src))

    def run(self, work):
        self._push(work)

    def scratch(self, nbytes):
        return self.device.scratch(nbytes)

    def record(self, event=None):
        with self.device.lock:
            event = event or Event(self, 0)
            event.stream, event.position = self, len(self.queue)
            return event

    def wait(self, event):
        self._push(Event(event.stream, event.position))  # a copy, because the event may be recorded again

    def _push(self, operation):
        with self.device.lock:
            self.queue.append(operation)
            while self.device.random.random() < self.device.eagerness and self.device.advance():
                pass

    @property
    def ready(self):
        if self.finished == len(self.queue):
            return False
        operation = self.queue[self.finished]
        return not isinstance(operation, Event) or operation.done

    def step(self):
        operation, self.queue[self.finished] = self.queue[self.finished], None
        if not isinstance(operation, Event) and self.device.fault is None:
            try:
                self.device.count_operation()
                with torch.inference_mode():  # a device has no modes; this one allows writes to every tensor
                    operation()
            except Exception as error:  # any queued work may fail; like a real device, it keeps the first
                self.device.fault = repr(error)
        self.finished += 1


class SimulatedDevice:
    """A device that works only when it is waited for, or now and then when work is queued.

    Args:
        eagerness: probability that it runs an operation when one is queued.
        fail_at: number of the operation, over all streams, that fails.
        fail_allocation: number of the allocation that fails.
    """

    def __init__(self, seed=0, eagerness=0.3, fail_at=-1, fail_allocation=-1):
        self.random = random.Random(seed)
        self.eagerness, self.fail_at, self.fail_allocation = eagerness, fail_at, fail_allocation
        self.lock = threading.RLock()
        self.streams, self.fault = [], None
        self.operations = self.allocations = self.live = 0
        self.pinned_bytes = self.scratch_bytes = 0

    def pinned(self, nbytes):
        self.pinned_bytes += nbytes
        return self._allocate(nbytes)

    def scratch(self, nbytes):
        self.scratch_bytes += nbytes
        return self._allocate(nbytes)

    def stream(self):
        self.streams.append(Stream(self))
        return self.streams[-1]

    @property
    def idle(self):
        return all(stream.finished == len(stream.queue) for stream in self.streams)

    def advance(self):
        """Run one operation of any stream that can. Return False if none can."""
        ready = [stream for stream in self.streams if stream.ready]
        if ready:
            self.random.choice(ready).step()
        return bool(ready)

    def count_operation(self):
        self.operations += 1
        if self.operations == self.fail_at:
            raise DeviceFault("an illegal access")

    def _allocate(self, nbytes):
        self.allocations += 1
        if self.allocations == self.fail_allocation:
            raise DeviceFault("out of memory")
        memory = Memory(bytes([POISON]) * (nbytes + 256))
        self.live += 1
        weakref.finalize(memory, self._freed)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % 256
        return whole[start : start + nbytes]

    def _freed(self):
        self.live -= 1
