"""JSON that looks as writers of checkpoints write it, read by a faster parser that is no less strict.

It takes nearly all that is right, and nothing that is wrong. All else is None here and is looked at again, slowly, by
``header``, which accepts it or tells what is wrong with it.

A header of a thousand tensors is thousands of small objects to a parser of any JSON, and Python's collector of garbage
walks them again and again. ``msgspec`` fills one flat object for each entry, which the collector does not see.
Source: msgspec 0.22.0, ``Struct``, ``gc=False``.
"""

from __future__ import annotations

from math import prod
from operator import sub
from typing import Any, NamedTuple

import msgspec

from automodel_conv.dtypes import BITS

# Sizes are kept as signed 64-bit integers further on.
MAX_BITS = 2**63 - 1
# The product of more sizes may take very long.
_MOST_DIMENSIONS = 64


class Columns(NamedTuple):
    """The entries of a header in its own order; every range fits its dtype and shape."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    ends: list[int]
    metadata: dict[str, str]


def usual_object(data: bytes | bytearray) -> dict[str, Any] | None:
    """A JSON object without duplicate keys at any depth; None if it may not be one."""
    try:
        parsed = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None
    if type(parsed) is not dict:
        return None
    inner = [value for value in parsed.values() if type(value) is dict]
    return parsed if _has_members(data, len(parsed) + sum(map(len, inner))) else None


def usual_columns(data: bytes | bytearray) -> Columns | None:
    """The entries of a header; None if there may be anything wrong with them."""
    if b"-0" in data:  # serde takes -0 for a floating number
        return None
    try:
        entries = _entries(data)
        metadata: dict[str, str] = {}
        others = 0
        if entries.pop("__metadata__", None) is not None:
            metadata = _metadata(data).metadata
            others = 1 + len(metadata)
        kinds = _Kinds()
        rows = [kinds[entry.dtype, entry.shape] for entry in entries.values()]
    except (ValueError, RecursionError):
        return None
    starts = [entry.data_offsets[0] for entry in entries.values()]
    ends = [entry.data_offsets[1] for entry in entries.values()]
    fit = min(starts, default=0) >= 0 and list(map(sub, ends, starts)) == [row.nbytes for row in rows]
    if not fit or not _has_members(data, 4 * len(entries) + others):
        return None
    return Columns(list(entries), [row.dtype for row in rows], [row.shape for row in rows], starts, ends, metadata)


def _has_members(data: bytes | bytearray, count: int) -> bool:
    """True if all objects of some JSON have so many members together, of which none was overwritten by another.

    Each member has one colon, and strings may hold more: then it is False.
    """
    return data.count(b":") == count


class _Entry(msgspec.Struct, gc=False):
    """A tensor; or ``__metadata__``, of which it keeps nothing. No default is an entry of a tensor."""

    dtype: str = ""
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] = (0, -1)


class _Metadata(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_entries = msgspec.json.Decoder(dict[str, _Entry]).decode
_metadata = msgspec.json.Decoder(_Metadata).decode


class _Kind(NamedTuple):
    """A dtype and a shape, which many tensors share."""

    dtype: str
    shape: tuple[int, ...]
    """As torch has it, in which two F4 values are one element."""
    nbytes: int


class _Kinds(dict["tuple[str, tuple[int, ...] | None]", _Kind]):
    """Kinds by dtype and shape as the header has them; a pair that no tensor has raises ValueError."""

    def __missing__(self, key: tuple[str, tuple[int, ...] | None]) -> _Kind:
        dtype, shape = key
        if dtype not in BITS or shape is None or len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0:
            raise ValueError
        bits = BITS[dtype] * prod(shape)
        if bits % 8 or BITS[dtype] * prod(filter(None, shape)) > MAX_BITS:
            raise ValueError
        if dtype == "F4":
            if shape[-1] % 2:
                raise ValueError
            shape = (*shape[:-1], shape[-1] // 2)
        self[key] = kind = _Kind(dtype, shape, bits // 8)
        return kind
