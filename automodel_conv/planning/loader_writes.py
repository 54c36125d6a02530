"""The writes of loading code, as a trace records them: views of storages, and what is written to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A strided view of a storage; offset and strides are in elements of its dtype."""

    storage: int
    """Key of the storage."""
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Constant(NamedTuple):
    """One value for all elements."""

    value: float


class Computed(NamedTuple):
    """Values that an operation computes, or that loading code makes itself."""

    reason: str
    inputs: tuple[View, ...] | None = ()
    """Views that they are computed from; None: nobody knows."""


class Write(NamedTuple):
    """A write to a storage."""

    target: View
    source: View | Constant | Computed
    """A view of the shape of ``target``, which is copied and cast to its dtype; a constant; or computed values."""


OWN_VALUES = Computed("the loading code makes values itself")
OLD_VALUES = Computed("the loading code reads a target that it has not filled")
UNSEEN = Computed("the loading code makes a tensor that no trace sees", None)


class NeedsValues(BaseException):
    """Loading code reads values of tensors that have no data here.

    It is not an ``Exception``, so that loading code does not handle it.
    """

    def __init__(self, reason: str, inputs: Sequence[View]):
        super().__init__(reason)
        self.reason = reason
        self.inputs = tuple(inputs)


def key_of(tensor: Tensor) -> int:
    """Return the key of a tensor's storage, which is unique while the storage exists."""
    return tensor.untyped_storage()._cdata


def view_of(tensor: Tensor) -> View:
    """Return a tensor as a view of its storage."""
    return View(key_of(tensor), tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
