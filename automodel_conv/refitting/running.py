"""The execution of a refit on one rank: pack buckets, send them, and unpack what arrives straight into place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.distributed.point_to_point import start_batch, wait_for
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of, fill_constants
from automodel_conv.execution.copy_batch import CopyBatch, PlannedCopies, uses_kernels
from automodel_conv.kernels.launch import start
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides
from automodel_conv.planning.copies import StridedCopy, Target
from automodel_conv.refitting.messages import Message, Rounds, Run, bucket_bytes


class OwnCopy(NamedTuple):
    """A copy within this rank."""

    source: str
    target: str
    """Name of the tensor of the engine."""
    piece: Piece


@dataclass(frozen=True)
class Work:
    """Messages and copies of one rank in each refit.

    Tensors are named: those of the trainer's module, and those of the engine's.
    """

    sends: Rounds
    receives: Rounds
    """As many rounds as ``sends``; the same number on all ranks."""
    own: tuple[OwnCopy, ...] = ()
    """Copies from the trainer's module of this rank."""
    repeats: tuple[OwnCopy, ...] = ()
    """Copies from one tensor of the engine to another, after all others."""
    constants: tuple[Target, ...] = ()
    """Targets with constants."""

    @cached_property
    def buffer_bytes(self) -> int:
        """Bytes of the buckets that this rank needs: two of each kind, if there are several rounds."""
        return sum(min(len(rounds), 2) * bucket_bytes(rounds) for rounds in (self.sends, self.receives))

    @cached_property
    def bytes_sent(self) -> int:
        """Bytes of all messages to other ranks."""
        return sum(each.nbytes for messages in self.sends for each in messages)

    @cached_property
    def bytes_received(self) -> int:
        """Bytes of all messages from other ranks."""
        return sum(each.nbytes for messages in self.receives for each in messages)

    @cached_property
    def message_count(self) -> int:
        """Number of all messages."""
        return sum(map(len, self.sends)) + sum(map(len, self.receives))

    def states(
        self, names: Iterable[str], progress: Progress, got_wrong: bool, changed: Collection[str] = ()
    ) -> tuple[list[str], list[str], list[str]]:
        """Return the names of tensors of the engine that are new, old, and broken, which is neither.

        Args:
            names: all tensors that are filled.
            progress: how far an unfinished refit is.
            got_wrong: whether a rank sent bytes that it could not pack.
            changed: names of tensors that an earlier refit, which was not finished either, wrote to.
        """
        finish = len(self.receives)
        rounds_in_place = 0 if progress.is_queued else progress.rounds
        late = [copy.target for copy in (*self.own, *self.repeats)] + [target.name for target in self.constants]
        rounds = {name: [finish] for name in late}
        for number, messages in enumerate(self.receives):
            for run in (run for each in messages for run in each.runs):
                rounds.setdefault(run.tensor, []).append(number)
        new, old, broken = [], [], []
        for name in names:
            written = rounds.get(name, [])
            if not progress.has_begun or min(written, default=0) > progress.rounds:
                (broken if name in changed else old).append(name)
            elif (progress.is_done or max(written, default=-1) < rounds_in_place) and not got_wrong:
                new.append(name)
            else:
                broken.append(name)
        return new, old, broken


@dataclass
class Progress:
    """How far a refit is."""

    has_begun: bool = False
    rounds: int = 0
    """Number of rounds whose elements are all in place, or on a GPU whose copies are all queued."""
    is_done: bool = False
    error: Exception | None = None
    """The first error of a copy on this rank."""
    sent_wrong: bool = False
    """Whether this rank sent bytes that it could not pack."""
    is_queued: bool = False
    """Whether copies are only queued on a GPU, so that none is known to be done before all are."""


class Prepared:
    """The copies of a rank between its tensors and its buckets, which later refits run again.

    Args:
        work: what the rank does.
        sent: tensors of the trainer's module by name.
        filled: tensors of the engine's module by name.
        device: device of the buckets.
    """

    @torch.inference_mode()  # in which tensors of both kinds can be written to, those made in this mode and others
    def __init__(self, work: Work, sent: Mapping[str, Tensor], filled: Mapping[str, Tensor], device: torch.device):
        self._work, self._device = work, device
        self._sent, self._filled = sent, filled
        self._sent_buckets = _Buckets(work.sends, device)
        self._received_buckets = _Buckets(work.receives, device)
        self._packs = [
            _prepared(_packed(run, at, sent[run.tensor], buffer) for run, at in _runs(messages))
            for messages, buffer in zip(work.sends, self._sent_buckets.by_round, strict=True)
        ]
        self._unpacks = [
            _prepared(_unpacked(run, at, filled[run.tensor], buffer) for run, at in _runs(messages))
            for messages, buffer in zip(work.receives, self._received_buckets.by_round, strict=True)
        ]
        self._own = _prepared(_Copy(copy.piece, sent[copy.source], filled[copy.target]) for copy in work.own)
        self._repeats = _prepared(_Copy(copy.piece, filled[copy.source], filled[copy.target]) for copy in work.repeats)

    @torch.inference_mode()
    def run(self, group: Any, progress: Progress) -> None:
        """Run all rounds: one is packed and another one unpacked while the messages of one are under way.

        If a copy fails on this rank, it still sends and receives all messages, so that no rank waits for it.

        Raises:
            RuntimeError: a rank no longer responds.
            Exception: the first error of a copy.
        """
        progress.has_begun, progress.is_queued = True, self._device.type == "cuda"
        count = len(self._packs)
        started = [self._start(0, group, progress)] if count else []
        for number in range(count):
            if number + 1 < count:
                started.append(self._start(number + 1, group, progress))
            wait_for(started[number])
            started[number] = []
            if _succeeds(partial(_run, self._unpacks[number]), progress):
                progress.rounds = number + 1
        progress.is_done = _succeeds(self._finish, progress)
        if progress.error is not None:
            raise progress.error

    def _finish(self) -> None:
        """Make the copies within this rank, and wait for its device."""
        _run(self._own)
        _run(self._repeats)
        for target in self._work.constants:
            fill_constants(target, self._filled[target.name])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _start(self, number: int, group: Any, progress: Progress) -> list[Any]:
        if not _succeeds(partial(_run, self._packs[number]), progress) and self._work.sends[number]:
            progress.sent_wrong = True
        sends = self._sent_buckets.messages(self._work.sends, number)
        return start_batch(group, sends, self._received_buckets.messages(self._work.receives, number))


class _Buckets:
    """Two buffers that rounds use in turn."""

    def __init__(self, rounds: Rounds, device: torch.device):
        size = bucket_bytes(rounds)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(len(rounds), 2))]
        self.by_round = [buffers[number % 2] for number in range(len(rounds))]

    def messages(self, rounds: Rounds, number: int) -> list[tuple[int, Tensor]]:
        """Return the other rank and the bytes of each message of a round."""
        buffer = self.by_round[number]
        return [(each.rank, buffer[each.start : each.start + each.nbytes]) for each in rounds[number]]


class _Copy(NamedTuple):
    """A copy in memory; the piece counts elements of contiguous tensors."""

    piece: Piece
    source: Tensor
    target: Tensor


def _runs(messages: Iterable[Message]) -> Iterable[tuple[Run, int]]:
    """Yield the runs of messages, and the offset of each in the bucket in bytes."""
    for each in messages:
        at = each.start
        for run in each.runs:
            yield run, at
            at += run.nbytes


def _packed(run: Run, at: int, tensor: Tensor, bucket: Tensor) -> _Copy:
    elements = _elements(bucket, run.dtype)
    box = Box(run.shape, run.strides, contiguous_strides(run.shape))
    return _Copy(Piece(0, box, run.offset, at // elements.itemsize), tensor, elements)


def _unpacked(run: Run, at: int, tensor: Tensor, bucket: Tensor) -> _Copy:
    elements = _elements(bucket, run.dtype)
    box = Box(run.shape, contiguous_strides(run.shape), run.strides)
    return _Copy(Piece(0, box, at // elements.itemsize, run.offset), elements, tensor)


def _elements(bucket: Tensor, code: str) -> Tensor:
    return bucket.view(dtype_of(code, "a message"))


def _prepared(copies: Iterable[_Copy]) -> PlannedCopies:
    """Return copies as launches of kernels, and as views for torch."""
    batch = CopyBatch()
    tensors: dict[int, Tensor] = {}
    for copy in copies:
        tensors |= {id(copy.source): copy.source, id(copy.target): copy.target}
        for piece in _on_strides(copy):
            strided = StridedCopy(piece.box, (0,), (piece.source_offset,), (piece.target_offset,))
            batch.add(strided, [copy.source], copy.target)
    return batch.plan(uses_kernels("auto", tensors.values()))


def _on_strides(copy: _Copy) -> Sequence[Piece]:
    """Return the pieces of a copy with the actual strides of its tensors."""
    pieces: Sequence[Piece] = [copy.piece]
    try:
        if not copy.source.is_contiguous():
            pieces = chain([_to_contiguous(copy.source)], pieces, copy.source.numel())
        if not copy.target.is_contiguous():
            pieces = chain(pieces, [_to_contiguous(copy.target).inverse()], copy.target.numel())
    except NotAffine as error:
        tensor = copy.source if not copy.source.is_contiguous() else copy.target
        raise UnsupportedError(
            message(
                "copies cannot follow the strides of a tensor",
                found=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}: {error}",
                do="make it contiguous",
            )
        ) from None
    return [piece.canonical() for piece in pieces]


def _to_contiguous(tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(0, Box(shape, tensor.stride(), contiguous_strides(shape)), 0, 0)


def _succeeds(step: Callable[[], None], progress: Progress) -> bool:
    """Run a step unless an earlier one failed, keep its error, and return whether it was run without one."""
    if progress.error is None:
        try:
            step()
        except Exception as error:
            progress.error = error
    return progress.error is None


def _run(copies: PlannedCopies) -> None:
    start(*copies.launches)
    strided_copy_torch(*copies.by_torch)
