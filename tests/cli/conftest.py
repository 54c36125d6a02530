"""Fixtures of checkpoints for the command line."""

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.cli.demo import TINY
from automodel_conv.cli.demo_process import write_checkpoint
from automodel_conv.files import system


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    write_checkpoint(TINY, str(directory))
    return directory


@pytest.fixture
def plain(tmp_path):
    save_file(
        {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.fixture
def no_tensor_data(monkeypatch):
    """Fail every read of a weights file beyond its header. The index holds no tensor data."""

    def preadv(fd, views, offset):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(".safetensors"):
            header = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
            if offset + sum(map(len, views)) > header:
                raise AssertionError(f"{path}: read beyond the header")
        return os.preadv(fd, views, offset)

    if sys.platform != "linux":
        pytest.skip("looks up the file of a descriptor in /proc")
    monkeypatch.setattr(system, "preadv", preadv)
