"""A pytest plugin that runs tests/gpu at real sizes on a CPU.

``python -m pytest -p tests.software_gpu.plugin tests/gpu tests/software_gpu``
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch

from tests.software_gpu.seams import SoftwareGpu, install

current: SoftwareGpu | None = None
"""The place where the tests of tests/gpu run, once they are imported."""


@pytest.fixture(scope="session", autouse=True)
def _software_gpu_for_all() -> Iterator[None]:
    global current
    torch.set_num_threads(1)  # the copies are many and small
    gc.freeze()  # keeps scans for tensors from visiting every import
    with pytest.MonkeyPatch.context() as patch:
        current = install(patch)
        yield
    current = None
    gc.unfreeze()
