"""Describe objects by their values: all that code can see of them, as a digest that is the same in each process."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from automodel_conv.loading_code.attributes import PLAIN
from automodel_conv.loading_code.stand_ins import named_tensors

_TOLD_BY_TEXT = (torch.dtype, torch.device, torch.Size, torch.layout, range, slice, PurePath, np.generic)


def state_digest(values: Iterable[object], *, skipped: Collection[str] = ()) -> str:
    """Return a digest of objects, and of all objects that they refer to.

    Of parameters and buffers of modules only class, form and attributes count; of other tensors also the elements. Of
    functions the names count, and the values that they refer to. Objects without attributes count by their class.

    Args:
        values: the objects.
        skipped: names of attributes that do not count.

    Example:
        >>> from types import SimpleNamespace
        >>> first, second = SimpleNamespace(rank=0, id=1), SimpleNamespace(rank=0, id=2)
        >>> state_digest([first], skipped=["id"]) == state_digest([second], skipped=["id"])
        True
    """
    digest = hashlib.sha256()
    for line in state_lines(values, skipped=skipped):
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def state_lines(values: Iterable[object], *, skipped: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each object that ``state_digest`` counts."""
    numbers: dict[int, int] = {}
    found: list[object] = []  # also keeps objects alive, so that each id stays that of one object
    without_values: set[int] = set()
    left_out = frozenset(skipped)

    def told(value: object) -> str:
        """Return the text of a plain value, or the number of an object."""
        if isinstance(value, PLAIN) and not isinstance(value, Enum):
            return repr(value)
        if isinstance(value, _TOLD_BY_TEXT):
            return f"{type(value).__qualname__} {value}"
        if id(value) not in numbers:
            numbers[id(value)] = len(found)
            found.append(value)
            if isinstance(value, nn.Module):
                without_values.update(map(id, named_tensors(value).values()))
        return f"#{numbers[id(value)]}"

    yield json.dumps([told(value) for value in values])
    for value in found:  # it grows meanwhile
        kind, parts = _described(value, left_out, id(value) not in without_values)
        yield json.dumps([kind, *map(told, parts)])


def _described(value: Any, left_out: Collection[str], has_values: bool) -> tuple[str, Iterable[object]]:
    """Return the kind of an object, with all that is plain text, and the objects that it consists of."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        return f"{kind} {name}", _referred(value) if isinstance(value, types.FunctionType) else ()
    if isinstance(value, types.MethodType):
        return kind, (value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return kind, (value.func, *value.args, *_flat(value.keywords))
    if isinstance(value, Enum):
        return f"{kind} {value.name}", ()
    if isinstance(value, re.Pattern):
        return kind, (value.pattern, int(value.flags))
    if isinstance(value, np.ndarray):
        return f"{kind} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}", ()
    own = {name: one for name, one in _attributes(value).items() if name not in left_out}
    if isinstance(value, Tensor):
        form = f"{value.dtype} {[*value.shape]} {[*value.stride()]} {value.is_meta}"
        return f"{kind} {form} {_elements(value) if has_values else ''}", _flat(own)
    if isinstance(value, (dict, types.MappingProxyType)):
        return f"{kind} {len(value)}", (*_flat(value), *_flat(own))
    if isinstance(value, (set, frozenset)):
        return f"{kind} {sorted(map(_text, value))}", _flat(own)
    if isinstance(value, (list, tuple, deque)):
        return f"{kind} {len(value)}", (*value, *_flat(own))
    return kind, _flat(own)


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes of an object, those in slots too."""
    slots = [name for cls in type(value).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
    in_slots = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return {**in_slots, **getattr(value, "__dict__", {})}


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _flat(values: Mapping[Any, object]) -> Iterator[object]:
    for name, value in values.items():
        yield name
        yield value


def _referred(function: types.FunctionType) -> Iterator[object]:
    """Yield the values of a function's closure and its defaults."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it has no content yet
            yield None
    yield from function.__defaults__ or ()
    yield from _flat(function.__kwdefaults__ or {})


def _text(value: object) -> str:
    """Return the text of a member of a set, which has no order of its own."""
    is_told = isinstance(value, (*PLAIN, *_TOLD_BY_TEXT, tuple, Enum, re.Pattern))
    return f"{type(value)} {value!r}" if is_told else str(type(value))


def _elements(tensor: Tensor) -> str:
    """Return a digest of the elements of a tensor with data."""
    if tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return ""
    plain = tensor.detach().as_subclass(Tensor).cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()
