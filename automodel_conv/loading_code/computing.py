"""Run loading code for the targets that it computes, on tensors with data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.reading import read_each
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.loading_code.calling import Load, Targets, call, returned
from automodel_conv.loading_code.dry_run import Traced
from automodel_conv.loading_code.part_of_loader import PartOfFunctions, PartOfLoader
from automodel_conv.loading_code.stand_ins import as_before, is_same_memory, named_tensors, with_stand_ins
from automodel_conv.loading_code.threads import in_threads
from automodel_conv.planning.loader_writes import key_of
from automodel_conv.types import LoaderCalls


def computed_values(
    load: Load, checkpoint: Checkpoint, targets: Targets, calls: LoaderCalls, traced: Traced
) -> tuple[dict[str, Tensor], int]:
    """Run loading code; return the targets that it computes, by name, and the bytes that are read for them.

    It gets sources with data only where the targets need them. If that turns out not to suffice, it runs once more, on
    all sources with data.

    Args:
        load: the loading code.
        checkpoint: the checkpoint.
        targets: what it fills. They are left as they were, except for the values of computed ones.
        calls: what it is called with.
        traced: what it does.

    Raises:
        ConversionError: a computed target has no data even so.
    """
    if not traced.computed:
        return {}, 0
    rows = traced.rows_for_computed
    bytes_read = 0
    if len(rows) < len(checkpoint.names):
        bytes_read = sum(checkpoint.nbytes[row] for row in rows)
        put_back = _kept(targets, traced)
        with torch.random.fork_rng(devices=[]), suppress(_LacksData):
            return _values(load, _sources(checkpoint, rows), targets, calls, traced, everything=False), bytes_read
        put_back()
    try:
        everything = _sources(checkpoint, range(len(checkpoint.names)))
        bytes_read += sum(checkpoint.nbytes)
        return _values(load, everything, targets, calls, traced, everything=True), bytes_read
    except _LacksData as error:
        raise ConversionError(
            message(
                "the loading code computes a target of tensors without data",
                where=str(error),
                do="let the loading code make it of the tensors that it is called with",
            )
        ) from None


def _kept(targets: Targets, traced: Traced) -> Callable[[], None]:
    """Return a function that puts back the memory of targets, and the elements that a run changes."""
    own = named_tensors(targets)
    needed = {key_of(own[name]) for name in traced.computed if name in own}
    forms = [(tensor, tensor.detach()) for tensor in own.values()]
    values = [(form, form.clone()) for _, form in forms if key_of(form) in needed]

    def put_back() -> None:
        for tensor, form in forms:
            if not is_same_memory(tensor, form):
                tensor.data = form
        for form, value in values:
            form.copy_(value)

    return put_back


class _LacksData(Exception):
    """Loading code was run on tensors too many of which have no data."""


def _sources(checkpoint: Checkpoint, rows: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """Return all sources by name; only those in ``rows`` have data, which is read when they are asked for."""
    data = read_each(sorted(rows), checkpoint)
    without = [  # made at once, before any mode is active
        None if row in rows else torch.empty(shape, dtype=torch_dtype(code), device="meta")
        for row, (shape, code) in enumerate(zip(checkpoint.shapes, checkpoint.dtypes, strict=True))
    ]
    return (
        (name, next(data) if tensor is None else tensor) for name, tensor in zip(checkpoint.names, without, strict=True)
    )


def _values(
    load: Load,
    given: Iterator[tuple[str, Tensor]],
    targets: Targets,
    calls: LoaderCalls,
    traced: Traced,
    *,
    everything: bool,
) -> dict[str, Tensor]:
    """Run loading code on sources, all or not all of which have data, and return the targets that it computes.

    Raises:
        _LacksData: one of them lacks data.
    """
    before = named_tensors(targets)
    needed = {key_of(before[name]) for name in traced.computed if name in before}
    read = needed.union(key_of(before[name]) for name in traced.targets_read | traced.needed if name in before)

    def is_replaced(tensor: Tensor) -> bool:
        return tensor.is_meta or key_of(tensor) not in needed

    def has_data(tensor: Tensor) -> bool:
        return everything or key_of(tensor) in read

    with (
        with_stand_ins(targets, is_replaced, has_data, memory=False)
        if isinstance(targets, nn.Module)
        else as_before(targets, memory=False)
    ):
        own = named_tensors(targets)
        mode = PartOfLoader({key_of(own[name]) for name in own if key_of(before[name]) in needed})
        function = PartOfFunctions(mode)
        try:
            with torch.no_grad(), mode, function, in_threads(mode, function):
                result = call(load, given, calls)
        except Exception as error:
            if everything:
                raise
            raise _LacksData from error
        found = named_tensors(targets) if targets is not None else returned(result)
        values = {name: found[name] for name in traced.computed if name in found}
        without = [name for name in traced.computed if name not in values or values[name].is_meta]
    if mode.lacks_data or without:
        raise _LacksData(", ".join(without))
    return values
