"""Changes of a module besides parameters and buffers: of its attributes, and of what is in them."""

from __future__ import annotations

import ast
import functools
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.loader_writes import key_of

Container: TypeAlias = "dict[Any, Any] | list[Any] | set[Any] | deque[Any]"
CONTAINERS = (dict, list, set, deque)
PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""Classes of values that have no parts."""
_OF_TENSORS = ("_parameters", "_buffers")
Address: TypeAlias = tuple[Any, ...]
"""Name of a part of the module, then the key in each container on the way. A tensor's attributes are a container."""


@dataclass(frozen=True)
class AttributeChange:
    """The change of one container."""

    address: Address
    put: Any
    """New and changed members of a dict, by key; all members of another container."""
    removed: tuple[Any, ...] = ()
    """Keys that a dict no longer has."""


class Before(NamedTuple):
    """A container, before loading code runs."""

    address: Address
    container: Container
    members: Container
    versions: Mapping[int, int]
    """How often the elements of each tensor in it were changed, by the tensor's id."""


def containers_in(module: nn.Module) -> list[Before]:
    """Return all containers among the attributes of a module, its parts and their tensors, and in one another.

    Those of parameters and buffers themselves are left out.
    """
    found: dict[int, Before] = {}
    for path, part in module.named_modules():
        own: dict[str, Any] = part.__dict__
        _collect((path,), own, found, without=_OF_TENSORS)
        for kind in _OF_TENSORS:
            for name, tensor in own[kind].items():
                if tensor is not None:
                    _collect((path, kind, name), vars(tensor), found)
    return list(found.values())


def _collect(
    address: Address,
    container: Container | tuple[Any, ...],
    found: dict[int, Before],
    without: Collection[Any] = (),
) -> None:
    if id(container) in found:
        return
    if not isinstance(container, tuple):
        versions = {id(one): _version(one) for one in values_of(container) if isinstance(one, Tensor)}
        found[id(container)] = Before(address, container, container.copy(), versions)
    members = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in members:
        if isinstance(value, (*CONTAINERS, tuple)) and key not in without:
            _collect((*address, key), value, found)


def changes_in(
    before: Iterable[Before],
    replaced: Mapping[int, Tensor],
    has_data: Callable[[Tensor], bool],
    written: Collection[int],
) -> tuple[AttributeChange, ...]:
    """Return what has changed in containers.

    Args:
        before: the containers as they were.
        replaced: the tensor that each stand-in replaces, by the id of the stand-in.
        has_data: returns whether a tensor that is not replaced has its data.
        written: keys of the storages that elements without data were written to.

    Raises:
        UnsupportedError: a tensor that loading code has put there, or changed there, has no data.
    """
    changes = []
    for address, container, old, versions in before:

        def is_same(one: Any, other: Any, versions: Mapping[int, int] = versions) -> bool:
            if not isinstance(one, Tensor) or id(one) in replaced:
                return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)
            return one is other and _version(one) == versions[id(one)] and key_of(one) not in written

        settle = functools.partial(_settled, replaced=replaced, has_data=has_data)
        if isinstance(container, dict) and isinstance(old, dict):
            left_out = _OF_TENSORS if len(address) == 1 else ()
            new = [key for key, one in container.items() if key not in old or not is_same(one, old[key])]
            put = {key: settle(container[key], (*address, key)) for key in new if key not in left_out}
            removed = tuple(key for key in old if key not in container)
            if put or removed:
                changes.append(AttributeChange(address, put, removed))
        elif len(container) != len(old) or not all(map(is_same, container, old)):
            changes.append(AttributeChange(address, settle(container.copy(), address)))
    return tuple(changes)


def _version(tensor: Tensor) -> int:
    """Return how often the elements of a tensor were changed; 0 of one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _settled(value: Any, where: Address, replaced: Mapping[int, Tensor], has_data: Callable[[Tensor], bool]) -> Any:
    """Return a value with the tensors that stand-ins replace in their place."""
    settle = functools.partial(_settled, replaced=replaced, has_data=has_data)
    if isinstance(value, Tensor):
        if id(value) in replaced:
            return replaced[id(value)]
        if has_data(value):
            return value
        raise UnsupportedError(
            message(
                "the loading code puts a tensor of the checkpoint into an attribute",
                where=".".join(map(str, where)).removeprefix("."),
                expected="tensors in parameters and buffers",
                do="register it as a buffer",
            )
        )
    if isinstance(value, dict):
        new: Any = {key: settle(one, (*where, key)) for key, one in value.items()}
    elif type(value) in (list, tuple):
        new = type(value)(settle(one, (*where, key)) for key, one in enumerate(value))
    else:
        return value
    return value if all(map(operator.is_, values_of(new), values_of(value))) else new


def values_of(container: Collection[Any]) -> Collection[Any]:
    """Return the members of a container, of a dict its values."""
    return container.values() if isinstance(container, dict) else container


def change(module: nn.Module, changes: Iterable[AttributeChange]) -> None:
    """Change the attributes of a module as loading code does."""
    parts = dict(module.named_modules())
    for container, one in [(_found(parts, one.address), one) for one in changes]:
        if isinstance(container, dict):
            _put(container, one.put)
            for key in one.removed:
                container.pop(key, None)
        else:
            refill(container, one.put)


def _found(parts: Mapping[str, nn.Module], address: Address) -> Any:
    container: Any = parts[address[0]].__dict__
    for key in address[1:]:
        container = container[key]
        if isinstance(container, Tensor):
            container = vars(container)
    return container


def refill(container: Container, members: Container) -> None:
    """Replace the members of a container."""
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(members)
    elif isinstance(container, dict) and isinstance(members, dict):
        _put(container, members)
    else:
        container.update(members)


def _put(container: dict[Any, Any], members: Mapping[Any, Any]) -> None:
    """Put members into a dict; the ``update`` of a Counter would add them."""
    for key, one in members.items():
        container[key] = one


def text_of(changes: Iterable[AttributeChange]) -> str | None:
    """Return changes as a Python literal; None if they have other objects than plain values."""
    values = [(one.address, one.put, one.removed) for one in changes]
    text = repr(values)
    try:
        return text if ast.literal_eval(text) == values else None
    except (ValueError, SyntaxError):
        return None


def changes_from(text: str) -> tuple[AttributeChange, ...]:
    """Return the changes that ``text_of`` wrote."""
    return tuple(AttributeChange(*values) for values in ast.literal_eval(text))
