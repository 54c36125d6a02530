"""Suite: the errors of all ranks of a refit if one dies, is late, fails, or has another model; two of each side.

The last rank of the trainer (1) or the first of the engine (2) fails. Each rank sends the error that it has, and what
its tensors of the engine hold. Ranks stay until all others have ended or given up.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from automodel_conv.refit import Refit
from automodel_conv.refitting import running
from tests.distributed.starting import send

TIMEOUT_S = 8
TRAINERS = 2
NAMES = [f"t{number}" for number in range(6)]
SHAPE = (16, 8)
BUCKET_BYTES = 400
"""Holds less than one tensor, so that each of them needs several rounds."""
OLD, NEW = 1.0, 2.0
MESH: Any = None
"""The mesh of the trainer's ranks."""


def prepare(directory: Path, world: int) -> None:
    """Import what DTensors import when they are first used, before ranks are forked."""
    importlib.import_module("torch._dynamo")


def rank(common: None, variant: str, directory: Path) -> None:
    global MESH
    MESH = DeviceMesh("cpu", [0, 1])  # all ranks create its group
    began = time.monotonic()
    SCENARIOS[variant]()
    (directory / f"ended.{dist.get_rank()}").touch()
    stay = dist.get_world_size() - ("killed" in variant)
    while len(list(directory.glob("ended.*"))) < stay and time.monotonic() - began < 6 * TIMEOUT_S:
        time.sleep(0.05)


def on(number: int) -> bool:
    return dist.get_rank() == number


def sends() -> bool:
    return dist.get_rank() < TRAINERS


def module(tensors: dict[str, Tensor]) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return made


def own_module(names: list[str] = NAMES, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32):
    """Return the trainer's new weights, divided by FSDP's placements, or the engine's old ones."""
    if not sends():
        return module({name: torch.full(shape, OLD, dtype=dtype) for name in names})
    whole = torch.full(shape, NEW, dtype=dtype)
    return module({name: distribute_tensor(whole.clone(), MESH, [Shard(0)], src_data_rank=None) for name in names})


def planned(made: nn.Module, **options: Any) -> Refit:
    return Refit(made, **{"sends": sends(), "rules": [], "bucket_bytes": BUCKET_BYTES} | options)


def outcome(work: Callable[[], object], made: nn.Module | None = None) -> None:
    """Send the error of this rank, and the state of each tensor of the engine: as it says, and as its elements are."""
    began = time.monotonic()
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    states = {state: list(getattr(error, state, ())) for state in ("new", "old", "broken")}
    send(
        {
            "error": "" if error is None else type(error).__name__,
            "text": str(error),
            "said": {name: state for state, names in states.items() for name in names},
            "held": held(made),
            "seconds": time.monotonic() - began,
        }
    )


def held(made: nn.Module | None) -> dict[str, str]:
    if made is None or sends():
        return {}
    words = {frozenset([NEW]): "new", frozenset([OLD]): "old"}
    tensors = {name: tensor for name, tensor in made.state_dict().items() if not tensor.is_meta}
    return {name: words.get(frozenset(tensor.flatten().tolist()), "both") for name, tensor in tensors.items()}


def at_round(number: int, of_rank: int, do: Callable[[], None]) -> None:
    """Run ``do`` on a rank before it starts a round."""
    if not on(of_rank):
        return
    real, seen = running.start_batch, []

    def start(*args: Any) -> Any:
        seen.append(number)
        if len(seen) == number + 1:
            do()
        return real(*args)

    running.start_batch = start


def at_copy(number: int, of_rank: int, do: Callable[[], None]) -> None:
    """Run ``do`` on a rank before the copies of a round: of the trainer's it packs them, of the engine's it unpacks."""
    if not on(of_rank):
        return
    real, seen = running._run, []

    def run(copies: Any) -> None:
        if copies.launches or copies.by_torch[0]:
            seen.append(number)
            if len(seen) == number + 1:
                do()
        real(copies)

    running._run = run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trainer_killed_before_a_call() -> None:
    refit = planned(made := own_module())
    if on(1):
        die()
    outcome(refit, made)


def engine_killed_before_a_call() -> None:
    refit = planned(made := own_module())
    if on(2):
        die()
    outcome(refit, made)


def trainer_killed_while_it_plans() -> None:
    made = own_module()
    if on(1):
        die()
    outcome(lambda: planned(made), made)


def trainer_killed_in_a_call() -> None:
    refit = planned(made := own_module())
    at_round(4, 1, die)
    outcome(refit, made)


def engine_killed_in_a_call() -> None:
    refit = planned(made := own_module())
    at_round(4, 2, die)
    outcome(refit, made)


def killed_in_the_second_call() -> None:
    """Refit once, then lose a rank: what was written by the first call counts as old."""
    refit = planned(made := own_module())
    refit()
    for tensor in made.state_dict().values() if not sends() else ():
        tensor.fill_(OLD)
    at_round(4, 1, die)
    outcome(refit, made)


def late_within_the_time() -> None:
    """Wait before a call and in the middle of one, less than the time-out: nothing fails."""
    refit = planned(made := own_module())
    if on(1):
        time.sleep(TIMEOUT_S / 5)
    at_round(3, 2, lambda: time.sleep(TIMEOUT_S / 5))
    outcome(refit, made)


def late_beyond_the_time() -> None:
    """Let a rank of the trainer sleep longer than the time-out in the middle of a call."""
    refit = planned(made := own_module())
    at_round(3, 1, lambda: time.sleep(TIMEOUT_S * 1.5))
    outcome(refit, made)


def changed_shape() -> None:
    """Give a parameter another shape after the plan: no rank moves anything, and the group stays usable."""
    refit = planned(made := own_module())
    if on(2):
        made.t3.data = torch.full((8, 16), OLD)
    outcome(refit, made)
    if on(2):
        made.t3.data = torch.full(SHAPE, OLD)
    outcome(refit, made)


def changed_dtype() -> None:
    refit = planned(made := own_module())
    if on(2):
        made.t3.data = made.t3.data.double()
    outcome(refit, made)


def lost_parameter() -> None:
    refit = planned(made := own_module())
    if on(2):
        del made.t3
    outcome(refit, made)


def no_memory() -> None:
    raise MemoryError("no memory for a copy")


def engine_cannot_copy() -> None:
    """Fail to unpack a round: this rank goes on with its messages, and the next refit is whole."""
    refit = planned(made := own_module())
    real = running._run
    at_copy(4, 2, no_memory)
    outcome(refit, made)
    running._run = real
    outcome(refit, made)


def trainer_cannot_copy() -> None:
    """Fail to pack a round: no rank of the engine takes what it got for new."""
    refit = planned(made := own_module())
    real = running._run
    at_copy(4, 1, no_memory)
    outcome(refit, made)
    running._run = real
    outcome(refit, made)


def fails_twice() -> None:
    """Fail before anything moves, after a call that wrote some tensors: these are neither old nor new."""
    refit = planned(made := own_module())
    real = running._run
    at_copy(4, 2, no_memory)
    outcome(refit, made)
    running._run = real
    if on(2):
        made.t5.data = made.t5.data.double()
    outcome(refit, made)


def cannot_send() -> None:
    """Raise in the middle of a call on a rank that lives on, when it starts its messages."""
    refit = planned(made := own_module())
    at_round(4, 2, no_memory)
    outcome(refit, made)


def only_the_trainer_has_it() -> None:
    made = own_module([*NAMES, "extra"] if sends() else NAMES)
    outcome(lambda: planned(made), made)


def only_the_engine_has_it() -> None:
    made = own_module(NAMES if sends() else [*NAMES, "extra"])
    outcome(lambda: planned(made), made)


def only_one_rank_of_the_engine_has_it() -> None:
    made = own_module([*NAMES, "extra"] if on(2) else NAMES)
    outcome(lambda: planned(made), made)


def other_sizes() -> None:
    made = own_module(shape=SHAPE if sends() else (16, 9))
    outcome(lambda: planned(made), made)


def other_layers() -> None:
    made = own_module(NAMES[:4] if sends() else NAMES[2:])
    outcome(lambda: planned(made), made)


def trainers_with_other_sizes() -> None:
    made = module({"t0": torch.full((4, 8 + dist.get_rank() % 2 * sends()), OLD)})
    outcome(lambda: planned(made), made)


def trainers_with_other_dtypes() -> None:
    made = module({"t0": torch.full((4, 8), OLD, dtype=torch.float64 if on(1) else torch.float32)})
    outcome(lambda: planned(made), made)


def lacks_a_rank_of_the_trainer() -> None:
    """Use a group without rank 1, which holds half of each tensor."""
    made, group = own_module(), dist.new_group([0, 2, 3])
    if not on(1):
        outcome(lambda: planned(made, group=group), made)


def outside_of_the_group() -> None:
    """Construct it on a rank that is not in the group; the others go on."""
    made, group = module({"t0": torch.full((4, 8), NEW if sends() else OLD)}), dist.new_group([0, 2, 3])
    outcome(lambda: planned(made, group=group)(), made)


def other_buckets() -> None:
    made = own_module()
    outcome(lambda: planned(made, bucket_bytes=800 if on(2) else BUCKET_BYTES), made)


def tiny_buckets() -> None:
    made = own_module()
    outcome(lambda: planned(made, bucket_bytes=40), made)


def no_buckets() -> None:
    made = own_module()
    outcome(lambda: planned(made, bucket_bytes=0), made)


def nobody_sends() -> None:
    made = own_module()
    outcome(lambda: planned(made, sends=False), made)


def nobody_receives() -> None:
    made = own_module()
    outcome(lambda: planned(made, sends=True), made)


def engine_of_a_rank_that_receives() -> None:
    made = own_module()
    outcome(lambda: planned(made, **({"engine": made} if on(2) else {})), made)


def loader_of_the_trainer() -> None:
    made = own_module()
    outcome(lambda: planned(made, **({"loader": print} if on(1) else {})), made)


def loader_with_rules() -> None:
    made = own_module()
    outcome(lambda: planned(made, **({"loader": print} if on(2) else {})), made)


def loader_that_fails() -> None:
    """Let the loader of a rank raise an error of its own."""
    made = own_module()

    def load(pairs: Any) -> None:
        if on(2):
            raise KeyError("no such layer")
        for name, tensor in pairs:
            getattr(made, name).data.copy_(tensor)

    own = {} if sends() else {"rules": None, "loader": load}
    outcome(lambda: planned(made, **own), made)


def loader_that_computes() -> None:
    """Let the loader of a rank double a parameter, which no copy does."""
    made = own_module()

    def load(pairs: Any) -> None:
        for name, tensor in pairs:
            getattr(made, name).data.copy_(tensor * 2 if name == "t3" and on(2) else tensor)

    outcome(lambda: planned(made, **({} if sends() else {"rules": None, "loader": load})), made)


def loader_that_skips() -> None:
    """Let the loader of a rank leave a parameter as it is."""
    made = own_module()

    def load(pairs: Any) -> None:
        for name, tensor in pairs:
            if name != "t3" or not on(2):
                getattr(made, name).data.copy_(tensor)

    outcome(lambda: planned(made, **({} if sends() else {"rules": None, "loader": load})), made)


def on_meta() -> None:
    made = own_module()
    if on(2):
        made.t3 = nn.Parameter(torch.empty(SHAPE, device="meta"), requires_grad=False)
    outcome(lambda: planned(made), made)


def trainer_on_meta() -> None:
    made = own_module()
    if on(1):
        made.t3 = nn.Parameter(torch.empty(SHAPE, device="meta"), requires_grad=False)
    outcome(lambda: planned(made), made)


def partial_sums() -> None:
    """Hold a partial sum in the trainer, which no rank can send as it is."""
    made = own_module()
    if sends():
        made.t3 = nn.Parameter(DTensor.from_local(torch.ones(SHAPE), MESH, [Partial()], run_check=False))
    outcome(lambda: planned(made), made)


def experts_twice() -> None:
    """Name one expert on both ranks of the trainer, and another one on none."""
    made = nn.Module()
    made.experts = module({"down_proj": torch.full((2 if sends() else 4, 3, 5), NEW if sends() else OLD)})
    options = {"experts": [0, 1] if on(0) else [1, 2]} if sends() else {}
    outcome(lambda: planned(made, **options))


def experts_of_another_number() -> None:
    made = nn.Module()
    made.experts = module({"down_proj": torch.full((2 if sends() else 4, 3, 5), NEW if sends() else OLD)})
    options = {"experts": range(3) if on(0) else range(2, 4)} if sends() else {}
    outcome(lambda: planned(made, **options))


def experts_of_no_number() -> None:
    """Hold experts of its own on each rank of the trainer, and do not say which."""
    made = nn.Module()
    count = 2 if sends() else 4
    made.experts = module({"down_proj": torch.full((count, 3, 5), NEW + dist.get_rank() if sends() else OLD)})
    outcome(lambda: planned(made))


def tied_in_the_engine_only() -> None:
    """Tie two parameters in the engine that are two in the trainer."""
    made = own_module()
    if not sends():
        made.t3 = made.t2
    outcome(lambda: planned(made), made)


def overlapping_memory() -> None:
    """Give an engine a tensor whose elements share memory."""
    made = own_module()
    if on(2):
        made.t3.data = torch.full((1, 8), OLD).expand(SHAPE)
    outcome(lambda: planned(made)(), made)


FUNCTIONS: tuple[Callable[[], None], ...] = (
    trainer_killed_before_a_call,
    engine_killed_before_a_call,
    trainer_killed_while_it_plans,
    trainer_killed_in_a_call,
    engine_killed_in_a_call,
    killed_in_the_second_call,
    late_within_the_time,
    late_beyond_the_time,
    changed_shape,
    changed_dtype,
    lost_parameter,
    engine_cannot_copy,
    trainer_cannot_copy,
    fails_twice,
    cannot_send,
    only_the_trainer_has_it,
    only_the_engine_has_it,
    only_one_rank_of_the_engine_has_it,
    other_sizes,
    other_layers,
    trainers_with_other_sizes,
    trainers_with_other_dtypes,
    lacks_a_rank_of_the_trainer,
    outside_of_the_group,
    other_buckets,
    tiny_buckets,
    no_buckets,
    nobody_sends,
    nobody_receives,
    engine_of_a_rank_that_receives,
    loader_of_the_trainer,
    loader_with_rules,
    loader_that_fails,
    loader_that_computes,
    loader_that_skips,
    on_meta,
    trainer_on_meta,
    partial_sums,
    experts_twice,
    experts_of_another_number,
    experts_of_no_number,
    tied_in_the_engine_only,
    overlapping_memory,
)
SCENARIOS = {function.__name__.replace("_", " "): function for function in FUNCTIONS}
