"""Read and check the header of one safetensors file.

Source: safetensors 0.8.0, the format section of its README and ``Metadata::validate`` in ``tensor.rs``. If the two
differ, the stricter one applies: a header starts with ``{``, and no name occurs twice. In addition to both, names must
be short and printable.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from operator import sub
from typing import Any, NamedTuple, TypeVar

from automodel_conv.dtypes import BITS
from automodel_conv.errors import CheckpointError, ReadError, message
from automodel_conv.files import system
from automodel_conv.files.fast_json import MAX_BITS, Columns, usual_columns, usual_object
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.lookalikes import SNIFFED_BYTES, lookalike
from automodel_conv.files.source import ByteSource, OpenSource

# Source: MAX_HEADER_SIZE in safetensors/src/tensor.rs.
MAX_HEADER_BYTES = 100_000_000
_AGAIN = "the file is damaged: copy or download it again"
# Matching a rule's pattern may take time quadratic in the length of a name. The longest name of a model has about 150.
LONGEST_NAME = 1024

Item = TypeVar("Item")


class Header(NamedTuple):
    """The columns of a Checkpoint for one file, sorted by data offset."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    offsets: list[int]
    nbytes: list[int]
    metadata: dict[str, str]


def read_header(source: ByteSource) -> Header:
    """Read and check the header of a file.

    Raises:
        CheckpointError: the file cannot be read, or its header is invalid.
    """
    path = source.describe()
    try:
        with closing(source.open()) as file:
            file_bytes = file.size()
            return _check_header(_read_header_bytes(path, file_bytes, file), file_bytes, path)
    except (OSError, ReadError) as error:
        raise checkpoint_error("cannot read a file of the checkpoint", where=path, found=error) from error


def with_open(path: str, read: Callable[[int], Any]) -> Any:
    """Open a file, and return the result of ``read`` for its descriptor.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with system.open_readonly(path) as file:
            return read(file.fileno())
    except (OSError, ReadError) as error:
        raise checkpoint_error("cannot read a file of the checkpoint", where=path, found=error) from error


def read_limited(fd: int, path: str, limit: int) -> bytearray:
    """Read a whole file of at most ``limit`` bytes.

    Raises:
        CheckpointError: the file is larger.
        ReadError: the file cannot be read.
    """
    nbytes = system.size(fd)
    if nbytes > limit:
        raise too_large(path, limit, nbytes)
    data = bytearray(nbytes)
    read_exactly(fd, [memoryview(data)], 0, path)
    return data


def too_large(path: str, limit: int, found: object) -> CheckpointError:
    """Return the error for an index or a config that is larger than ``limit`` bytes."""
    return checkpoint_error("an index is too large", where=path, expected=f"at most {limit} bytes", found=found)


def _read_header_bytes(path: str, file_bytes: int, file: OpenSource) -> bytearray:
    """Return the JSON text of a header.

    Its length is checked before memory is allocated.
    """
    if file_bytes < 8:
        _refuse_lookalike(path, file_bytes, file)
        raise checkpoint_error(
            "not a safetensors file: too short for a header",
            where=path,
            expected="at least 8 bytes",
            found=f"{file_bytes} bytes",
            do="the file is truncated or a placeholder: copy or download it again",
        )
    length = bytearray(8)
    file.read_into([memoryview(length)], 0)
    nbytes = int.from_bytes(length, "little")
    if nbytes > MAX_HEADER_BYTES or nbytes > file_bytes - 8:
        _refuse_lookalike(path, file_bytes, file)
        raise checkpoint_error(
            "the length of a header is impossible",
            where=path,
            expected=f"at most {min(MAX_HEADER_BYTES, file_bytes - 8)} bytes",
            found=f"{nbytes} bytes",
            do="the file is truncated or not safetensors: copy or download it again",
        )
    data = bytearray(nbytes)
    file.read_into([memoryview(data)], 8)
    if not data.startswith(b"{"):
        raise checkpoint_error(
            "a header that is not a JSON object",
            where=path,
            expected="{",
            found=bytes(data[:16]),
            do=_AGAIN,
        )
    return data


def _refuse_lookalike(path: str, file_bytes: int, file: OpenSource) -> None:
    """Raise CheckpointError if the beginning of a file shows that it is of another known format."""
    start = bytearray(min(file_bytes, SNIFFED_BYTES))
    file.read_into([memoryview(start)], 0)
    other = lookalike(bytes(start))
    if other is not None:
        raise checkpoint_error("not a safetensors file", where=path, found=other.what, do=other.do)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{short(name)} occurs {count} times")
    return result


def _integer(text: str) -> int:
    if text == "-0":  # serde parses it as a floating-point number
        raise ValueError("-0 is not an integer")
    _floating(text)
    return int(text)


def _floating(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # serde refuses it
        raise ValueError(f"{text[:40]} is out of range")
    return number


_decode = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique).decode
_decode_like_serde = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_integer, parse_float=_floating, object_pairs_hook=_unique
).decode


def parse_object(data: bytearray, path: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys at any depth.

    Raises:
        CheckpointError: the data is anything else.
    """
    parsed = usual_object(data)
    return _checked_object(data, path, _decode) if parsed is None else parsed


def _checked_object(data: bytearray, path: str, decode: Callable[[str], Any]) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        parsed = decode(text)
        if type(parsed) is not dict:
            raise ValueError(f"{type(parsed).__name__} instead of an object")
        if "\\u" in text:
            # An escape can encode half of a surrogate pair, which no terminal and no writer accepts.
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        expected = "one object, no name twice"
        raise malformed_json(data, path, expected, error) from error
    return parsed


def malformed_json(data: bytes | bytearray, path: str, expected: str, error: Exception) -> CheckpointError:
    """Return the error for a file that is not valid JSON, which names the actual format of the file if it is known."""
    other = lookalike(bytes(data[:SNIFFED_BYTES]))
    if other is None or data.lstrip()[:1] in (b"{", b"["):
        return checkpoint_error("malformed JSON", where=path, expected=expected, found=error, do=_AGAIN)
    return checkpoint_error("malformed JSON", where=path, expected=expected, found=other.what, do=other.do)


def _check_header(data: bytearray, file_bytes: int, path: str) -> Header:
    columns = usual_columns(data)
    if columns is None:
        columns = _checked_columns(data, path)
    names, dtypes, shapes, starts, ends, metadata = columns
    _refuse_odd_names(names, path)
    if starts[1:] != ends[:-1]:
        # Every common writer sorts tensors by offset, but the format does not require it.
        order = sorted(range(len(names)), key=lambda row: (starts[row], ends[row]))
        names, dtypes, shapes = take(names, order), take(dtypes, order), take(shapes, order)
        starts, ends = take(starts, order), take(ends, order)
    data_start = 8 + len(data)
    _check_coverage(names, starts, ends, file_bytes - data_start, path)
    return Header(
        names,
        dtypes,
        shapes,
        [data_start + start for start in starts],
        list(map(sub, ends, starts)),
        metadata,
    )


def _checked_columns(data: bytearray, path: str) -> Columns:
    """Parse the entries of any header, checking them one by one.

    Raises:
        CheckpointError: an entry is invalid; the error names it.
    """
    parsed = _checked_object(data, path, _decode_like_serde)
    metadata = parsed.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise checkpoint_error(
            "malformed __metadata__",
            where=path,
            expected="an object of strings",
            found=short(metadata),
        )
    names = list(parsed)
    _refuse_odd_names(names, path)
    rows = [_check_entry(name, entry, path) for name, entry in parsed.items()]
    dtypes, shapes = [row[0] for row in rows], [row[1] for row in rows]
    return Columns(names, dtypes, shapes, [row[2] for row in rows], [row[3] for row in rows], metadata)


def _refuse_odd_names(names: list[str], path: str) -> None:
    if (odd := odd_name(names)) is not None:
        found = f"{len(odd)} characters"
        if len(odd) <= LONGEST_NAME:
            place = next(place for place, character in enumerate(odd) if not character.isprintable())
            found = f"U+{ord(odd[place]):04X} at position {place}"
        raise _fault("an invalid tensor name", path, odd, f"at most {LONGEST_NAME} printable characters", found)


def odd_name(names: list[str]) -> str | None:
    """Return the first name that is too long or not printable; None if there is no such name."""
    if "".join(names).isprintable() and max(map(len, names), default=0) <= LONGEST_NAME:
        return None
    return next(name for name in names if len(name) > LONGEST_NAME or not name.isprintable())


def _check_entry(name: str, entry: Any, path: str) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, start and end of one tensor, after checking that the range fits shape and dtype."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _fault("malformed entry", path, name, "dtype, shape and two data_offsets", entry) from None
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise _fault("unknown dtype", path, name, f"one of {', '.join(BITS)}", dtype)
    if type(shape) is not list:
        raise _fault("malformed shape", path, name, "a list of integers >= 0", shape)
    size_bits = bits
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise _fault("malformed shape", path, name, "a list of integers >= 0", shape)
        size_bits *= dim
        if size_bits > MAX_BITS or dim > MAX_BITS:
            raise _fault("a shape is too large", path, name, "less than 2^63 bits", shape)
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        offsets = entry["data_offsets"]
        raise _fault("malformed data_offsets", path, name, "integers, 0 <= start <= end", offsets)
    if (end - start) * 8 != size_bits:
        raise _fault(
            "dtype and shape do not fit the data range",
            path,
            name,
            f"{size_bits} bits for {dtype} {short(shape)}",
            [start, end],
        )
    if dtype == "F4":
        if shape[-1] % 2:
            raise _fault("F4 values do not pair", path, name, "an even last dimension", shape)
        shape[-1] //= 2
    return dtype, tuple(shape), start, end


def _fault(what: str, path: str, name: str, expected: str, found: object) -> CheckpointError:
    return checkpoint_error(what, where=located(path, name), expected=expected, found=short(found))


def _check_coverage(names: list[str], starts: list[int], ends: list[int], data_bytes: int, path: str) -> None:
    """Raise CheckpointError unless the sorted ranges cover the data of the file without gaps and overlaps."""
    expected = [0, *ends[:-1]] if ends else []
    if starts != expected:
        row = next(row for row, start in enumerate(starts) if start != expected[row])
        previous = f", the end of {short(names[row - 1])}" if row else ""
        raise checkpoint_error(
            "two tensors overlap" if starts[row] < expected[row] else "a gap before a tensor",
            where=located(path, names[row]),
            expected=f"start {expected[row]}{previous}",
            found=f"start {starts[row]}",
            do="write the file again with safetensors",
        )
    stop = ends[-1] if ends else 0
    if stop > data_bytes:
        row = next(row for row, end in enumerate(ends) if end > data_bytes)
        raise checkpoint_error(
            "a file is truncated",
            where=located(path, names[row]),
            expected=f"{stop} bytes of data",
            found=f"{data_bytes} bytes: cut off here, {len(names) - row - 1} tensors follow",
            do="copy or download the file again",
        )
    if stop < data_bytes:
        raise checkpoint_error(
            "bytes after the last tensor",
            where=located(path, names[-1]) if names else path,
            expected=f"{stop} bytes of data",
            found=f"{data_bytes} bytes",
            do="write the file again with safetensors",
        )


def take(column: list[Item], rows: list[int]) -> list[Item]:
    """Return the items of a column at these rows."""
    return [column[row] for row in rows]


def checkpoint_error(
    what: str,
    *,
    where: str,
    expected: object = None,
    found: object = None,
    do: str | None = None,
) -> CheckpointError:
    """Return a CheckpointError; for the arguments see ``errors.message``."""
    return CheckpointError(message(what, where=where, expected=expected, found=found, do=do))


def located(path: str, name: str) -> str:
    """Return the position of a tensor in a file, for an error text."""
    return f"{path}, tensor {short(name)}"


def short(value: object) -> str:
    """Return a value of a header as printable text of limited length, for an error text."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
