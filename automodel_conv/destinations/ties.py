"""Tie names that share one tensor after a load, and compare the values that a checkpoint has for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor


def unequal_ties(tensors: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]]) -> set[tuple[str, str]]:
    """Return ``(name, first name of its group)`` for tied names with different values on this rank."""
    return _unequal(_tied_pairs(groups, tensors), tensors)


def _tied_pairs(groups: Iterable[tuple[str, ...]], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return ``(name, first name of its group)`` for the tied names that are loaded."""
    loaded = ([name for name in group if name in tensors] for group in groups)
    return [(name, names[0]) for names in loaded for name in names[1:]]


def _unequal(pairs: Iterable[tuple[str, str]], tensors: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    """Return the pairs of names with different values."""
    return {(name, other) for name, other in pairs if name in tensors and not same_bytes(tensors[name], tensors[other])}


def with_tied(
    tensors: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]], unequal: Collection[tuple[str, str]]
) -> dict[str, Tensor]:
    """Return the tensors with the names of each tied group on one tensor, except names ``unequal`` to the first."""
    shared = dict(tensors)
    for group in groups:
        loaded = [name for name in group if name in tensors]
        for name in group:
            if loaded and (name, loaded[0]) not in unequal:
                shared[name] = tensors[loaded[0]]
    return shared


def in_order(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors in the order of a model's names, with those that the model does not have last."""
    order = {name: tensors[name] for name in names if name in tensors}
    return order | {name: tensor for name, tensor in tensors.items() if name not in order}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes.

    A NaN equals itself, and 0.0 is not -0.0.
    """
    if a is b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
