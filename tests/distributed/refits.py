"""Suite: refits between trainers and engines of every kind, on 2 + 1 to 4 + 4 ranks.

A variant is the number of ranks of the trainer and of the engine, such as ``4+2``; the first ranks are the trainer's.
``0 of 8 4+2`` is a part of all combinations.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from itertools import combinations, product
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_conv.loading_code import dry_run
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.refit import Refit
from automodel_conv.refitting.running import Prepared
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.models import local
from tests.distributed.refit_models import (
    DTYPES,
    ENGINES,
    TRAINERS,
    TYPES,
    Place,
    RankMeshes,
    Side,
    Weights,
    fits,
    give,
    in_nemo,
    part_of_rank,
    poison,
    weights,
)
from tests.distributed.starting import send

WORLD = 8
SPLITS = ("2+1", "2+2", "4+2", "4+4")
# Many rounds, a few, one.
BUCKETS = (30_000, 200_000, 64 << 20)


class Check(NamedTuple):
    """One refit: ranks of the trainer and of the engine, the type, the kind of both sides, the trainer's dtype."""

    split: str
    name: str
    trainer: str
    engine: str
    dtype: str
    bucket_bytes: int


def every_check() -> list[Check]:
    everything = product(SPLITS, TYPES, TRAINERS, ENGINES, DTYPES, BUCKETS)
    return [check for check in map(Check._make, everything) if fits(*sizes(check.split), *check[1:4])]


def sizes(split: str) -> tuple[int, int]:
    trainers, engines = map(int, split.split("+"))
    return trainers, engines


def pairwise(checks: Sequence[Check]) -> list[Check]:
    """Return some checks in which two values meet if they meet at all; of the pairs of kinds every second one."""
    pairs = {check: {pair for pair in combinations(enumerate(check), 2) if _counts(pair)} for check in checks}
    missing = set().union(*pairs.values())
    # In steps, so that neighbours differ in several values; fewer ranks first.
    ordered = sorted((checks[number * 7919 % len(checks)] for number in range(len(checks))), key=_ranks)
    chosen = []
    for least in range(max(map(len, pairs.values())), 0, -1):
        for check in ordered:
            if len(pairs[check] & missing) >= least:
                chosen.append(check)
                missing -= pairs[check]
    return chosen


def _counts(pair: tuple[tuple[int, Any], tuple[int, Any]]) -> bool:
    (first, trainer), (second, engine) = pair
    if (Check._fields[first], Check._fields[second]) != ("trainer", "engine"):
        return True
    return ([*TRAINERS].index(trainer) + [*ENGINES].index(engine)) % 2 == 0


def _ranks(check: Check) -> int:
    return sum(sizes(check.split))


@cache
def few_checks() -> list[Check]:
    return pairwise(every_check())


def checks_of(split: str, *, every: bool = False) -> list[Check]:
    """Return the checks with these ranks: all pairs of values, or every combination of a type and two kinds."""
    if not every:
        return [check for check in few_checks() if check.split == split]
    combined: dict[tuple[str, ...], list[Check]] = {}
    for check in every_check():
        if check.split == split:
            combined.setdefault(check[1:4], []).append(check)
    return [checks[number % len(checks)] for number, checks in enumerate(combined.values())]


def prepare(directory: Path, world: int) -> dict[tuple[str, str], Weights]:
    # Once, before ranks are forked: also what DTensors import when they are first used.
    few_checks()
    importlib.import_module("torch._dynamo")
    return {(name, dtype): weights(name, dtype, directory) for name in TYPES for dtype in DTYPES}


def rank(common: dict[tuple[str, str], Weights], variant: str, directory: Path) -> None:
    part, _, split = variant.rpartition(" ")
    trainers, engines = sizes(split)
    if not join(directory, trainers + engines):
        return
    ranks = range(trainers + engines)
    meshes = RankMeshes(ranks[:trainers]), RankMeshes(ranks[trainers:])
    number, _, count = part.partition(" of ")
    checks = checks_of(split, every=True)[int(number) :: int(count)] if part else checks_of(split)
    for check in checks:
        try:
            refits(common[check.name, check.dtype], check, *meshes)
        except Exception as error:
            raise AssertionError(f"{check}") from error
        send(check)


def join(directory: Path, world: int) -> bool:
    """Replace the group of all processes by one of the first ``world``; return whether this process is in it."""
    own = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    if own >= world:
        return False
    address = f"file://{directory}/rendezvous of {world}"
    dist.init_process_group("gloo", init_method=address, rank=own, world_size=world, timeout=timedelta(seconds=120))
    return True


def refits(source: Weights, check: Check, of_trainer: RankMeshes, of_engine: RankMeshes) -> None:
    """Refit once for each step, and compare what engines hold and what was sent."""
    trainers, engines = sizes(check.split)
    own = dist.get_rank()
    sends = own < trainers
    if sends:
        dtype = torch.float32 if check.dtype == "float32" else None
        side = TRAINERS[check.trainer](source, check.trainer, Place(own, trainers, of_trainer), dtype)
    else:
        side = ENGINES[check.engine](source, check.engine, Place(own - trainers, engines, of_engine), None)
    refit = Refit(side.module, sends=sends, bucket_bytes=check.bucket_bytes, **side.options)
    for number, step in enumerate(source.steps):
        values = in_nemo(step.values) if check.trainer == "nemo experts" else step.values
        if sends:
            give(side, values)
        else:
            poison(side.module)
        places = [local(tensor).data_ptr() for tensor in side.module.state_dict().values()]
        with no_planning() if number else nullcontext(), counted() as messages:
            report = refit()
        assert places == [local(tensor).data_ptr() for tensor in side.module.state_dict().values()]
        assert_holds(side, values if sends else step.engines[side.expected])
        wanted = 0 if sends else wanted_bytes(side, step.engines[side.expected])
        costs = [None] * (trainers + engines)
        dist.all_gather_object(costs, Cost(report, messages, wanted))
        assert_costs(check, costs, refit.forecast())


def assert_holds(side: Side, values: Mapping[str, Tensor]) -> None:
    for name, tensor in side.module.state_dict().items():
        try:
            assert_bytes_equal(local(tensor), part_of_rank(side, values[name], tensor))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def wanted_bytes(side: Side, values: Mapping[str, Tensor]) -> int:
    """Return the bytes that another process must send to a rank of the engine: each tensor once, without padding."""
    memory = {}
    for tensor in side.module.state_dict().values():
        if tensor.numel():
            memory[local(tensor).data_ptr()] = local(tensor).nbytes
    return sum(memory.values()) - side.padding


class Cost(NamedTuple):
    """The report of a rank, the bytes of each message that it sent and received, and those that it must receive."""

    report: Any
    messages: dict[str, list[int]]
    wanted_bytes: int


def assert_costs(check: Check, costs: Sequence[Cost], forecast: Any) -> None:
    """Compare what was sent with what had to be, with the reports and with the forecast."""
    trainers, engines = sizes(check.split)
    sent, received = ([sum(cost.messages[way]) for cost in costs] for way in ("isend", "irecv"))
    assert received == [cost.wanted_bytes for cost in costs]
    assert sum(sent) == sum(received)
    assert sent == [cost.report.bytes_sent for cost in costs]
    assert received == [cost.report.bytes_received for cost in costs]
    assert sent == [forecast.bytes_sent.get(number, 0) for number in range(len(costs))]
    assert received == [forecast.bytes_received.get(number, 0) for number in range(len(costs))]
    counts = [sum(map(len, cost.messages.values())) for cost in costs]
    assert counts == [cost.report.messages for cost in costs]
    assert sum(counts) == 2 * forecast.messages
    for number, count in enumerate(counts):
        assert count <= forecast.rounds * (engines if number < trainers else trainers)
    assert forecast.peak_extra_bytes == max(cost.report.peak_extra_bytes for cost in costs) <= 2 * check.bucket_bytes
    if check.trainer in ("none", "hsdp"):
        half = trainers // 2
        replicas = [range(trainers)] if check.trainer == "none" else [(n, n + half) for n in range(half)]
        for ranks in replicas:  # one unit of each receiver may go to any of them, and all units fit into a bucket
            loads = [sent[number] for number in ranks]
            assert max(loads) - min(loads) <= check.bucket_bytes, loads


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Record the bytes of each message between ranks."""
    messages: dict[str, list[int]] = {"isend": [], "irecv": []}
    real = dist.batch_isend_irecv

    def batch(operations: list[Any]) -> list[Any]:
        for each in operations:
            messages[each.op.__name__].append(each.tensor.nbytes)
        return real(operations)

    with mock.patch.object(dist, "batch_isend_irecv", batch):
        yield messages


@contextmanager
def no_planning() -> Iterator[None]:
    """Let all functions that plan raise."""
    planned = ("automodel_conv.planning.", "automodel_conv.schedule.", "automodel_conv.compiling.")
    owners: Iterable[Any] = [
        module
        for name, module in sys.modules.items()
        if name == "automodel_conv.refit" or name.startswith("automodel_conv.refitting.")
    ]
    places = [
        (owner, name)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType) and value.__module__.startswith(planned)
    ]
    places += [(CopyPlan, name) for name in ("then", "shard", "validate", "from_json", "to_json")]
    places += [(Prepared, "__init__"), (dry_run, "traced")]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, _planning))
        yield


def _planning(*args: object, **options: object) -> None:
    raise AssertionError("a call plans again")
