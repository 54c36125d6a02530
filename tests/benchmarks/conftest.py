"""Fixtures for tests of ``python -m benchmarks.gpu``: its requirements, and a run of its stages."""

import pytest

from automodel_conv.upstream.registry import transformers_available
from benchmarks.gpu import stages
from benchmarks.gpu.listening import Place
from benchmarks.gpu.record import Record


@pytest.fixture
def needs_both():
    pytest.importorskip("triton")
    if not transformers_available():
        pytest.skip("the command builds transformers models")


@pytest.fixture
def run(tmp_path):
    record = Record.new(tmp_path / "gpu.json")
    return stages.Run("cuda:0", False, "tests/gpu", 3, tmp_path, Place({}, tmp_path / "log"), record)
