"""Operations of torch as a dispatch mode gets them: what they write to, return and need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_LIKES = frozenset((aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default))
_STRIDED = frozenset((aten.empty_strided.default, aten.new_empty_strided.default))


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, which may be in lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def mutated_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to."""
    written = [
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [args[position] if position < len(args) else kwargs.get(name) for position, name in written]


def returned_by(func: Any, mutated: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...] | None:
    """Return what an operation returns that writes to tensors: one of them, several, or nothing."""
    if not func._schema.returns:
        return None
    return mutated[0] if len(mutated) == 1 else tuple(mutated)


def is_composite(func: Any) -> bool:
    """Return whether an operation consists of others that a dispatch mode has not seen: so it is in inference mode."""
    return torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor on the meta device with the shape, dtype and strides of a tensor."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def needs_values(func: Any, args: Sequence[Any]) -> bool:
    """Return whether an operation without values cannot tell the shape of its result, or returns a number."""
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def elementwise(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the result of an operation on each element of contiguous tensors without data, or None for any other.

    torch's own functions for the meta device import its compiler, which takes more than a second.
    """
    tensors = tensors_in((args, kwargs))
    if torch.Tag.pointwise not in func.tags or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    small = pytree.tree_map_only(Tensor, lambda tensor: torch.ones([1] * tensor.dim(), dtype=tensor.dtype), args)
    options = {name: value for name, value in kwargs.items() if name != "device"}
    try:
        result = func(*small, **options)
        shape = torch.broadcast_tensors(*tensors)[0].shape
    except RuntimeError:
        return None
    return torch.empty(shape, dtype=result.dtype, device="meta") if isinstance(result, Tensor) else None


def made_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return on the meta device what a function makes that returns a tensor of one value, or of none.

    torch's own functions for the meta device import its compiler, which takes more than a second.
    """
    like = next((leaf for leaf in args if isinstance(leaf, Tensor)), None)
    has_strides = like is not None and func in _LIKES and not like.is_contiguous()
    if has_strides or func in _STRIDED or kwargs.get("memory_format") is not None:
        return func(*args, **{**kwargs, "device": torch.device("meta")})
    shape = next((arg for arg in args if isinstance(arg, (list, tuple))), () if like is None else like.shape)
    dtype = kwargs.get("dtype") or (None if like is None else like.dtype)
    if dtype is None and func is aten.full.default:
        dtype = torch.tensor(args[-1]).dtype
    return torch.empty(shape, dtype=dtype, device="meta")
