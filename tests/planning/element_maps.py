"""Which element of which source each element of a target has, so that equal plans may consist of different copies."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan import CopyPlan

ORIGIN = np.dtype([("source", "i8"), ("element", "i8"), ("constant", "f8")])
"""Row and element of the source; or -1, 0 and the value of a constant."""


def origins(target: Target) -> np.ndarray:
    """Return the origin of each element of a target, and check that each is written once."""
    at = np.zeros(prod(target.shape), ORIGIN)
    writes = np.zeros(len(at), int)
    for piece in (piece for copy in target.copies for piece in copy.pieces()):
        to = _elements(piece.target_offset, piece.box.shape, piece.box.target_strides)
        at["source"][to] = target.sources[piece.source]
        at["element"][to] = _elements(piece.source_offset, piece.box.shape, piece.box.source_strides)
        np.add.at(writes, to, 1)
    for fill in target.fills:
        to = _elements(fill.offset, fill.shape, fill.strides)
        at[to] = (-1, 0, fill.value)
        np.add.at(writes, to, 1)
    assert (writes == 1).all(), target.name
    return at


def _elements(offset: int, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """Return the numbers of the elements of a view, in row-major order."""
    numbers = np.array(offset)
    for size, stride in zip(shape, strides, strict=True):
        numbers = numbers[..., None] + np.arange(size) * stride
    return numbers.reshape(-1)


def assert_same_targets(actual: CopyPlan, expected: CopyPlan) -> None:
    """Check that two plans make the same tensors of the same sources: names, dtypes, shapes and every element."""
    assert _columns(actual.sources) == _columns(expected.sources)
    found = {target.name: target for target in actual.targets}
    assert found.keys() == {target.name for target in expected.targets}
    for target in expected.targets:
        assert_same_target(found[target.name], target)


def assert_same_target(actual: Target, expected: Target) -> None:
    """Check that two targets have the same dtype, shape and elements."""
    assert expected.fallback is None, expected.name
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), expected.name
    different = np.flatnonzero(origins(actual) != origins(expected))
    assert not len(different), f"{expected.name}: {len(different)} elements differ, the first is {different[0]}"


def _columns(sources: SourceTable) -> list[tuple[str, str, tuple[int, ...]]]:
    return list(zip(sources.names, sources.dtypes, sources.shapes, strict=True))
