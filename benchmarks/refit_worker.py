"""Refits by real ranks: a trainer under FSDP2, an engine with expert parallelism, and the ways from one to the other.

``benchmarks.refit`` starts the process that forks them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.distributed.placements import local_of
from automodel_conv.distributed.point_to_point import start_batch, wait_for
from automodel_conv.testing import POISON
from benchmarks.grouped import per_expert
from benchmarks.refit_engine import Engine, wrong
from benchmarks.shapes import Shape, TensorSpec, meta_model

TRAINERS, ENGINES = 2, 2
RANKS = TRAINERS + ENGINES
"""The ranks of the trainer come first."""
_SIGN = torch.iinfo(torch.int16).min


class Side(NamedTuple):
    """The module of a rank: its part of the trainer, or an ``Engine``."""

    module: Any
    sends: bool
    """Whether the module is the trainer's."""
    published: list[TensorSpec]
    """The tensors of the checkpoint, in the order in which the trainer sends them."""
    broadcasting: Any
    """The group of the first rank of the trainer and all ranks of the engine."""
    bucket_bytes: int


class Move(NamedTuple):
    """One way to move the weights: what happens once, and what happens at each call."""

    prepare: Callable[[Side], Callable[[], amc.RefitReport | None]]
    fills: bool = True
    """Whether the engine has the trainer's weights then."""


def broadcast_each(side: Side) -> Callable[[], None]:
    """Gather each parameter, and broadcast each tensor of the checkpoint on its own.

    vLLM does so with ``ModuleSource`` and the backend "nccl", ``packed=False``, as far as names are those of the
    checkpoint (``vllm/distributed/weight_transfer/nccl_engine.py``).
    """

    def send() -> None:
        for _, tensor in _published(side.module, _gathered):
            if dist.get_rank() == 0:
                dist.broadcast(tensor, 0, side.broadcasting)

    def receive() -> None:
        for spec in side.published:
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            dist.broadcast(tensor, 0, side.broadcasting)
            side.module.load_weights([(spec.name, tensor)])

    return send if side.sends else receive


def broadcast_buckets(side: Side) -> Callable[[], None]:
    """Gather each parameter, and broadcast the tensors of the checkpoint in buckets.

    verl does so, and vLLM with ``packed=True``. Two buckets are used in turn, and stay allocated: one is filled, or
    loaded from, while the other one is under way.
    """
    buckets = _buckets(side.published, side.bucket_bytes)
    size = max(sum(spec.nbytes for spec in bucket) for bucket in buckets)
    broadcasts = not side.sends or dist.get_rank() == 0
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)] if broadcasts else []

    def start(number: int) -> Any:
        nbytes = sum(spec.nbytes for spec in buckets[number])
        return dist.broadcast(buffers[number % 2][:nbytes], 0, side.broadcasting, async_op=True)

    def send() -> None:
        if not broadcasts:
            _gather(side)
            return
        tensors = _published(side.module, _gathered)
        under_way: list[Any] = []
        for number, bucket in enumerate(buckets):
            if number >= 2:
                under_way[number - 2].wait()
            for _, place in _places(bucket, buffers[number % 2]):
                place.copy_(next(tensors)[1])
            under_way.append(start(number))
        for work in under_way[-2:]:
            work.wait()

    def receive() -> None:
        under_way = [start(0)]
        for number, bucket in enumerate(buckets):
            if number + 1 < len(buckets):
                under_way.append(start(number + 1))
            under_way[number].wait()
            side.module.load_weights((spec.name, place) for spec, place in _places(bucket, buffers[number % 2]))

    return send if side.sends else receive


def gather(side: Side) -> Callable[[], None]:
    """Gather each parameter, as the methods that broadcast do, and send nothing to the engine."""
    return lambda: _gather(side) if side.sends else None


def refit(side: Side) -> Callable[[], amc.RefitReport]:
    """Plan a refit."""
    loader = None if side.sends else side.module.load_weights
    return amc.Refit(side.module, sends=side.sends, loader=loader, bucket_bytes=side.bucket_bytes)


def plain_send(side: Side) -> Callable[[], None]:
    """Send as many bytes as the parameters of the engine have, from a rank of the trainer to each rank of the engine.

    They come from one buffer and go to one buffer, so nothing else is done.
    """
    peer = (dist.get_rank() + TRAINERS) % RANKS
    sizes: list[Any] = [0] * RANKS
    dist.all_gather_object(sizes, 0 if side.sends else sum(tensor.nbytes for tensor in _tensors(side)))
    left = max(sizes[dist.get_rank()], sizes[peer])
    buffer = torch.zeros(min(left, side.bucket_bytes), dtype=torch.uint8)
    messages: list[tuple[int, Tensor]] = []
    while left:
        messages.append((peer, buffer[:left]))
        left -= len(messages[-1][1])

    def run() -> None:
        wait_for(start_batch(dist.group.WORLD, *((messages, []) if side.sends else ([], messages))))

    return run


METHODS: Mapping[str, Move] = {
    "plain send": Move(plain_send, fills=False),
    "gather alone": Move(gather, fills=False),
    "gather, broadcast each tensor, load": Move(broadcast_each),
    "gather, broadcast buckets, load": Move(broadcast_buckets),
    "ours": Move(refit),
}


def _published(trainer: nn.Module, whole: Callable[[Any], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint from those of the trainer, each made ``whole``."""
    for name, parameter in trainer.named_parameters():
        yield from per_expert(name, whole(parameter.detach())).items()


def _gather(side: Side) -> None:
    """Gather each parameter, and keep none."""
    for _ in _published(side.module, _gathered):
        pass


def _gathered(parameter: DTensor) -> Tensor:
    """Return the whole parameter; all ranks of the trainer call this."""
    return parameter.full_tensor()


def _buckets(published: list[TensorSpec], most_bytes: int) -> list[list[TensorSpec]]:
    buckets: list[list[TensorSpec]] = []
    room = -1
    for spec in published:
        if spec.nbytes > room:
            buckets.append([])
            room = most_bytes
        buckets[-1].append(spec)
        room -= spec.nbytes
    return buckets


def _places(bucket: list[TensorSpec], buffer: Tensor) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Yield the tensors of a bucket, and their places."""
    start = 0
    for spec in bucket:
        yield spec, buffer[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
        start += spec.nbytes


def work(method: str, shape: Shape, small: Shape, directory: str, bucket_bytes: int, calls: int) -> dict[str, Any]:
    """Move the weights of a small model once, and then those of the model several times, on this rank.

    Args:
        method: one of ``METHODS``.
        shape, small: the models; ``directory`` has their checkpoints, "big" and "small".
        bucket_bytes: size of buckets.
        calls: number of calls.

    Returns:
        What each call took, and under "wrong" the names of tensors that a rank of the engine did not have after a call.
    """
    move = METHODS[method]
    mesh = dist.device_mesh.DeviceMesh("cpu", list(range(TRAINERS)))
    group = dist.new_group([0, *range(TRAINERS, RANKS)])
    tried = _moved(move, _side(small, f"{directory}/small", mesh, group, bucket_bytes), f"{directory}/small", 2)
    side = _side(shape, f"{directory}/big", mesh, group, bucket_bytes)
    if dist.get_rank() == 0:
        ready_memory(sum(spec.nbytes for spec in side.published))
    result = _moved(move, side, f"{directory}/big", calls)
    return result | {"wrong": [*tried["wrong"], *result["wrong"]]}


def _moved(move: Move, side: Side, directory: str, calls: int) -> dict[str, Any]:
    """Return what each call takes; before each one but the first, all weights of the trainer change."""
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    sent_bytes: list[int] = []
    reports: list[amc.RefitReport] = []
    differing: list[str] = []
    run = None
    _renew(side, change=False)  # so that the memory of the engine exists
    with PeakMemory() as peak:
        for number in range(calls):
            _renew(side, change=number > 0)
            dist.barrier()
            start, start_cpu, start_bytes = time.perf_counter(), time.process_time(), _written_bytes()
            if run is None:
                run = move.prepare(side)
            report = run()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - start_cpu)
            sent_bytes.append(_written_bytes() - start_bytes)
            reports += [report] if report is not None else []
            dist.barrier()
            if move.fills and not side.sends:
                differing += wrong(side.module, directory, flipped=number % 2 == 1)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "sent_bytes": sent_bytes,
        "reported_bytes": [report.bytes_sent for report in reports],
        "wrong": differing,
        "owned_bytes": sum(tensor.nbytes for tensor in _tensors(side)),
        "anonymous_bytes": peak.anonymous_bytes,
        "resident_bytes": peak.resident_bytes,
    }


def _side(shape: Shape, directory: str, mesh: Any, group: Any, bucket_bytes: int) -> Side:
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    module: Any = meta_model(shape)
    published = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in _published(module, lambda whole: whole)]
    sends = rank < TRAINERS
    if sends:
        for part in (*module.model.layers, module):
            fully_shard(part, mesh=mesh)
        module.to_empty(device="cpu")
        amc.load_model(module, directory, threads=1)
    else:
        module = Engine(shape, rank - TRAINERS, ENGINES)
    return Side(module, sends, published, group, bucket_bytes)


def _tensors(side: Side) -> list[Tensor]:
    return [local_of(parameter.detach()) for parameter in side.module.parameters()]


def _renew(side: Side, change: bool) -> None:
    """Flip the sign of each element of the trainer, if ``change``, and overwrite the parameters of the engine."""
    for tensor in _tensors(side):
        if not side.sends:
            tensor.view(torch.uint8).fill_(POISON)
        elif change:
            tensor.view(torch.int16).bitwise_xor_(_SIGN)


def _written_bytes() -> int:
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])
