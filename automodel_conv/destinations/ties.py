"""Tied names share one tensor: tie them after a load, and compare them where a checkpoint holds several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor


def unequal_ties(tensors: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]]) -> set[tuple[str, str]]:
    """Names of tied groups, each with the first of its group, for which this rank has loaded different values."""
    return _unequal(_tied_pairs(groups, tensors), tensors)


def _tied_pairs(groups: Iterable[tuple[str, ...]], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    made = ([name for name in group if name in tensors] for group in groups)
    return [(name, names[0]) for names in made for name in names[1:]]


def _unequal(pairs: Iterable[tuple[str, str]], tensors: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    return {(name, other) for name, other in pairs if name in tensors and not same_bytes(tensors[name], tensors[other])}


def with_tied(
    tensors: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]], unequal: Collection[tuple[str, str]]
) -> dict[str, Tensor]:
    """All names of every tied group on one tensor, but for those that are ``unequal`` to the first of their group."""
    shared = dict(tensors)
    for group in groups:
        made = [name for name in group if name in tensors]
        for name in group:
            if made and (name, made[0]) not in unequal:
                shared[name] = tensors[made[0]]
    return shared


def in_order(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The same tensors in the order of the names of a model's state dict; those that it does not have come last."""
    order = {name: tensors[name] for name in names if name in tensors}
    return order | {name: tensor for name, tensor in tensors.items() if name not in order}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes: a NaN equals itself, and 0.0 is not -0.0."""
    if a is b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
