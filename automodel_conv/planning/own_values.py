"""Keep values that loading code makes itself where they have data, although the weights are on the meta device.

Loading code puts its indices and tables where the weights are: ``torch.tensor(order, device=weight.device)``. torch
would drop their values on the meta device. So they stay on the CPU, and so do lists of numbers that index a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_MAKERS = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.arange, torch.linspace, torch.eye})
TAKING_VALUES = frozenset({*_INDEXING, *_MAKERS, Tensor.new_tensor, Tensor.to})
"""The functions whose arguments ``keeping_values`` changes."""


def keeping_values(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], has_data: Callable[[Tensor], bool]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments of a function of torch, such that no values of the loading code get lost.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its arguments by name.
        has_data: returns whether a tensor has data.
    """
    if func in _INDEXING and not has_data(args[0]):
        tensor, index, *value = args
        index = tuple(map(_tensor_of, index)) if isinstance(index, tuple) else _tensor_of(index)
        return (tensor, index, *value), kwargs
    if func is Tensor.new_tensor and not has_data(args[0]):
        args = (torch.empty(0, dtype=args[0].dtype, device="cpu"), *args[1:])
    elif func is Tensor.to:
        if not has_data(args[0]):
            return args, kwargs
    elif func not in _MAKERS or (args and isinstance(args[0], Tensor) and not has_data(args[0])):
        return args, kwargs
    return tuple(map(_off_meta, args)), {name: _off_meta(value) for name, value in kwargs.items()}


def _tensor_of(index: Any) -> Any:
    """Return an array or a sequence of numbers as a tensor on the CPU, and any other index of a dimension as it is."""
    if isinstance(index, np.ndarray):
        return torch.tensor(index, device="cpu")
    if not isinstance(index, Sequence) or not all(isinstance(number, int) for number in index):
        return index
    is_mask = bool(index) and all(isinstance(number, bool) for number in index)
    return torch.tensor(index, dtype=torch.bool if is_mask else torch.int64, device="cpu")


def _off_meta(argument: Any) -> Any:
    """Return the CPU for the meta device, a tensor there for a tensor on the meta device, and else the argument."""
    if isinstance(argument, Tensor) and argument.is_meta:
        return torch.empty(0, dtype=argument.dtype, device="cpu")
    is_device = isinstance(argument, str | torch.device) and torch.device(argument).type == "meta"
    return torch.device("cpu") if is_device else argument
