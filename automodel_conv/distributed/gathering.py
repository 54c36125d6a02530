"""Gather DTensors whole, one after the other, and keep each only as long as it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_conv.distributed.placements import is_distributed, local_of


def is_member(tensor: Tensor) -> bool:
    """Return whether this rank is in the mesh of a tensor; plain tensors are on all ranks."""
    return not is_distributed(tensor) or tensor.device_mesh.get_coordinate() is not None  # type: ignore[attr-defined]


class WholeTensors:
    """Gathers tensors on demand, and keeps each until it is released.

    ``gather`` is a collective of the ranks in the mesh of a DTensor, so these call it in the same order.

    Args:
        tensors: DTensors and plain tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = tensors
        self._gathered: dict[int, dict[tuple[int, ...] | None, tuple[Tensor, Any]]] = {}

    def gather(self, row: int, dims: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor whole; a plain or replicated one is this rank's own, in the same memory.

        Other streams may use the result: it is complete on the current stream of each call.

        Args:
            row: number of the tensor among ``tensors``.
            dims: dimensions of the mesh of a DTensor over which to gather it, by the ranks along these dimensions; the
                result is then the part that they hold together. (): nothing is gathered. None: all.
        """
        tensor = self._tensors[row].detach()
        if not is_distributed(tensor) or dims == () or _is_replicated(tensor):
            return local_of(tensor)
        gathered = self._gathered.setdefault(row, {})
        if dims not in gathered:
            whole = _gather(tensor, dims)
            gathered[dims] = whole, _event_of(whole)
        whole, ready = gathered[dims]
        if ready is not None:
            stream = torch.cuda.current_stream(whole.device)
            stream.wait_event(ready)
            whole.record_stream(stream)
        return whole

    def release(self, rows: Iterable[int]) -> None:
        """Forget the gathered tensors of these rows."""
        for row in rows:
            self._gathered.pop(row, None)


def _gather(tensor: Any, dims: tuple[int, ...] | None) -> Tensor:
    if dims is None:
        return tensor.full_tensor()
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if dim in dims else each for dim, each in enumerate(tensor.placements)]
    return tensor.redistribute(placements=placements).to_local()


def _is_replicated(tensor: Any) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _event_of(tensor: Tensor) -> Any:
    """Return an event on the current stream of a tensor's GPU; None on the CPU."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
