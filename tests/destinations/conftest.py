"""Fixtures: a checkpoint, several devices on a machine that has none, and a record of reads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.destinations import device_map as device_map_module
from automodel_conv.destinations.devices import as_device, loadable
from automodel_conv.execution import device as streaming
from automodel_conv.execution import filling, mapping
from automodel_conv.execution import host as cpu
from automodel_conv.execution.buffers import allocate
from tests.destinations.support import TENSORS
from tests.execution.elsewhere import Devices, put


@pytest.fixture
def published(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Record all reads of tensor data."""
    seen = []
    for module in (cpu, streaming):
        stock = module.read

        def noted(reads, *how, stock=stock):
            seen.append(reads)
            return stock(reads, *how)

        monkeypatch.setattr(module, "read", noted)
    return seen


@pytest.fixture
def devices(monkeypatch):
    """Simulate two CUDA devices, ``FIRST`` and ``SECOND``, in host memory."""
    simulated, empty_like = Devices(), torch.empty_like

    def simulated_loadable(device, where=None):
        device = as_device(device, where)
        return (
            torch.device("xpu", device.index or 0)
            if device.type == "cuda" and (device.index or 0) < 2
            else loadable(device, where)
        )

    def allocate_there(targets, device="cpu"):
        return {name: put(tensor, torch.device(device)) for name, tensor in allocate(targets).items()}

    def empty_like_there(tensor, *, device):
        return put(empty_like(tensor, device="cpu"), torch.device(device))

    monkeypatch.setattr(device_map_module, "loadable", simulated_loadable)
    monkeypatch.setattr(filling, "transfer_device", simulated)
    monkeypatch.setattr(mapping, "allocate", allocate_there)
    monkeypatch.setattr(torch, "empty_like", empty_like_there)
    return simulated
