"""The few names of the package that are replaced so that the CPU acts as a GPU."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import automodel_conv
from automodel_conv.execution import copy_batch, cuda
from automodel_conv.files import system
from automodel_conv.kernels import launch
from tests.execution import simulated
from tests.software_gpu import device as devices
from tests.software_gpu.accesses import GpuFault
from tests.software_gpu.device import SoftwareDevice
from tests.software_gpu.executor import Executor, as_kernels_count
from tests.software_gpu.memory import Allocations


class SoftwareGpu:
    """A GPU in host memory: CPU tensors are its own, except within ``on_host``.

    Attributes:
        devices: all devices that loads and saves have asked for, each with its own seed.
    """

    def __init__(self) -> None:
        self.memory = Allocations()
        self.executor = Executor(self.memory)
        self.devices: list[SoftwareDevice] = []
        self.is_on = True

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Run the enclosed code on the CPU's own executors."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before

    def new_device(self, **how: Any) -> SoftwareDevice:
        seed = len(self.devices)
        self.devices.append(SoftwareDevice(self.memory, **({"seed": seed, "eagerness": (0, 0.3, 0.9)[seed % 3]} | how)))
        return self.devices[-1]


def install(patch: pytest.MonkeyPatch) -> SoftwareGpu:
    """Run kernels on CPU tensors, and stream to and from them. Triton's interpreter must be on."""
    from automodel_conv.kernels import jit

    assert jit.INTERPRETED
    gpu = SoftwareGpu()

    def run(variant: Any, grid: Any, table: Any, integers: Any) -> None:
        devices.touch(gpu.executor.launch(variant, grid, table, integers))

    patch.setattr(launch, "queue", run)

    def stand_in(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
        """Replace a function wherever the package has imported it by name."""

        def put(replacement: Callable[..., Any]) -> None:
            replacement = functools.wraps(stock)(replacement)
            for module in _package():
                for name, value in list(vars(module).items()):
                    if value is stock:
                        patch.setattr(module, name, replacement)

        return put

    uses_kernels, transfer_device, compile_ahead, start = (
        copy_batch.uses_kernels,
        cuda.transfer_device,
        launch.compile_ahead,
        launch.start,
    )

    @stand_in(start)
    def _(*works: Any) -> None:
        for variant, geometry, *_ in (one for work in works for one in work.launches):
            if as_kernels_count(variant, variant.kernel.in_vectors(variant, geometry)) != geometry:
                raise GpuFault(f"{variant} cannot count {geometry} in its vectors")
        start(*works)

    @stand_in(uses_kernels)
    def _(backend: str, tensors: Any) -> bool:
        return uses_kernels("triton" if backend == "auto" and gpu.is_on else backend, tensors)

    @stand_in(transfer_device)
    def _(device: torch.device) -> Any:
        return gpu.new_device() if gpu.is_on and device.type == "cpu" else transfer_device(device)

    @stand_in(compile_ahead)
    def _(*arguments: Any) -> None:
        with gpu.executor.compiling_ahead():
            compile_ahead(*arguments)

    synchronize = simulated.Event.synchronize

    def waited(event: simulated.Event) -> None:
        position = event.position  # an event may be recorded again
        synchronize(event)
        if isinstance(event.stream, devices.Stream):
            device = event.stream.device
            with device.lock:
                device.known_to_host = devices.later(device.known_to_host, event.stream.clock(position))

    patch.setattr(simulated.Event, "synchronize", waited)
    preadv = system.preadv

    def read(fd: int, views: list[memoryview], offset: int) -> int:
        for view in views:
            start = np.frombuffer(view, np.uint8).ctypes.data
            for device in gpu.devices:
                device.host_writes(start, start + view.nbytes)
        return preadv(fd, views, offset)

    patch.setattr(system, "preadv", read)
    return gpu


def _package() -> list[Any]:
    """Return all modules of the package that need the replacements."""
    for part in ("execution", "kernels"):
        folder = importlib.import_module(f"automodel_conv.{part}")
        for module in pkgutil.iter_modules(folder.__path__, f"automodel_conv.{part}."):
            importlib.import_module(module.name)
    importlib.import_module("automodel_conv.in_memory")
    return [module for name, module in list(sys.modules.items()) if name.startswith(automodel_conv.__name__)]
