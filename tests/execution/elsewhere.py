"""Several devices on a machine that has none: tensors in host memory that report another device."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.execution.simulated import SimulatedDevice

FIRST, SECOND, HOST = torch.device("xpu", 0), torch.device("xpu", 1), torch.device("cpu")


class Elsewhere(Tensor):
    """A tensor in host memory that reports another device. Results of operations on it are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.where

    def detach(self) -> Tensor:
        return put(super().detach(), self.where)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the same memory, visibly on another device."""
    if device.type == "cpu":
        return tensor
    moved = torch.Tensor._make_subclass(Elsewhere, tensor, tensor.requires_grad)
    moved.where = device
    return moved


class Devices(dict):
    """Simulated devices, created on demand; a replacement for ``cuda.transfer_device``."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def __missing__(self, device: torch.device) -> SimulatedDevice:
        self[device] = SimulatedDevice(seed=len(self), **self.options)
        return self[device]

    def __call__(self, device: torch.device) -> SimulatedDevice | None:
        return None if device.type == "cpu" else self[device]
