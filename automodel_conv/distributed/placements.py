"""Which tensors are distributed, on which meshes, and tensors made distributed as others are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "placements")


def meshes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """The meshes that DTensors among these are distributed on, each once, in the order of their first tensors."""
    found: list[Any] = []
    for tensor in tensors:
        if is_distributed(tensor) and tensor.device_mesh not in found:  # type: ignore[attr-defined]
            found.append(tensor.device_mesh)  # type: ignore[attr-defined]
    return found


def is_first_replica(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part of a DTensor."""
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if coordinate is None:
        return False
    placements = tensor.placements  # type: ignore[attr-defined]
    return not any(at for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def is_replicated(tensor: Tensor) -> bool:
    """Whether several ranks hold the same part of a DTensor."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)  # type: ignore[attr-defined]
    return any(size > 1 for size, placement in sizes if placement.is_replicate())


def as_distributed(local: Tensor, like: Tensor) -> Tensor:
    """A DTensor of the same mesh, placements and shape as ``like``, of which this rank holds ``local``."""
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
    """DTensors where the model has them; names that share a tensor still do."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in state and is_distributed(state[name]) and id(tensor) not in made:
            made[id(tensor)] = as_distributed(tensor, state[name])
    return {name: made.get(id(tensor), tensor) for name, tensor in tensors.items()}


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
