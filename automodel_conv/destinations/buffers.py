"""Move the buffers of a model to their devices, and compute those that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from automodel_conv.upstream.registry import is_pretrained_model


class Buffer(NamedTuple):
    """A buffer, persistent or not, and the module that holds it."""

    name: str
    module: nn.Module
    leaf: str
    """Name of the buffer in its module."""
    tensor: Tensor

    @property
    def is_computed(self) -> bool:
        """Whether ``finish`` computes it in a transformers model, since no checkpoint holds it (rotary frequencies)."""
        return self.tensor.is_meta and self.leaf in self.module._non_persistent_buffers_set


def buffers_of(model: nn.Module) -> Iterator[Buffer]:
    """Yield the buffers of all modules.

    A module with several names is visited under its first.
    """
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                yield Buffer(f"{prefix}.{leaf}" if prefix else leaf, module, leaf, buffer)


def placeable_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers that a ``device_map`` places: those with memory, and those that are computed."""
    are_computed = is_pretrained_model(model)
    return [b.name for b in buffers_of(model) if not b.tensor.is_meta or (are_computed and b.is_computed)]


def move_buffers(model: nn.Module, device_of: Callable[[str], torch.device | None]) -> None:
    """Move the buffers that have memory to their devices.

    Modules that share a buffer share its copy on a device.

    Args:
        device_of: returns the device of a buffer, by its name; None: leave it where it is.
    """
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for name, module, leaf, buffer in list(buffers_of(model)):
        device = device_of(name)
        if buffer.is_meta or device is None or buffer.device == device:
            continue
        if (id(buffer), device) not in moved:
            moved[id(buffer), device] = torch.empty_like(buffer, device=device).copy_(buffer)
        module._buffers[leaf] = moved[id(buffer), device]


def finish(
    model: nn.Module,
    filled: Iterable[str],
    missing: Iterable[str],
    device_of: Callable[[str], torch.device | None],
) -> None:
    """Tie the parameters of a model and compute the buffers that no checkpoint holds (rotary frequencies).

    Only models that were on the meta device need this. A transformers model recomputes its own buffers. The buffers of
    any other model stay on the meta device, for the caller to fill.

    Args:
        filled: names that the load has filled.
        missing: names that the checkpoint lacks.
        device_of: returns the device of a buffer, by its name; None: the CPU.
    """
    if not is_pretrained_model(model):
        return
    state = model.state_dict(keep_vars=True)
    for name in filled:
        state[name]._is_hf_initialized = True
    for buffer in buffers_of(model):
        if buffer.is_computed:
            device = device_of(buffer.name) or "cpu"
            buffer.module._buffers[buffer.leaf] = torch.empty_like(buffer.tensor, device=device)
            buffer.module._is_hf_initialized = False  # type: ignore[assignment]  # may be True from an earlier load
    model.initialize_weights()  # type: ignore[operator]
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)  # type: ignore[operator]
