"""Run loading code for real and by ``load_with``, and compare what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from automodel_conv import LoadReport, load_with, trace_loader
from automodel_conv.loading_code.stand_ins import named_tensors

SOURCES = {
    "a": torch.arange(12.0).reshape(3, 4) + 1,
    "b": torch.arange(12.0).reshape(3, 4) + 100,
    "c": torch.arange(3.0) + 7,
}
"""Sources of the tests; all of their elements differ."""


class Model(nn.Module):
    """A small model with all kinds of tensors and attributes."""

    def __init__(self, *, tied: bool = False, device: str = "cpu"):
        super().__init__()
        self.first = nn.Linear(4, 3, device=device)
        self.second = nn.Linear(4, 3, bias=False, device=device)
        self.parts = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2, bias=False, device=device)])])
        self.register_buffer("saved", torch.empty(3, device=device))
        self.register_buffer("unsaved", torch.empty(3, device=device), persistent=False)
        for number, tensor in enumerate(named_tensors(self).values()):
            tensor.data.fill_(-number - 1)
        if tied:
            self.second.weight = self.first.weight
        self.first.weight.weight_loader = lambda parameter, weight: parameter.data.copy_(weight)
        self.plain = torch.zeros(3)
        self.names: list[str] = []
        self.settings = {"nested": [1]}


def described(targets: nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Return class, dtype, shape, requires_grad and bytes of all tensors by name."""
    return {name: _described(tensor) for name, tensor in named_tensors(targets).items()}


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, bits(tensor)


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor has data, also under a trace, which hides it from the code."""
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta


def bits(tensor: Tensor) -> list[int]:
    """Return the bytes of the elements."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def same_names(targets: nn.Module | Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in named_tensors(targets).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(groups.values())


def everything_of(targets: nn.Module | Mapping[str, Tensor]) -> Any:
    """Return all that is in targets: objects by their ids, the members of containers, bytes and forms of tensors."""
    holders = [part.__dict__ for part in targets.modules()] if isinstance(targets, nn.Module) else [targets]
    tensors = [tensor for tensor in named_tensors(targets).values()]
    plain = [value for holder in holders for value in holder.values() if isinstance(value, Tensor)]
    return (
        [_members(holder) for holder in holders],
        [_form(tensor) for tensor in [*tensors, *plain]],
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
        torch.overrides._len_torch_function_stack() if hasattr(torch.overrides, "_len_torch_function_stack") else 0,
        torch.random.get_rng_state().tolist(),
    )


def _members(value: Any) -> Any:
    if isinstance(value, Mapping):
        return id(value), [(key, _members(one)) for key, one in value.items()]
    if isinstance(value, list):
        return id(value), [_members(one) for one in value]
    return id(value)


def _form(tensor: Tensor) -> Any:
    return (
        *(id(tensor), tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride(), tensor.shape),
        *(tensor.requires_grad, id(tensor.grad), tensor.dtype, _members(tensor.__dict__)),
        None if tensor.is_meta else bits(tensor),
    )


def checkpoint_of(directory: Path, sources: Mapping[str, Tensor] = SOURCES) -> Path:
    """Write sources to a checkpoint."""
    path = directory / "model.safetensors"
    save_file(dict(sources), path)
    return path


def loaded_as_run(
    directory: Path,
    load: Callable[[Any, dict[str, Tensor]], Any],
    make: Callable[[], Any] = Model,
    sources: Mapping[str, Tensor] = SOURCES,
) -> LoadReport:
    """Check that a load by ``load_with`` leaves what loading code leaves that is run; return its report.

    Args:
        directory: a folder for the checkpoint.
        load: the loading code, which is called with targets and a dict of sources.
        make: returns targets.
        sources: tensors of the checkpoint.
    """
    path = checkpoint_of(directory, sources)
    with torch.no_grad():
        run = make()
        load(run, {name: tensor.clone() for name, tensor in sources.items()})
        untouched = make()
    before = everything_of(untouched)
    trace_loader(lambda pairs: load(untouched, dict(pairs)), path, untouched)
    assert everything_of(untouched) == before, "tracing changes targets"
    loaded = make()
    report = load_with(lambda pairs: load(loaded, dict(pairs)), path, loaded)
    assert described(loaded) == described(run)
    assert same_names(loaded) == same_names(run)
    return report
