"""Mutations that keep a file's form: changed JSON in a header with a matching length and data."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 4, 8, -1, 7, 16, 255, 1024, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**60, 2**61, 2**63 - 1, 2**63, 2**64, 2**64 + 2),
)
VALUES = (
    *NUMBERS,
    0.5,
    1e300,
    True,
    None,
    "",
    "1",
    "a",
    "\ud800",
    "\0",
    "..",
    "F8_E4M3",
    "I64",
    "F4",
    [],
    {},
    [0],
    [2, 2],
    *([2**32, 2**32], [2**63, 2], [2**62, 4], [2**61, 8]),  # whose product is 0 in 64 bits
)
TEXTS = (b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'{"a":1,"a":2}', b"[" * 4000, b"0" * 5000, b"\xff", b"\n", b" ")


def json_bytes(data: bytes, random: Random) -> bytes:
    """Apply one to four changes to a JSON text, or to its bytes if it does not parse."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return spliced(data, random)
    for _ in range(random.randint(1, 4)):
        tree = changed(tree, random)
    text = json.dumps(tree).encode()
    return spliced(text, random) if random.random() < 0.1 else text


def spliced(data: bytes, random: Random) -> bytes:
    """Insert odd bytes at a random place."""
    at = random.randint(0, len(data))
    return data[:at] + random.choice(TEXTS) + data[at + random.choice((0, 0, 1, 4)) :]


def changed(tree: Any, random: Random) -> Any:
    """Change one place of a tree: replace it, remove it, repeat it under another name, or exchange it with another."""
    places = list(_places(tree))
    if not places:
        return deepcopy(random.choice(VALUES))
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(("a", "", "dtype", "shape", "__metadata__", f"{key}.0"))] = deepcopy(holder[key])
        case 1:
            holder.insert(key, deepcopy(holder[key]))
        case 2:
            other, place = random.choice(places)
            holder[key] = deepcopy(other[place])
        case 3 if type(holder[key]) is int:
            holder[key] += random.choice((-8, -2, -1, 1, 2, 8))
        case _:
            holder[key] = deepcopy(random.choice(NUMBERS if type(holder[key]) is int else VALUES))
    return tree


def _places(tree: Any):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def file_bytes(data: bytes, random: Random) -> bytes:
    """Replace the header of a safetensors file; mostly with a matching length, and data up to the last offset."""
    if len(data) < 8:
        return data
    (nbytes,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + min(nbytes, len(data))], data[8 + min(nbytes, len(data)) :]
    header = json_bytes(header, random)
    if random.random() < 0.8:
        body = body[: _last_offset(header)].ljust(_last_offset(header), b"\5")
    if random.random() < 0.1:
        body = body[: max(0, len(body) + random.choice((-8, -1, 1)))].ljust(random.choice((0, 1)), b"\5")
    length = len(header) if random.random() < 0.95 else random.choice([abs(n) % 2**64 for n in NUMBERS])
    return struct.pack("<Q", length) + header + body


def _last_offset(header: bytes) -> int:
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(header).values() if "data_offsets" in entry]
        return int(min(4096, max(0, *ends)))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 0


def lines(data: bytes, random: Random) -> bytes:
    """Change, remove, repeat, or cut one of several JSON lines."""
    parts = data.splitlines(keepends=True)
    if not parts:
        return spliced(data, random)
    at = random.randrange(len(parts))
    match random.randrange(5):
        case 0:
            del parts[at]
        case 1:
            parts.insert(random.randint(0, len(parts)), parts[at])
        case 2:
            parts[-1] = parts[-1][: random.randint(0, len(parts[-1]))]
        case _:
            parts[at] = json_bytes(parts[at].rstrip(b"\n"), random) + b"\n"
    return b"".join(parts)
