"""Suite: the errors of all ranks if one rank dies, cannot read, or passes different arguments.

Each scenario has its own group, because a group that has lost a rank is unusable. Rank 1 fails unless a name says
otherwise. Ranks stay until all others have ended or given up, so that no rank is released by the end of a process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Shard, distribute_tensor

import automodel_conv as amc
from automodel_conv.destinations import ties
from automodel_conv.files import system
from automodel_conv.integrations.dcp import HuggingFaceWriter
from tests.distributed.models import Meshes, Published, assert_holds, local, published, sharded
from tests.distributed.starting import send

TIMEOUT_S = 10
GOES = ("killed", "gone")


def prepare(directory: Path, world: int) -> Published:
    return published("mixtral", directory)


def rank(source: Published, variant: str, directory: Path) -> None:
    name, _, kind = variant.partition(", ")
    began = time.monotonic()
    SCENARIOS[name](source, kind, f"{directory}/saved")
    send({"seconds": time.monotonic() - began})
    (directory / f"ended.{dist.get_rank()}").touch()
    stay = dist.get_world_size() - any(word in name for word in GOES)
    while len(list(directory.glob("ended.*"))) < stay and time.monotonic() - began < 4 * TIMEOUT_S:
        time.sleep(0.05)


def on(number: int) -> bool:
    return dist.get_rank() == number


def send_error(error: BaseException | None) -> None:
    kinds = [cls.__name__ for cls in type(error).__mro__] if error is not None else []
    send({"error": kinds, "text": str(error)})


def run_and_send(work) -> None:
    try:
        work()
    except amc.ConversionError as error:
        send_error(error)
    else:
        send_error(None)


def at_read(number: int, do) -> None:
    """Run ``do`` on rank 1 at its n-th read of tensor data."""
    if not on(1):
        return
    real, seen = system.preadv, []

    def read(fd, views, offset):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors") and offset > 8:
            seen.append(offset)
            if len(seen) == number:
                do()
        return real(fd, views, offset)

    system.preadv = read


def at_write(number: int, do, of_rank: int = 1) -> None:
    if not on(of_rank):
        return
    real, seen = system.pwritev, []

    def write(fd, views, offset):
        if offset:  # tensor data, not the header
            seen.append(offset)
        if len(seen) == number:
            do()
        return real(fd, views, offset)

    system.pwritev = write


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def io_error() -> None:
    raise OSError(errno.EIO, "Input/output error")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_in_a_load(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes())
    at_read(3, die)
    run_and_send(lambda: amc.load_model(model, source.path, threads=1))


def gone_in_a_load(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes())
    at_read(3, leave)
    run_and_send(lambda: amc.load_state_dict(source.path, model, threads=1))


def killed_before_it_sends(source: Published, kind: str, directory: str) -> None:
    """Kill a replica that others wait for while it reads the bytes it would send."""
    model = sharded(source, kind, Meshes())
    at_read(3, die)
    run_and_send(lambda: amc.load_model(model, source.path, broadcast=True, threads=1))


def cannot_read(source: Published, kind: str, directory: str) -> None:
    """Fail on the meta device: the model is unchanged on every rank, and the group stays usable."""
    meshes = Meshes()
    model = sharded(source, kind, meshes, meta=True)
    real = system.preadv
    at_read(3, io_error)
    before = dict(model.state_dict(keep_vars=True))
    run_and_send(lambda: amc.load_model(model, source.path, threads=2))
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())
    system.preadv = real
    dist.barrier()
    amc.load_model(model, source.path)
    assert_holds(model.state_dict(), source)


def cannot_read_in_place(source: Published, kind: str, directory: str) -> None:
    """Fail in place: the rank that failed reports which parameters it had filled."""
    model = sharded(source, kind, Meshes())
    at_read(3, io_error)
    run_and_send(lambda: amc.load_model(model, source.path, threads=1, broadcast=kind == "hsdp"))


def cannot_open(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes())
    real = system.open_readonly

    def opened(path):
        if on(1) and "model-00002-of-" in path:
            raise OSError(errno.EACCES, "Permission denied")
        return real(path)

    system.open_readonly = opened
    poison = {name: local(t).clone() for name, t in model.state_dict().items()}
    run_and_send(lambda: amc.load_model(model, source.path))
    for name, tensor in model.state_dict().items():
        if not on(1):
            continue
        assert torch.equal(local(tensor).view(torch.uint8), poison[name].view(torch.uint8)), "written despite the error"


def has_other_names(source: Published, kind: str, directory: str) -> None:
    """Show rank 1 a checkpoint that lacks a tensor; the others see all tensors."""
    path = source.path
    if on(1):
        path = shutil.copytree(source.path, f"{directory} of rank 1")
        file = next(Path(path).glob("*00002-of-*.safetensors"))
        tensors = load_file(file)
        del tensors[min(tensors)]
        save_file(tensors, file)
        index = Path(path) / "model.safetensors.index.json"
        record = json.loads(index.read_text())
        record["weight_map"] = {k: v for k, v in record["weight_map"].items() if v != file.name or k in tensors}
        index.write_text(json.dumps(record))
    model = sharded(source, kind, Meshes(), meta=True)
    run_and_send(lambda: amc.load_model(model, path))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def has_no_checkpoint(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes(), meta=True)
    run_and_send(lambda: amc.load_state_dict(source.path if not on(1) else f"{source.path} that is not there", model))


def has_no_such_device(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes(), meta=True)
    run_and_send(lambda: amc.load_model(model, source.path, device="xpu" if on(1) else None))


def finds_two_values_of_one_parameter(source: Published, kind: str, directory: str) -> None:
    """Make the values differ only in the rows of rank 1."""
    values = torch.arange(12.0).reshape(4, 3)
    if on(0):
        save_file({"a": values, "b": values + torch.tensor([0, 0, 0, 1])[:, None]}, f"{directory}.safetensors")
    dist.barrier()
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), Meshes()(2), [Shard(0)]))
    module.b = module.a
    run_and_send(lambda: amc.load_model(module, f"{directory}.safetensors"))


def cannot_compare(source: Published, kind: str, directory: str) -> None:
    """Fail on rank 1 while it compares two names of one parameter, after all ranks have read."""
    values = torch.arange(12.0).reshape(4, 3)
    if on(0):
        save_file({"a": values, "b": values.clone()}, f"{directory}.safetensors")
    dist.barrier()

    def compared(a, b):
        raise amc.ConversionError("no memory to compare in")

    if on(1):
        ties.same_bytes = compared
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), Meshes()(2), [Shard(0)]))
    module.b = module.a
    load = amc.load_model if kind == "model" else lambda m, path: amc.load_state_dict(path, m)
    run_and_send(lambda: load(module, f"{directory}.safetensors"))


def has_too_little_memory(source: Published, kind: str, directory: str) -> None:
    model = sharded(source, kind, Meshes(), meta=True)
    run_and_send(lambda: amc.load_model(model, source.path, memory_budget=100 if on(1) else None))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def filled(source: Published, kind: str):
    model = sharded(source, kind, Meshes())
    amc.load_model(model, source.path)
    return model


def saving(model, directory: str, **options) -> None:
    run_and_send(lambda: amc.save_checkpoint(model, directory, max_shard_size="60KB", threads=1, **options))


def killed_in_a_save(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    at_write(3, die)
    saving(model, directory)


def leader_killed_in_a_save(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    at_write(3, die, 0)
    saving(model, directory)


def cannot_write(source: Published, kind: str, directory: str) -> None:
    """Fail to write, then save again with the same ranks into the directory, which is free at once."""
    model = filled(source, kind)
    real = system.pwritev
    at_write(3, disk_full)
    saving(model, directory)
    dist.barrier()
    send({"left": sorted(os.listdir(directory))})
    dist.barrier()
    system.pwritev = real
    amc.save_checkpoint(model, directory, max_shard_size="60KB")
    amc.load_model(again := sharded(source, kind, Meshes()), directory)
    assert_holds(again.state_dict(), source, whole=False)


def cannot_write_by_dcp(source: Published, kind: str, directory: str) -> None:
    """Fail on another rank: the rank that created the files removes them."""
    model = filled(source, kind)
    writer = HuggingFaceWriter(directory, model, max_shard_size="60KB", threads=1)
    real = system.pwritev
    at_write(3, disk_full)
    try:
        dcp.save(model.state_dict(), storage_writer=writer)
    except CheckpointException as error:
        [(failure, _)] = error.failures.values()
        send_error(failure)
        assert "rank 1: WriteError: " in str(failure)
    dist.barrier()
    assert not any(files for _, _, files in os.walk(directory))
    dist.barrier()
    system.pwritev = real
    dcp.save(model.state_dict(), storage_writer=writer)


def leader_cannot_begin(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    if on(0):
        Path(directory).mkdir()
        (Path(directory) / "model.safetensors").write_bytes(b"somebody's")
    dist.barrier()
    saving(model, directory)


def leader_cannot_end(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)

    def rename(path, new):
        raise OSError(errno.EIO, "Input/output error")

    if on(0):
        system.rename = rename
    saving(model, directory)


def holds_other_tensors(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    state = dict(model.state_dict())
    if on(1):
        state.pop("model.norm.weight")
    saving(state, directory, rules=[])
    assert not os.path.exists(directory)


def names_no_directory(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    try:
        amc.save_checkpoint(model, directory if not on(1) else None)
    except amc.ConversionError as error:
        send_error(error)
    assert not os.path.exists(directory)


def holds_no_part(source: Published, kind: str, directory: str) -> None:
    """Give rank 0 half of a tensor, which rank 1 holds as a whole tensor."""
    part = distribute_tensor(torch.arange(12.0).reshape(4, 3), Meshes()(2), [Shard(0)])
    saving({"a": torch.zeros(4, 3) if on(1) else part, "b": part}, directory, rules=[])
    assert not os.path.exists(directory)


def holds_other_dtypes(source: Published, kind: str, directory: str) -> None:
    model = filled(source, kind)
    saving(model, directory, dtype=torch.float32 if on(1) else None)
    assert not os.path.exists(directory)


SCENARIOS = {
    function.__name__.replace("_", " "): function
    for function in (
        killed_in_a_load,
        gone_in_a_load,
        killed_before_it_sends,
        cannot_read,
        cannot_read_in_place,
        cannot_open,
        has_other_names,
        has_no_checkpoint,
        has_too_little_memory,
        has_no_such_device,
        finds_two_values_of_one_parameter,
        cannot_compare,
        killed_in_a_save,
        leader_killed_in_a_save,
        cannot_write,
        cannot_write_by_dcp,
        leader_cannot_begin,
        leader_cannot_end,
        names_no_directory,
        holds_other_tensors,
        holds_other_dtypes,
        holds_no_part,
    )
}
