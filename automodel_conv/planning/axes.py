"""Axes of a buffer in the notation of einops: ``"E (g i) h"`` has three dimensions, the second of them g by i."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod

Dims = tuple[tuple[str, ...], ...]


@cache
def dims_of(axes: str) -> Dims:
    """The axes of each dimension, outermost first.

    >>> dims_of("E (g i) h")
    (('E',), ('g', 'i'), ('h',))
    """
    dims: list[tuple[str, ...]] = []
    for number, part in enumerate(axes.replace(")", "(").split("(")):
        within = tuple(part.split())
        dims += [within] if number % 2 else [(axis,) for axis in within]
    return tuple(dims)


def sizes_of(dims: Dims, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """The size of each axis of a buffer of that shape.

    Args:
        known: sizes that the shape must agree with; all but one in each dimension of several axes.

    Raises:
        ValueError: the shape has another rank, or a size that the known ones do not divide.
    """
    if len(dims) != len(shape):
        raise ValueError(f"a tensor of shape {tuple(shape)} has not {len(dims)} dimensions")
    sizes = dict(known)
    for dim, size in zip(dims, shape, strict=True):
        of_known = prod(known[axis] for axis in dim if axis in known)
        unknown = [axis for axis in dim if axis not in known]
        if unknown:
            sizes[unknown[0]] = size // of_known
        if size % of_known or (not unknown and size != of_known):
            raise ValueError(f"a dimension of size {size} is not {' by '.join(dim)} with {dict(known)}")
    return sizes
