"""Put other tensors in the place of those that loading code fills, and put everything back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.loading_code.attributes import CONTAINERS, refill, values_of


def named_tensors(targets: nn.Module | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return all tensors that loading code fills, by name; of a module all parameters and buffers, under each name."""
    if not isinstance(targets, nn.Module):
        return dict(targets or {})
    return {
        **dict(targets.named_parameters(remove_duplicate=False)),
        **dict(targets.named_buffers(remove_duplicate=False)),
    }


def check_plain(targets: nn.Module | Mapping[str, Tensor] | None) -> None:
    """Check that each target is one strided tensor in memory.

    Raises:
        UnsupportedError: it is not.
    """
    for name, tensor in named_tensors(targets).items():
        if is_lazy(tensor) or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
            raise UnsupportedError(
                message(
                    "the loading code cannot fill a target by a plan",
                    where=name,
                    expected="a strided tensor, which has memory of its own",
                    found=kind,
                    do="pass plain tensors as targets=, such as to_local() of a DTensor",
                )
            )


@contextmanager
def as_before(targets: nn.Module | Mapping[str, Tensor] | None, *, memory: bool = True) -> Iterator[None]:
    """Put back, at the end of a ``with`` statement, what loading code changes besides the elements of targets.

    These are the tensors of a module, its other attributes, and the members of lists, dicts and sets among them; or the
    tensors of a mapping; and shape, memory and attributes of each tensor.

    Args:
        targets: what loading code fills.
        memory: whether a tensor that is moved to other memory is moved back.
    """
    holders = [part.__dict__ for part in targets.modules()] if isinstance(targets, nn.Module) else [targets]
    tensors = named_tensors(targets).values()
    found: dict[int, tuple[Any, Any]] = {}
    _members([*holders, *(tensor.__dict__ for tensor in tensors)], found)
    members = list(found.values())
    forms = [(tensor, tensor.detach(), tensor.requires_grad) for tensor in tensors] if memory else []
    try:
        yield
    finally:
        for container, kept in members:
            refill(container, kept)
        for tensor, form, requires_grad in forms:
            if not is_same_memory(tensor, form):
                tensor.data = form
            tensor.requires_grad_(requires_grad)


def _members(values: Iterable[Any], found: dict[int, tuple[Any, Any]]) -> None:
    """Add all containers among values, and in them, to ``found``, each with a copy of it."""
    for value in values:
        if isinstance(value, CONTAINERS) and id(value) not in found:
            found[id(value)] = value, value.copy()
            _members(values_of(value), found)
        elif isinstance(value, tuple):
            _members(value, found)


def is_same_memory(tensor: Tensor, form: Tensor) -> bool:
    """Return whether two tensors are the same view of the same memory."""

    def described(one: Tensor) -> tuple[object, ...]:
        return (
            one.untyped_storage()._cdata,
            one.untyped_storage().nbytes(),
            one.dtype,
            one.storage_offset(),
            one.shape,
            one.stride(),
        )

    return described(tensor) == described(form)


@contextmanager
def with_stand_ins(
    module: nn.Module,
    is_replaced: Callable[[Tensor], bool] = lambda tensor: True,
    has_data: Callable[[Tensor], bool] = lambda tensor: False,
    *,
    memory: bool = True,
) -> Iterator[Mapping[int, Tensor]]:
    """Replace tensors of a module within a ``with`` statement; it is as before at the end, see ``as_before``.

    Stand-ins are on the meta device, and have the class, attributes, shape, dtype and strides of the tensors. Those of
    tensors that share a storage share one, too. Tensors that are plain attributes are replaced by copies.

    Args:
        module: the module.
        is_replaced: returns whether a tensor is replaced.
        has_data: returns whether its stand-in has data: a copy of its elements, if it has any.
        memory: see ``as_before``.

    Yields:
        The tensor that each stand-in replaces, by the id of the stand-in.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    stand_ins: dict[int, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    with as_before(module, memory=memory):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for leaf, tensor in tensors.items():
                    if tensor is not None and is_replaced(tensor):
                        if id(tensor) not in stand_ins:
                            stand_in = _stand_in(tensor, storages, has_data(tensor))
                            stand_ins[id(tensor)], replaced[id(stand_in)] = stand_in, tensor
                        tensors[leaf] = stand_ins[id(tensor)]  # type: ignore[assignment]
        for part in module.modules():  # one may have a buffer of another as an attribute
            for name, value in part.__dict__.items():
                if type(value) is Tensor:
                    part.__dict__[name] = stand_ins.setdefault(id(value), value.detach().clone())
        yield replaced


def _stand_in(tensor: Tensor, storages: dict[int, torch.UntypedStorage], has_data: bool) -> Tensor:
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        made = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu" if has_data else "meta")
        if has_data and not tensor.is_meta:
            made.untyped_storage().copy_(storage)
        storages[storage._cdata] = made.untyped_storage()
    plain = torch.empty(0, dtype=tensor.dtype, device=storages[storage._cdata].device)
    plain.set_(storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
    return in_class_of(tensor, plain)


def in_class_of(like: Tensor, plain: Tensor) -> Tensor:
    """Return a tensor with the class and the attributes of another, and the memory of ``plain``."""
    made = plain if type(like) is Tensor else torch.Tensor._make_subclass(type(like), plain, like.requires_grad)
    vars(made).update(vars(like))
    return made
