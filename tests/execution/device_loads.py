"""Loads by the streaming loader, with a check that nothing is left behind."""

from __future__ import annotations

import gc
import inspect
import threading
import types
from typing import NamedTuple

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ReadError
from automodel_conv.execution import device as streaming
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.workers import Stopped
from automodel_conv.testing import assert_bytes_equal, guarded
from tests.execution.simulated import DeviceFault

SMALL = {"scratch_bytes": 8192, "device_scratch_bytes": 8192}


class Case(NamedTuple):
    checkpoint: object
    plan: object
    expected: dict


def load(case, device, **options):
    """Load into poisoned, guarded buffers, and compare them if the load returns."""
    guards = {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in case.plan.targets}
    function = options.pop("load_to_device", load_to_device)
    options = {"backend": "torch", **SMALL, **options}
    buffers = {name: guard.tensor for name, guard in guards.items()}
    try:
        stats = function(case.plan, case.checkpoint, buffers, device, **options)
        for name, tensor in buffers.items():
            assert_bytes_equal(tensor, case.expected[name])
        return stats
    except (ReadError, DeviceFault, Stopped) as error:
        text = "".join([str(error), *getattr(error, "__notes__", ())])
        assert "filled:" in text
        for name in (line.strip() for line in text.partition("filled:")[2].splitlines()[1:] if line.startswith("    ")):
            assert_bytes_equal(buffers[name], case.expected[name])
        raise
    finally:
        for guard in guards.values():
            guard.check()


def assert_released(device, calls):
    assert device.idle
    assert not calls.open
    assert not [t for t in threading.enumerate() if t.name.startswith("automodel_conv")]
    if device.live:
        gc.collect()
    assert device.live == 0


def planted(text, replacement):
    """Return the loader with a fault in it."""
    source = inspect.getsource(streaming)
    assert source.count(text) == 1
    mutated = types.ModuleType("mutated")
    exec(compile(source.replace(text, replacement), "mutated", "exec"), mutated.__dict__)
    return mutated
