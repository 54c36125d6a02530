"""Helpers that write files to map."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from automodel_conv.dtypes import dtype_code
from automodel_conv.testing import POISON


def write(directory: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def write_by_hand(directory: Path, pad: int, **tensors: torch.Tensor) -> Path:
    """Write a file with tensors in the given order and ``pad`` extra spaces in its header."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        entry = {"dtype": dtype_code(tensor.dtype), "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def total(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def overwrite(tensors) -> None:
    for tensor in tensors.values():
        tensor.detach().reshape(-1).view(torch.uint8).fill_(POISON)


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors")}
