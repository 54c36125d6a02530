"""``python -m pytest -p tests.software_gpu.plugin tests/gpu tests/software_gpu``: tests/gpu at real sizes, on a CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch

from tests.software_gpu.seams import SoftwareGpu, install

current: SoftwareGpu | None = None
"""Where the tests of tests/gpu run, once they do."""


@pytest.fixture(scope="session", autouse=True)
def _software_gpu_for_all() -> Iterator[None]:
    global current
    torch.set_num_threads(1)  # of many small copies
    gc.freeze()  # all that was imported, which is not looked through for tensors again and again
    with pytest.MonkeyPatch.context() as patch:
        current = install(patch)
        yield
    current = None
    gc.unfreeze()
