"""The place where these tests run, and their size: a GPU, the software GPU of tests/software_gpu or the interpreter."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import pytest
import torch

_PLUGIN = "tests.software_gpu.plugin"


class Place(Enum):
    GPU = "a GPU"
    SOFTWARE_GPU = "the software GPU"
    INTERPRETER = "Triton's interpreter"


def _place() -> Place:
    if _PLUGIN in sys.modules:
        return Place.SOFTWARE_GPU
    return Place.GPU if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else Place.INTERPRETER


PLACE = _place()
FULL_SIZES = PLACE is not Place.INTERPRETER
needs_gpu_memory = pytest.mark.skipif(PLACE is Place.INTERPRETER, reason="the interpreter has no memory of a device")


@contextmanager
def on_host() -> Iterator[None]:
    """Run the enclosed loads and saves on the CPU's executors, even if the CPU acts as a GPU."""
    if PLACE is Place.SOFTWARE_GPU:
        with sys.modules[_PLUGIN].current.on_host():
            yield
    else:
        yield


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes of device memory that tensors hold."""
    gc.collect()
    if PLACE is Place.SOFTWARE_GPU:
        return sys.modules[_PLUGIN].current.memory.allocated_bytes()
    return torch.cuda.memory_allocated(device)
