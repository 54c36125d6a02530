"""Compose the writes of a ``LoaderTrace`` to copies from sources to targets.

The contents of a storage are pieces that read origins, see ``origin_space.py``. A copy of a view chains the pieces of
its storage with the elements of the view; they take the place of what the target has had there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from automodel_conv.planning.boxes import SPAN, Box, NotAffine, Piece, chain, contiguous_strides, outside, reach, run_of
from automodel_conv.planning.loader_writes import Computed, Constant, View, Write
from automodel_conv.planning.origin_space import OriginSpace, finer_walk
from automodel_conv.planning.origins import Number, Read, Unknown, constant
from automodel_conv.planning.storage_contents import StorageContents

_MOST_REPEATS = 4096
_UNWRITTEN = Computed("the loading code copies elements that it has not written", None)


class Filled(NamedTuple):
    """The copies and constants that fill a target, or why there are none."""

    reads: tuple[tuple[Read, Piece], ...] = ()
    """Copies to the contiguous target."""
    numbers: tuple[tuple[float, Piece], ...] = ()
    """Elements that are constant."""
    unknown: Unknown | None = None
    """Why copies and constants do not fill it; then there are none."""
    is_written: bool = True
    """Whether anything is written to it."""


class Composer:
    """Composes writes in their order.

    Args:
        nbytes: bytes of each storage, by key.
        sources: row and dtype of each source, by the key of its storage, which only it has.
        old: what storages contain before anything is written to them; None: nothing that counts.
    """

    def __init__(
        self,
        nbytes: Mapping[int, int],
        sources: Mapping[int, tuple[int, torch.dtype]],
        old: Mapping[int, Computed | None] | None = None,
    ):
        self._old = old or {}
        self._nbytes = nbytes
        self._row_of = {key: row for key, (row, _) in sources.items()}
        self._all_rows = frozenset(self._row_of.values())
        self._space = OriginSpace()
        self._storages: dict[int, StorageContents] = {}
        self._inputs: dict[int, set[int]] = {}
        """For each storage, the storages that something written to it comes from."""
        self._rewritten: dict[int, list[tuple[int, int]]] = {}
        """For each storage, the first byte and the byte after the last of writes over copied or computed elements."""
        for key, (row, dtype) in sources.items():
            contents = StorageContents(dtype.itemsize, nbytes[key] // dtype.itemsize)
            if contents.numel:
                whole = Piece(0, run_of(contents.numel), 0, 0)
                contents.replace([], [self._space.moved_from(whole, Read(row, dtype, dtype))])
            self._storages[key] = contents

    def write(self, write: Write) -> None:
        """Take the next write into account."""
        target, source = write
        if 0 in target.shape:
            return
        views = (source,) if isinstance(source, View) else source.inputs or () if isinstance(source, Computed) else ()
        self._inputs.setdefault(target.storage, set()).update(view.storage for view in views)
        old = None
        if isinstance(source, View):
            pieces = self._moved(source, target)
            old = self._old.get(source.storage, _UNWRITTEN)
        elif isinstance(source, Constant):
            value = torch.tensor(source.value, dtype=target.dtype)
            pieces = [self._space.uniform(target, constant(value))]
        else:
            pieces = [self._space.uniform(target, self._unknown(source))]
        parts: list[Piece] = []
        if old is not None and sum(piece.box.numel for piece in pieces) < prod(target.shape):
            pieces, parts = [self._space.uniform(target, self._unknown(old))], pieces
        if self._put(target, pieces):
            itemsize = target.dtype.itemsize
            end = target.offset + reach(target.shape, target.strides) + 1
            self._rewritten.setdefault(target.storage, []).append((target.offset * itemsize, end * itemsize))
        for piece in parts:
            _, (shape, _, strides), _, start = piece
            self._put(View(target.storage, target.dtype, start, shape, strides), [piece])

    def _put(self, target: View, pieces: Sequence[Piece]) -> bool:
        """Replace the contents of a view by pieces that write all of it.

        Return whether it had other contents than constants.
        """
        contents = self._contents(target)
        ratio = target.dtype.itemsize // contents.itemsize
        if ratio > 1:
            pieces = [self._space.finer(piece, ratio) for piece in pieces]
        first = target.offset * ratio
        last = (target.offset + reach(target.shape, target.strides) + 1) * ratio - 1
        old = contents.near(first, last)
        try:
            left = outside(old, _covered(target, ratio), contents.numel) if old else []
            contents.replace(old, [*left, *pieces])
            return self._numel_moved(left) < self._numel_moved(old)
        except NotAffine as error:
            rows = self._space.rows([*contents.pieces, *pieces])
            everything = View(target.storage, target.dtype, 0, (contents.numel,), (1,))
            contents.replace(contents.pieces, [self._space.uniform(everything, Unknown(str(error), rows))])
            return True

    def filled(self, view: View) -> Filled:
        """Return what fills a view."""
        pieces = self._moved(view, _compact(view))
        origins = [self._space.origin(piece) for piece in pieces]
        unknown = [origin for origin in origins if isinstance(origin, Unknown)]
        size, written = prod(view.shape), sum(piece.box.numel for piece in pieces)
        if 0 < written < size:
            unknown.append(Unknown(f"writes only {written} of {size} elements"))
        reads, numbers, dtypes = [], [], {}
        for origin, piece in zip(origins, pieces, strict=True):
            local = piece._replace(source_offset=piece.source_offset % SPAN)
            if isinstance(origin, Number):
                numbers.append((origin.number, local))
            elif isinstance(origin, Read):
                if dtypes.setdefault(origin.row, origin.stored) != origin.stored:
                    unknown.append(Unknown("reads one tensor as two dtypes"))
                singles = _without_repeats(local)
                if singles is None:
                    unknown.append(Unknown("repeats elements too often"))
                else:
                    reads += [(origin, single) for single in singles]
        if unknown:
            rows = self._space.rows(pieces)
            return Filled(unknown=Unknown(unknown[0].reason, rows))
        return Filled(tuple(reads), tuple(numbers), is_written=bool(written) or not size)

    def filled_with(self, view: View, source: Constant | Computed) -> Filled:
        """Return what fills a view that consists of a constant, or is computed."""
        if isinstance(source, Computed):
            return Filled(unknown=self._unknown(source))
        compact = _compact(view)
        box = Box(compact.shape, (0,) * len(compact.shape), compact.strides).canonical()
        return Filled(numbers=((source.value, Piece(0, box, 0, 0)),) if prod(view.shape) else ())

    def is_rewritten(self, view: View) -> bool:
        """Return whether elements of a view are written again after they have been copied or computed."""
        itemsize = view.dtype.itemsize
        start, stop = (at * itemsize for at in (view.offset, view.offset + reach(view.shape, view.strides) + 1))
        return any(first < stop and start < last for first, last in self._rewritten.get(view.storage, ()))

    def _numel_moved(self, pieces: Sequence[Piece]) -> int:
        """Return the number of elements of pieces that are not constant."""
        return sum(piece.box.numel for piece in pieces if not isinstance(self._space.origin(piece), Number))

    def storages_behind(self, storages: Iterable[int]) -> set[int]:
        """Return these storages and all that something in them comes from."""
        found, pending = set(), [*storages]
        while pending:
            storage = pending.pop()
            if storage not in found:
                found.add(storage)
                pending += self._inputs.get(storage, ())
        return found

    def source_rows(self, storages: Iterable[int]) -> frozenset[int]:
        """Return the rows of the sources among storages."""
        return frozenset(self._row_of[key] for key in storages if key in self._row_of)

    def changed_rows(self, storages: Iterable[int]) -> frozenset[int]:
        """Return the rows of the sources among storages that something is written to."""
        return frozenset(self._row_of[key] for key in storages if key in self._row_of and key in self._inputs)

    def rows(self, view: View) -> frozenset[int]:
        """Return the rows of the sources that elements of a view come from."""
        return self._space.rows(self._moved(view, _compact(view)))

    def _unknown(self, source: Computed) -> Unknown:
        if source.inputs is None:
            return Unknown(source.reason, self._all_rows)
        rows = frozenset[int]()
        for view in source.inputs:
            pieces = self._moved(view, _compact(view))
            is_whole = sum(piece.box.numel for piece in pieces) == prod(view.shape)
            rows |= self._space.rows(pieces)
            rows |= frozenset() if is_whole or view.storage in self._old else self._all_rows
        return Unknown(source.reason, rows)

    def _contents(self, view: View) -> StorageContents:
        """Return the contents of the storage of a view, in elements that are not larger than those of the view."""
        itemsize = view.dtype.itemsize
        contents = self._storages.get(view.storage)
        if contents is None:
            contents = self._storages[view.storage] = StorageContents(itemsize, self._nbytes[view.storage] // itemsize)
        if contents.itemsize > itemsize:
            finer = StorageContents(itemsize, self._nbytes[view.storage] // itemsize)
            finer.replace([], [self._space.finer(piece, contents.itemsize // itemsize) for piece in contents.pieces])
            contents = self._storages[view.storage] = finer
        return contents

    def _moved(self, source: View, target: View) -> list[Piece]:
        """Return pieces that write to the storage of ``target`` what a view of its shape contains."""
        if 0 in source.shape:
            return []
        contents = self._contents(source)
        repeated = [dim for dim, stride in enumerate(source.strides) if stride == 0]
        dims = [dim for dim in range(len(source.shape)) if dim not in repeated]
        box = Box(
            tuple(source.shape[dim] for dim in dims),
            tuple(source.strides[dim] for dim in dims),
            tuple(target.strides[dim] for dim in dims),
        ).canonical()
        ratio = source.dtype.itemsize // contents.itemsize
        walk = finer_walk(Piece(0, box, source.offset, target.offset), ratio)
        last = walk.source_offset + reach(walk.box.shape, walk.box.source_strides)
        near = contents.near(walk.source_offset, last)
        try:
            pieces = chain(near, [walk], contents.numel)
            if ratio > 1:
                pieces = [self._space.coarser(piece, ratio, source.dtype) for piece in pieces]
        except NotAffine as error:
            rows = self._space.rows(near)
            return [self._space.uniform(target, Unknown(str(error), rows))]
        if repeated:
            shape, strides = (tuple(view[dim] for dim in repeated) for view in (source.shape, target.strides))
            pieces = [_repeated(piece, shape, strides) for piece in pieces]
        return [self._space.cast(piece, source.dtype, target.dtype) for piece in pieces]


def _compact(view: View) -> View:
    """Return the contiguous tensor with the shape of a view."""
    return view._replace(strides=contiguous_strides(view.shape), offset=0)


def _covered(view: View, ratio: int) -> Piece:
    """Return the elements of a view, of which each counts as ``ratio``."""
    return finer_walk(Piece(0, Box(view.shape, view.strides, view.strides), view.offset, view.offset), ratio)


def _repeated(piece: Piece, counts: tuple[int, ...], strides: tuple[int, ...]) -> Piece:
    """Return a piece that writes what it writes several times: along more dimensions of the target."""
    shape, source_strides, target_strides = piece.box
    box = Box((*counts, *shape), (0,) * len(counts) + source_strides, (*strides, *target_strides))
    return piece._replace(box=box.canonical())


def _without_repeats(piece: Piece) -> list[Piece] | None:
    """Return a piece as pieces that read no element twice; None if there would be too many."""
    if 0 not in piece.box.source_strides:
        return [piece]
    dims = list(zip(*piece.box, strict=True))
    repeats = [(size, target) for size, source, target in dims if source == 0]
    if prod(size for size, _ in repeats) > _MOST_REPEATS:
        return None
    rest = [dim for dim in dims if dim[1] != 0]
    box = Box(*(tuple(column) for column in zip(*rest, strict=True))) if rest else Box((), (), ())
    starts = (
        sum(index * stride for index, (_, stride) in zip(at, repeats, strict=True))
        for at in product(*(range(size) for size, _ in repeats))
    )
    return [Piece(0, box.canonical(), piece.source_offset, piece.target_offset + start) for start in starts]
