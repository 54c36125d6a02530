"""A software GPU for each test, whether or not the plugin has installed one for all."""

from __future__ import annotations

import pytest

from tests.software_gpu.seams import SoftwareGpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SoftwareGpu:
    pytest.importorskip("triton")
    return install(monkeypatch)
