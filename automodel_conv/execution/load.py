"""The steps around an executor that all loads share: check buffers, write constants, run transformers' own code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from automodel_conv.errors import ConversionError, listing
from automodel_conv.execution.buffers import BufferCopies, checked_buffer, fill_constants
from automodel_conv.execution.fallbacks import FallbackCall, fallback_calls, run_fallback
from automodel_conv.execution.reading import read_whole
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.timeline import UPSTREAM, Lane
from automodel_conv.execution.workers import raise_if_stopped
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import SharedBar, bytes_progress


class Load(NamedTuple):
    """A load with checked buffers: the copies to execute, and the calls of transformers' own code that follow."""

    plan: CopyPlan
    checkpoint: Checkpoint
    buffers: Mapping[str, Tensor]
    targets: list[Target]
    """The targets that copies fill and that are not empty."""
    tensors: list[Tensor]
    """The buffer of each of ``targets``."""
    copies: Sequence[Sequence[StridedCopy]]
    """For each of ``targets``, the copies that fill its buffer."""
    calls: list[FallbackCall]
    """The calls of transformers' own code, which fill the other targets."""

    @property
    def whole_bytes(self) -> int:
        """Bytes of the sources that are read for transformers' own code."""
        return sum(map(self.bytes_of, self.calls))

    def bytes_of(self, call: FallbackCall) -> int:
        """Return the bytes of the sources of one call."""
        return sum(self.checkpoint.nbytes[row] for row in call.rows)


def prepare_load(plan: CopyPlan, checkpoint: Checkpoint, buffers: Mapping[str, Tensor]) -> Load:
    """Check all buffers of a plan, and compute the copies that fill them; read nothing.

    Args:
        plan: the plan to execute. Its sources are the checkpoint's rows.
        checkpoint: the checkpoint to read.
        buffers: the buffers by target name; see ``checked_buffer``.

    Raises:
        ConversionError: a buffer is missing or does not fit.
        UnsupportedError: torch does not have a dtype, or copies cannot follow the strides of a buffer.
    """
    targets = [target for target in plan.targets if target.fallback is None and prod(target.shape)]
    tensors = [checked_buffer(target, buffers) for target in targets]
    calls = fallback_calls(plan)
    for target in (target for call in calls for target in call.targets):
        checked_buffer(target, buffers)
    copies_for = BufferCopies()
    copies = [copies_for(target, tensor) for target, tensor in zip(targets, tensors, strict=True)]
    return Load(plan, read_as_planned(plan, checkpoint), buffers, targets, tensors, copies, calls)


def read_as_planned(plan: CopyPlan, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose bytes have the dtypes that a plan reads them as."""
    sources = plan.sources
    return replace(checkpoint, dtypes=sources.dtypes, shapes=sources.shapes) if sources.stored else checkpoint


def run_load(
    load: Load,
    bytes_copied: int,
    run: Callable[[Callable[[int], None]], LoadStats],
    unfinished: Callable[[], set[int]],
    progress: SharedBar | bool,
    stop: threading.Event | None,
    lane: Lane,
) -> LoadStats:
    """Run an executor, then transformers' own code; add the names of the complete targets to any error.

    Args:
        load: the load to run.
        bytes_copied: number of bytes that ``run`` reads.
        run: function that reads and copies. It receives a callback, and calls it with each number of bytes it has read.
        unfinished: function that returns the numbers of the targets that may lack bytes. It is called after ``run`` has
            returned or raised.
        progress: whether to draw a progress bar, or a bar that several loads share.
        stop: event that any thread may set. Once it is set, no further call of transformers' code starts.
        lane: records the calls of transformers' code.

    Raises:
        Stopped: ``stop`` was set before all work was done.
    """
    bytes_read = bytes_copied + load.whole_bytes
    written: list[str] = []
    with bytes_progress(bytes_read, "reading", progress) as advance:
        try:
            for target, tensor in zip(load.targets, load.tensors, strict=True):
                fill_constants(target, tensor)
            stats = run(advance)
            for call in load.calls:
                raise_if_stopped(stop)
                lane.restart()
                sources = {row: read_whole(row, load.checkpoint) for row in call.rows}
                lane.read_lap(load.bytes_of(call))
                run_fallback(call, sources, load.buffers)
                lane.lap(UPSTREAM)
                written += [target.name for target in call.targets]
                advance(load.bytes_of(call))
        except BaseException as error:
            incomplete = unfinished()
            written += [target.name for number, target in enumerate(load.targets) if number not in incomplete]
            add_filled_targets(error, written, len(load.plan.targets))
            raise
    return stats._replace(bytes_read=bytes_read)


def add_filled_targets(error: BaseException, written: Sequence[str], total: int) -> None:
    """Add the names of the complete targets to an error.

    A load to several devices calls this once for each device that was written to.

    Args:
        error: the error to extend.
        written: names of the complete targets of one device.
        total: number of all targets of that device.
    """
    add_note(error, "\n".join(filter(None, [f"  filled:   {len(written)} of {total} targets", listing(written)])))


def add_note(error: BaseException, text: str) -> None:
    """Add lines to the text of an error of this package, or as a note to any other error."""
    if isinstance(error, ConversionError):
        error.add(text)
    else:  # BaseException.add_note does the same, but Python 3.10 does not have it
        error.__notes__ = [*getattr(error, "__notes__", ()), text]  # type: ignore[attr-defined]
