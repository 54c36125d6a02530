"""Loads to the host and to a device share this: checks before the first read, work after the last, and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from automodel_conv.errors import ConversionError, listing
from automodel_conv.execution.buffers import BufferCopies, checked_buffer
from automodel_conv.execution.fallbacks import FallbackCall, fallback_calls, run_fallback
from automodel_conv.execution.reading import read_whole
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.workers import raise_if_stopped
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar, bytes_progress


class Load(NamedTuple):
    """A load whose buffers are checked: what copies make, and what upstream's own code makes afterwards."""

    plan: CopyPlan
    checkpoint: Checkpoint
    buffers: Mapping[str, Tensor]
    targets: list[Target]
    """Made by copies, and not empty."""
    tensors: list[Tensor]
    """Their buffers."""
    copies: Sequence[Sequence[StridedCopy]]
    """Of each, aimed at its buffer."""
    calls: list[FallbackCall]

    @property
    def whole_bytes(self) -> int:
        """Bytes that are read for upstream's own code."""
        return sum(map(self.bytes_of, self.calls))

    def bytes_of(self, call: FallbackCall) -> int:
        """Bytes of the sources of a call."""
        return sum(self.checkpoint.nbytes[row] for row in call.rows)


def prepare_load(plan: CopyPlan, checkpoint: Checkpoint, buffers: Mapping[str, Tensor]) -> Load:
    """Check all buffers of a plan, before anything is read.

    Args:
        plan: its sources are the checkpoint's rows.
        buffers: by target name; see ``checked_buffer``.

    Raises:
        ConversionError: a buffer is missing or does not fit.
        UnsupportedError: a dtype that torch does not know, or strides that copies cannot follow.
    """
    targets = [target for target in plan.targets if target.fallback is None and prod(target.shape)]
    tensors = [checked_buffer(target, buffers) for target in targets]
    calls = fallback_calls(plan)
    for target in (target for call in calls for target in call.targets):
        checked_buffer(target, buffers)
    copies_for = BufferCopies()
    copies = [copies_for(target, tensor) for target, tensor in zip(targets, tensors, strict=True)]
    return Load(plan, checkpoint, buffers, targets, tensors, copies, calls)


def run_load(
    load: Load,
    bytes_copied: int,
    run: Callable[[Callable[[int], None]], LoadStats],
    unfinished: Callable[[], set[int]],
    progress: SharedBar | bool,
    stop: threading.Event | None,
) -> LoadStats:
    """Run what reads and copies, then upstream's own code; whatever ends it names the targets that are complete.

    Args:
        bytes_copied: that ``run`` reads.
        run: makes all that copies make; is given what it tells of the bytes that it has read.
        unfinished: numbers of the targets that may lack bytes, once ``run`` has returned or raised.
        progress: draw a bar, or draw in one that others share.
        stop: set by anybody, no further call of upstream's code is made.
    """
    bytes_read = bytes_copied + load.whole_bytes
    written: list[str] = []
    with bytes_progress(bytes_read, "loading", progress) as advance:
        try:
            stats = run(advance)
            for call in load.calls:
                raise_if_stopped(stop)
                sources = {row: read_whole(row, load.checkpoint) for row in call.rows}
                run_fallback(call, sources, load.buffers)
                written += [target.name for target in call.targets]
                advance(load.bytes_of(call))
        except BaseException as error:
            lacking = unfinished()
            written += [target.name for number, target in enumerate(load.targets) if number not in lacking]
            add_filled_targets(error, written, len(load.plan.targets))
            raise
    return stats._replace(bytes_read=bytes_read)


def add_filled_targets(error: BaseException, written: Sequence[str], total: int) -> None:
    """Add the names of the targets that are complete, of ``total``, to the text of our own errors, as a note to others.

    Said of the targets of one device, once for each that has been written to.
    """
    add_note(error, "\n".join(filter(None, [f"  filled:   {len(written)} of {total} targets", listing(written)])))


def add_note(error: BaseException, text: str) -> None:
    """Add lines to the text of our own errors, as a note to others."""
    if isinstance(error, ConversionError):
        error.add(text)
    else:  # as add_note, which Python 3.10 does not have
        error.__notes__ = [*getattr(error, "__notes__", ()), text]  # type: ignore[attr-defined]
