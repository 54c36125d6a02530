"""Answers of tensors without data to questions about their memory, as if they had data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from automodel_conv.planning.loader_writes import key_of

CPU = torch.device("cpu")
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
"""The function that sets the attribute ``data`` of a tensor."""
DEVICES: Mapping[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_meta.__get__: lambda device: device.type == "meta",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
}
"""Questions about the device of a tensor, and the answer by device."""
_ALIGNED = 4096


class Addresses:
    """Addresses of tensors without data, which have none: no two storages overlap."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._next = _ALIGNED

    def of(self, tensor: Tensor) -> int:
        """Return the address of a tensor, which is kept so that no other storage gets its key."""
        key = key_of(tensor)
        if key not in self._starts:
            self._kept.append(tensor)
            self._starts[key] = self._next
            self._next += (tensor.untyped_storage().nbytes() // _ALIGNED + 1) * _ALIGNED
        return self._starts[key] + int(tensor.storage_offset()) * tensor.element_size()
