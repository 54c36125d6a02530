"""Small checkpoints, and modules with grouped experts that need no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.planning.copies import SourceTable
from automodel_conv.testing import address_valued

Shape = tuple[int, ...]


def tensors_of(shapes: Mapping[str, Shape], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return tensors of these shapes in which every element is different."""
    tensors, start = {}, 1
    for name, shape in shapes.items():
        tensors[name] = address_valued(shape, torch.int32, start).to(dtype)
        start += tensors[name].numel()
    return tensors


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    file: str = "model.safetensors",
    metadata: dict[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write one file and, if given, a ``config.json``. Return the opened checkpoint."""
    save_file(dict(tensors), directory / file, metadata)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return open_checkpoint(directory / file)


def table(shapes: Mapping[str, Shape], dtype: str = "F32", **more: Any) -> SourceTable:
    return SourceTable(list(shapes), [dtype] * len(shapes), list(shapes.values()), **more)


class Experts(nn.Module):
    """Grouped experts: ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, or both transposed."""

    def __init__(self, experts: int, intermediate: int, hidden: int, transposed: bool = False):
        super().__init__()
        shapes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
        first, second = ((shape[0], shape[2], shape[1]) if transposed else shape for shape in shapes)
        self.gate_up_proj = nn.Parameter(torch.zeros(first))
        self.down_proj = nn.Parameter(torch.zeros(second))


class StatedExperts(Experts):
    """Experts that state their layout, as those of transformers do."""

    is_transposed = False
    is_concatenated = True
    has_gate = True


class Model(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.norm = nn.Linear(experts.down_proj.shape[0], 1, bias=False)
        self.experts = experts
