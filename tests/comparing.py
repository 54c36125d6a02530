"""What tests compare: tensors by name, and all that lies in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from automodel_conv.testing import assert_bytes_equal


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, in any order, with the same bytes, shapes and dtypes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(actual[name], tensor)


def assert_same_in_order(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names in the same order, with the same bytes, shapes and dtypes."""
    assert list(actual) == list(expected)
    assert_same(actual, expected)


def tensors_of(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a directory, read by safetensors."""
    return {n: t for file in sorted(Path(directory).glob("*.safetensors")) for n, t in load_file(file).items()}


def contents(directory: str | PathLike[str]) -> dict[str, bytes]:
    """The bytes of all files of a directory, by name, as ``unpadded``."""
    return {path.name: unpadded(path) for path in Path(directory).iterdir()}


def unpadded(path: Path) -> bytes:
    """The bytes of a file; of a safetensors file without the header's length and the spaces at the header's end.

    These let the data of what this package writes begin at a page, and are all in which a file of upstream's differs.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if path.suffix != ".safetensors" or start > len(data):
        return data
    return data[8:start].rstrip(b" ") + data[start:]
