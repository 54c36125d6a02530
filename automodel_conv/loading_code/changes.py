"""Tensors and attributes that loading code puts into a module or a mapping, and those that it removes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from automodel_conv.loading_code.attributes import AttributeChange
from automodel_conv.loading_code.calling import Targets


@dataclass(frozen=True)
class Changes:
    """New, shared and removed tensors, and changed attributes."""

    made: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors without data that loading code puts in the place of others, adds or returns, by name."""
    same: tuple[tuple[str, ...], ...] = ()
    """Groups of names of one tensor."""
    unsaved: frozenset[str] = frozenset()
    """Names of the buffers among ``made`` that are not in the state dict."""
    removed: Mapping[str, bool] = field(default_factory=dict)
    """Names that it removes; True: it puts None there."""
    attributes: tuple[AttributeChange, ...] = ()
    """Changes of the attributes of a module, and of the containers in them."""


def changes_of(
    targets: Targets, own: Mapping[str, Tensor], found: Mapping[str, Tensor], made: Mapping[str, Tensor]
) -> Changes:
    """Return what loading code has changed.

    Args:
        targets: the module or the mapping, after the code has run; None: the code returns tensors.
        own: the tensors that it had before, by name.
        found: the tensors that it has now, or that the code returned, by name.
        made: those of them that the code has made.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in found.items():
        names.setdefault(id(tensor), []).append(name)
    same = tuple(tuple(group) for group in names.values() if len(group) > 1)
    if targets is None:
        return Changes(made, same)
    gone = [name for name in own if name not in found]
    if not isinstance(targets, nn.Module):
        return Changes(made, same, removed=dict.fromkeys(gone, False))
    parts = dict(targets.named_modules(remove_duplicate=False))
    unsaved, removed = set(), {}
    for name in made:
        path, _, leaf = name.rpartition(".")
        if leaf in parts[path]._non_persistent_buffers_set:
            unsaved.add(name)
    for name in gone:
        path, _, leaf = name.rpartition(".")
        if path in parts:
            removed[name] = leaf in parts[path]._parameters or leaf in parts[path]._buffers
    return Changes(made, same, frozenset(unsaved), removed)


def is_in_place(tensor: Tensor, own: Tensor | None, replaced: Mapping[int, Tensor]) -> bool:
    """Return whether a target is the tensor that it was before, with the same dtype and shape.

    Args:
        tensor: the target after loading code has run.
        own: the target before; None: there was none.
        replaced: the tensor that each stand-in replaces, by the id of the stand-in.
    """
    before = replaced.get(id(tensor), tensor)
    return tensor is own and (tensor.dtype, tensor.shape) == (before.dtype, before.shape)
