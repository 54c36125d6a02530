"""A fast and strict parser for JSON in the form in which writers of checkpoints usually write it.

It accepts nearly all valid input and no invalid input. For everything else it returns None. ``header`` then parses the
input again, more slowly, and either accepts it or reports what is wrong with it.

A general JSON parser creates thousands of small objects for a header of a thousand tensors, and Python's garbage
collector visits them again and again. ``msgspec`` fills one flat object per entry, which the collector ignores.
Source: msgspec 0.22.0, ``Struct``, ``gc=False``.
"""

from __future__ import annotations

from math import prod
from operator import sub
from typing import Any, NamedTuple

import msgspec

from automodel_conv.dtypes import BITS

# Later stages store sizes as signed 64-bit integers.
MAX_BITS = 2**63 - 1
# Computing the product of more sizes could take very long.
_MOST_DIMENSIONS = 64


class Columns(NamedTuple):
    """The entries of a header in the header's order.

    The size of every range matches its dtype and shape.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    """Shapes as torch reports them, with two F4 values per element."""
    starts: list[int]
    """Offset of the first byte of each tensor, from the start of the data."""
    ends: list[int]
    """Offset of the byte after each tensor, from the start of the data."""
    metadata: dict[str, str]


def usual_object(data: bytes | bytearray) -> dict[str, Any] | None:
    """Parse a JSON object without duplicate keys at any depth; return None if the data may be anything else."""
    try:
        parsed = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None
    if type(parsed) is not dict:
        return None
    inner = [value for value in parsed.values() if type(value) is dict]
    return parsed if _has_members(data, len(parsed) + sum(map(len, inner))) else None


def usual_columns(data: bytes | bytearray) -> Columns | None:
    """Parse the entries of a header; return None if any of them may be invalid."""
    if b"-0" in data:  # serde parses -0 as a floating-point number
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
    """Return whether JSON text has exactly ``count`` members in all, so that no duplicate key was dropped.

    Each member has one colon. The result is False as well if a string contains a colon.
    """
    return data.count(b":") == count


class _Entry(msgspec.Struct, gc=False):
    """The entry of a tensor, or ``__metadata__``, which leaves all fields at defaults that no tensor can have."""

    dtype: str = ""
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] = (0, -1)


class _Metadata(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_entries = msgspec.json.Decoder(dict[str, _Entry]).decode
_metadata = msgspec.json.Decoder(_Metadata).decode


class _Kind(NamedTuple):
    """A combination of dtype and shape.

    Many tensors share one.
    """

    dtype: str
    shape: tuple[int, ...]
    """Shape as torch reports it, with two F4 values per element."""
    nbytes: int


class _Kinds(dict["tuple[str, tuple[int, ...] | None]", _Kind]):
    """Kinds by the dtype and shape of the header.

    A pair that no tensor can have raises ValueError.
    """

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
