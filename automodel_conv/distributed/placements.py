"""Queries of DTensors and their meshes, and conversion of local tensors to DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "placements")


def meshes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Return the distinct meshes of the DTensors among these tensors, in the order of their first tensors."""
    meshes: list[Any] = []
    for tensor in tensors:
        if is_distributed(tensor) and tensor.device_mesh not in meshes:  # type: ignore[attr-defined]
            meshes.append(tensor.device_mesh)  # type: ignore[attr-defined]
    return meshes


def is_first_replica(tensor: Tensor) -> bool:
    """Return whether this rank is the first of the ranks that hold the same part of a DTensor."""
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if coordinate is None:
        return False
    placements = tensor.placements  # type: ignore[attr-defined]
    return not any(index for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def is_replicated(tensor: Tensor) -> bool:
    """Return whether several ranks hold the same part of a DTensor."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)  # type: ignore[attr-defined]
    return any(size > 1 for size, placement in sizes if placement.is_replicate())


def as_distributed(local: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor with the mesh, placements and shape of ``like``, and ``local`` as the part of this rank."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def all_as_distributed(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors that are DTensors in ``state`` to DTensors.

    Names that share a tensor still share it.
    """
    converted: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in state and is_distributed(state[name]) and id(tensor) not in converted:
            converted[id(tensor)] = as_distributed(tensor, state[name])
    return {name: converted.get(id(tensor), tensor) for name, tensor in tensors.items()}


def local_of(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, in the same memory, or any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
