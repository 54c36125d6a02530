"""Writes to storages, executed by torch on bytes, with the sources that each byte comes from."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.planning.boxes import reach
from automodel_conv.planning.loader_writes import Computed, Constant, View, Write

NBYTES = 48
STRIDES = (1, 1, 1, 2, 2, 3, 4, 6, 8, 12)


class Origin(NamedTuple):
    """Where a byte comes from."""

    rows: frozenset[int] = frozenset()
    """Rows of sources."""
    is_moved: bool = True
    """Whether it is copied from one source, or constant; else an operation computes it, or nobody knows it."""


class Storages:
    """Storages of ``NBYTES`` bytes each, the first of which are sources, whose bytes all differ.

    No value of a source is a NaN in any floating-point dtype.

    Args:
        sources: number of sources.
        others: number of other storages.
    """

    def __init__(self, sources: int, others: int):
        self.sources, self.keys = sources, range(sources + others)
        self.bytes = [torch.arange(1 + NBYTES * row, 1 + NBYTES * (row + 1)).to(torch.uint8) for row in range(sources)]
        self.bytes += [torch.full((NBYTES,), 0xEE, dtype=torch.uint8) for _ in range(others)]
        self.origins: list[list[Origin | None]] = [[Origin(frozenset([row]))] * NBYTES for row in range(sources)]
        self.origins += [[None] * NBYTES for _ in range(others)]

    def tensor(self, view: View) -> Tensor:
        return self.bytes[view.storage].view(view.dtype).as_strided(view.shape, view.strides, view.offset)

    def origins_of(self, view: View) -> list[list[Origin | None]]:
        """Return the origins of the bytes of each element; None for a byte that nothing is written to."""
        return [[self.origins[view.storage][at] for at in places] for places in _places(view)]

    def rows_of(self, view: View) -> frozenset[int]:
        """Return the rows of the sources that elements come from."""
        return frozenset(
            row for element in self.origins_of(view) for origin in element if origin for row in origin.rows
        )

    def write(self, write: Write) -> None:
        target, source = write
        if isinstance(source, View):
            value = self.tensor(source).clone()
            elements = self.origins_of(source)
            if source.dtype != target.dtype:
                elements = [[_joined(element)] * target.dtype.itemsize for element in elements]
            self.tensor(target).copy_(value)
        elif isinstance(source, Constant):
            self.tensor(target).fill_(source.value)
            elements = [[Origin()] * target.dtype.itemsize for _ in _places(target)]
        else:
            rows = frozenset(row for view in source.inputs or () for row in self.rows_of(view))
            elements = [[Origin(rows, False)] * target.dtype.itemsize for _ in _places(target)]
        for places, origins in zip(_places(target), elements, strict=True):
            for at, origin in zip(places, origins, strict=True):
                self.origins[target.storage][at] = origin or Origin(is_moved=False)


def _places(view: View) -> list[list[int]]:
    """Return the bytes of each element."""
    itemsize = view.dtype.itemsize
    elements = torch.arange(NBYTES // itemsize).as_strided(view.shape, view.strides, view.offset)
    return [[element * itemsize + at for at in range(itemsize)] for element in elements.flatten().tolist()]


def _joined(origins: list[Origin | None]) -> Origin:
    """Return the origin of a cast element."""
    rows = frozenset(row for origin in origins if origin for row in origin.rows)
    return Origin(rows, all(origin is not None and origin.is_moved for origin in origins))


def random_view(rng: Random, storage: int, dtype: torch.dtype, *, repeats: bool, shape: tuple[int, ...] = ()) -> View:
    """Return a view; if ``repeats``, it may have elements more than once."""
    numel = NBYTES // dtype.itemsize
    while True:
        size = shape or tuple(rng.choice((1, 2, 2, 3, 4, 6)) for _ in range(rng.randrange(1, 4)))
        strides = tuple(rng.choice((0, *STRIDES) if repeats else STRIDES) for _ in size)
        last = reach(size, strides)
        if last < numel:
            view = View(storage, dtype, rng.choice([0, rng.randrange(numel - last)]), size, strides)
            places = [places[0] for places in _places(view)]
            if repeats or len(set(places)) == len(places):
                return view


def random_write(rng: Random, storages: Storages, dtypes: Mapping[torch.dtype, tuple[torch.dtype, ...]]) -> Write:
    """Return a write to a storage that is no source.

    Args:
        rng: random numbers.
        storages: the storages.
        dtypes: dtypes of targets, and for each those of what is written to it.
    """
    dtype = rng.choice([*dtypes])
    target = random_view(rng, rng.choice(storages.keys[storages.sources :]), dtype, repeats=False)
    kind = rng.random()
    if kind < 0.15:
        return Write(target, Constant(rng.choice([0, 1, 257, 0.1])) if dtype.itemsize > 1 else Constant(7))
    storage = rng.choice([key for key in storages.keys if key != target.storage])
    source = random_view(rng, storage, rng.choice(dtypes[dtype]), repeats=True, shape=target.shape)
    return Write(target, Computed("an operation", (source,)) if kind < 0.2 else source)
