"""Axes of a buffer in einops notation: ``"E (g i) h"`` has three dimensions, and the second has size g * i."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod

Dims = tuple[tuple[str, ...], ...]


@cache
def dims_of(axes: str) -> Dims:
    """Return the axes of each dimension, outermost first.

    >>> dims_of("E (g i) h")
    (('E',), ('g', 'i'), ('h',))
    """
    dims: list[tuple[str, ...]] = []
    for number, part in enumerate(axes.replace(")", "(").split("(")):
        names = tuple(part.split())
        dims += [names] if number % 2 else [(axis,) for axis in names]
    return tuple(dims)


def sizes_of(dims: Dims, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """Return the size of each axis of a buffer with this shape.

    Args:
        dims: axes of each dimension, as ``dims_of`` returns them.
        shape: shape of the buffer.
        known: sizes that the shape must agree with. They cover all axes except one of each dimension of several axes.

    Raises:
        ValueError: the shape has another rank, or a size that the known sizes do not divide.
    """
    if len(dims) != len(shape):
        raise ValueError(f"a tensor of shape {tuple(shape)} does not have {len(dims)} dimensions")
    sizes = dict(known)
    for dim, size in zip(dims, shape, strict=True):
        known_size = prod(known[axis] for axis in dim if axis in known)
        unknown = [axis for axis in dim if axis not in known]
        if unknown:
            sizes[unknown[0]] = size // known_size
        if size % known_size or (not unknown and size != known_size):
            raise ValueError(f"a dimension of size {size} cannot hold {' by '.join(dim)} with {dict(known)}")
    return sizes
