"""The tensors that a load by somebody's loading code fills, and how they get into a module or a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import allocate
from automodel_conv.loading_code.attributes import change
from automodel_conv.loading_code.calling import Targets
from automodel_conv.loading_code.changes import Changes
from automodel_conv.loading_code.dry_run import Traced
from automodel_conv.loading_code.stand_ins import in_class_of, named_tensors


@dataclass(frozen=True)
class Places:
    """The tensors that targets are filled in."""

    buffers: Mapping[str, Tensor]
    """Tensor of each planned target, by name: one that the caller has, or a new one. Tied targets share a new one."""
    new: Mapping[str, Tensor]
    """For each new tensor: one like it, with or without data."""


def places_of(targets: Targets, traced: Traced, device: torch.device | None) -> Places:
    """Return the tensors to fill.

    Args:
        targets: what loading code fills.
        traced: what it does.
        device: device of new tensors; None: that of the tensors that they replace, or the CPU.

    Raises:
        UnsupportedError: a target that the caller gave by name has no data, or the code adds a part to a module.
    """
    own = named_tensors(targets)
    _check_parts(targets, [name for name in traced.names if name not in own])
    others = {name: group for group in traced.plan.tied for name in group}
    buffers: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for target in traced.plan.targets:
        tensor = own.get(target.name)
        if tensor is not None and target.name not in traced.changes.made and not tensor.is_meta:
            buffers[target.name] = tensor.detach()
            continue
        if isinstance(targets, Mapping) and target.name not in traced.changes.made:
            raise UnsupportedError(
                message(f"{target.name} is on the meta device", do="pass tensors with data, or a module, as targets=")
            )
        new[target.name] = traced.changes.made.get(target.name, tensor)  # type: ignore[assignment]
        shared = next((new_one for new_one in others.get(target.name, ()) if new_one in buffers), None)
        if shared is not None:
            buffers[target.name] = buffers[shared]
            continue
        at = device or (tensor.device if tensor is not None and not tensor.is_meta else torch.device("cpu"))
        buffers |= allocate([target], at)
    return Places(buffers, new)


def install(
    targets: nn.Module | MutableMapping[str, Tensor], changes: Changes, new: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Put tensors into a module or a mapping, as loading code does.

    Args:
        targets: the module or the mapping.
        changes: what the code puts there and removes.
        new: each new tensor, and one of its class and with its attributes, by name.
    """
    if isinstance(targets, nn.Module):
        change(targets, changes.attributes)
    kept_names = {name for group in changes.same for name in group if not all(one in new for one in group)}
    for name, (tensor, like) in new.items():
        if name not in kept_names:  # a part that is now another part has the tensors of that one
            _put(targets, name, in_class_of(like, tensor), name not in changes.unsaved)
    own = named_tensors(targets)
    for group in changes.same:
        if all(name in own for name in group) and any(name in new for name in group):
            kept = next((name for name in group if name not in new), group[0])
            for name in group:
                _put(targets, name, own[kept], name not in changes.unsaved)
    for name, is_none in changes.removed.items():
        _remove(targets, name, is_none)


def _check_parts(targets: Targets, added: Iterable[str]) -> None:
    if not isinstance(targets, nn.Module):
        return
    parts = {path for path, _ in targets.named_modules(remove_duplicate=False)}
    for name in added:
        if name.rpartition(".")[0] not in parts:
            raise UnsupportedError(
                message(
                    "the loading code adds a part to the module",
                    where=name,
                    expected="code that fills the module, or sets its parameters and buffers",
                    do="add this part before loading",
                )
            )


def _put(targets: nn.Module | MutableMapping[str, Tensor], name: str, tensor: Tensor, is_saved: bool) -> None:
    if not isinstance(targets, nn.Module):
        targets[name] = tensor
        return
    path, _, leaf = name.rpartition(".")
    part = targets.get_submodule(path)
    if isinstance(tensor, nn.Parameter) or (leaf in part._parameters and leaf not in part._buffers):
        part._buffers.pop(leaf, None)
        part._parameters[leaf] = tensor  # type: ignore[assignment]
        return
    part._parameters.pop(leaf, None)
    if leaf not in part._buffers and not is_saved:
        part._non_persistent_buffers_set.add(leaf)
    part._buffers[leaf] = tensor


def _remove(targets: nn.Module | MutableMapping[str, Tensor], name: str, is_none: bool) -> None:
    if not isinstance(targets, nn.Module):
        del targets[name]
        return
    path, _, leaf = name.rpartition(".")
    part = targets.get_submodule(path)
    for tensors in (part._parameters, part._buffers):
        if leaf in tensors and is_none:
            tensors[leaf] = None
        elif leaf in tensors:
            del tensors[leaf]
