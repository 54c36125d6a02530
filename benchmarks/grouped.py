"""Grouped buffers for peers: their names and shapes, and a view of them for every tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import automodel_conv as amc
from automodel_conv.execution import page_calls

GROUPED = ("gate_up_proj", "down_proj")
"""The last parts of the names of grouped tensors in transformers."""


def grouped_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """Return the model's names and shapes, experts grouped as ``[E, 2I, H]`` and ``[E, H, I]``."""
    shapes: dict[str, tuple[int, ...]] = {}
    checkpoint = amc.open_checkpoint(directory)
    experts = 1 + max(int(name.split(".")[5]) for name in checkpoint.names if ".experts." in name)
    for name, shape in zip(checkpoint.names, checkpoint.shapes, strict=True):
        path, separator, part = name.partition(".experts.")
        if not separator:
            shapes[name] = shape
        elif part.endswith("gate_proj.weight"):
            shapes[f"{path}.experts.gate_up_proj"] = (experts, 2 * shape[0], shape[1])
        elif part.endswith("down_proj.weight"):
            shapes[f"{path}.experts.down_proj"] = (experts, *shape)
    return shapes


def per_expert(name: str, grouped: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Return the views of a tensor ``[E, 2I, H]`` or ``[E, H, I]`` that match the checkpoint's tensors.

    Args:
        first: number of its first expert.
    """
    path, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        parts = zip(("gate_proj", "up_proj"), grouped.chunk(2, dim=1), strict=True)
    elif leaf == "down_proj":
        parts = iter([(leaf, grouped)])
    else:
        return {name: grouped}
    return {f"{path}.{expert}.{part}.weight": view for part, views in parts for expert, view in enumerate(views, first)}


def new_buffers(shapes: Mapping[str, tuple[int, ...]], transposed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Allocate a model in bfloat16.

    Return its tensors, and the view for each tensor of the checkpoint.

    Args:
        shapes: names and shapes, as ``grouped_shapes`` returns them.
        transposed: store experts as ``[E, H, 2I]`` and ``[E, I, H]``. The views have the files' shapes in any case.
    """
    tensors: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        turned = transposed and name.endswith(GROUPED)
        tensors[name] = torch.empty((shape[0], shape[2], shape[1]) if turned else shape, dtype=torch.bfloat16)
        views |= per_expert(name, tensors[name].transpose(1, 2) if turned else tensors[name])
    return tensors, views


def advise_huge_pages(tensor: Tensor) -> None:
    """Advise the kernel to use huge pages for the memory of tensors."""
    if tensor.nbytes >= 4 << 20:
        page_calls.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
