"""Comparisons for tests: tensors by name, and the files of a directory."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from automodel_conv.testing import assert_bytes_equal


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that both have the same names, in any order, with the same bytes, shapes and dtypes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(actual[name], tensor)


def assert_same_in_order(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that both have the same names in the same order, with the same bytes, shapes and dtypes."""
    assert list(actual) == list(expected)
    assert_same(actual, expected)


def tensors_of(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """Return all tensors of a directory, read with safetensors."""
    return {n: t for file in sorted(Path(directory).glob("*.safetensors")) for n, t in load_file(file).items()}


def numel_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of elements of all tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def contents(directory: str | PathLike[str]) -> dict[str, bytes]:
    """Return the bytes of all files of a directory, by name, as ``unpadded`` returns them."""
    return {path.name: unpadded(path) for path in Path(directory).iterdir()}


def unpadded(path: Path) -> bytes:
    """Return the bytes of a file. For safetensors, drop the length of the header and the spaces at its end.

    This package pads headers so that the data starts at a page: the only difference from the files of transformers.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if path.suffix != ".safetensors" or start > len(data):
        return data
    return data[8:start].rstrip(b" ") + data[start:]
