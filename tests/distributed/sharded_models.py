"""Suite: models sharded in every way are loaded, saved and loaded by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import automodel_conv as amc
from automodel_conv.files import system
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.models import (
    TRANSPOSING,
    Meshes,
    Published,
    assert_holds,
    assert_same_tensors,
    local,
    published,
    read_all,
    rope_types,
    sharded,
)
from tests.distributed.starting import send

TYPES = ["mixtral", "qwen3_moe", "deepseek_v3", TRANSPOSING, *rope_types()]
TIED = "qwen2_moe-tied"
UNEVEN = "mixtral of 10 experts"  # 4, 4, 2 over three ranks, and some of eight ranks have none
CHECKS = {
    2: [
        *((name, kind) for name in TYPES for kind in ("experts", "columns", "fsdp")),
        *((name, "inner") for name in ("mixtral", TRANSPOSING, *rope_types())),
        *((TIED, kind) for kind in ("experts", "columns")),
    ],
    3: [
        *((UNEVEN, kind) for kind in ("experts", "inner", "fsdp")),
        *((name, "fsdp") for name in rope_types()),
        *((name, "columns") for name in ("deepseek_v3", TIED)),
    ],
    4: [
        *((name, "experts x fsdp") for name in ("mixtral", "deepseek_v3")),
        *((name, "fsdp over tensor") for name in ("qwen3_moe", "deepseek_v3", TRANSPOSING, *rope_types())),
        ("qwen3_moe", "hsdp"),
        (UNEVEN, "experts"),
    ],
    8: [(UNEVEN, kind) for kind in ("experts", "experts x fsdp", "fsdp over tensor")],
}


def prepare(directory: Path, world: int) -> dict[str, Published]:
    checkpoints = {name: published(name, directory) for name in dict(CHECKS[world]) if name != UNEVEN}
    (directory / UNEVEN).mkdir()
    return checkpoints | {UNEVEN: published("mixtral", directory / UNEVEN, num_local_experts=10)}


def rank(common: dict[str, Published], variant: str, directory: Path) -> None:
    meshes = Meshes()
    ties_what_all_ranks_find_equal(meshes, directory)
    if dist.get_world_size() % 2 == 0:
        saves_what_several_meshes_hold(meshes, directory)
    for name, kind in CHECKS[dist.get_world_size()]:
        source = common[name]
        steps = [loads, makes_state_dicts, saves, is_saved_by_dcp, is_loaded_by_dcp]
        more = [is_the_same_compiled, computes, carries]
        for step in steps + more * ((name, kind) == ("mixtral", "fsdp")):
            try:
                step(source, kind, meshes)
            except Exception as error:
                raise AssertionError(f"{name}, {kind}, {step.__name__}") from error
        send([name, kind])


def ties_what_all_ranks_find_equal(meshes: Meshes, directory: Path) -> None:
    """Make rows differ on the last rank or nowhere: names of one parameter are one tensor on no rank, or on all."""
    world = dist.get_world_size()
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(distribute_tensor(torch.zeros(world, 3), meshes(world), [Shard(0)]))
    module.b = module.a
    for path, more in (("equal", 0), ("unequal", 1)):
        values = torch.arange(3.0 * world).reshape(world, 3)
        other = values.clone()
        other[-1] += more
        if dist.get_rank() == 0:
            save_file({"a": values, "b": other}, directory / f"{path}.safetensors")
        dist.barrier()
        loaded = amc.load_state_dict(directory / f"{path}.safetensors", module)
        assert (loaded["a"] is loaded["b"]) == (path == "equal"), path
        assert_bytes_equal(loaded["b"].full_tensor(), other)


def saves_what_several_meshes_hold(meshes: Meshes, directory: Path) -> None:
    """Save a tensor that is on one dimension of a two-dimensional mesh."""
    values = torch.arange(12.0).reshape(4, 3)
    inner = meshes(2, dist.get_world_size() // 2)["inner"]
    state = {"a": distribute_tensor(values, inner, [Shard(0)]), "b": values}
    amc.save_checkpoint(state, directory / "of meshes", rules=[])
    for tensor in read_all(directory / "of meshes").values():
        assert_bytes_equal(tensor, values)


def loads(source: Published, kind: str, meshes: Meshes) -> None:
    for meta in (False, True):
        model = sharded(source, kind, meshes, meta=meta)
        if meta and "fsdp" in kind:
            model.to_empty(device="cpu")  # as code with FSDP2 does
        for broadcast in (False, True) if kind == "hsdp" or ("experts" in kind and not meta) else (False,):
            before = model.state_dict()
            report = amc.load_model(model, source.path, broadcast=broadcast)
            assert not report.missing_keys
            assert not report.unexpected_keys
            assert not report.fallbacks
            assert_holds(model.state_dict(), source, whole=not meta)
            if kind == "hsdp":
                reads_once_a_replica(source, model, report, broadcast)
            for name, tensor in model.state_dict().items():
                was = before[name]
                assert type(tensor) is type(was)
                assert getattr(tensor, "placements", None) == getattr(was, "placements", None)
                if not was.is_meta:
                    assert local(tensor).data_ptr() == local(was).data_ptr()
                    local(tensor).reshape(-1).view(torch.uint8).fill_(0x5A)  # poison for the next load


def reads_once_a_replica(source: Published, model, report, broadcast: bool) -> None:
    state = model.state_dict()
    distributed = [t for t in state.values() if isinstance(t, DTensor)]
    first = distributed[0].device_mesh.get_coordinate()[0] == 0
    plain = sum(t.nbytes for t in state.values() if not isinstance(t, DTensor))
    parts = sum(local(t).nbytes for t in distributed)
    if first or not broadcast:
        # The gaps between the parts are small, as the whole model is, so they are read too.
        assert plain + parts <= report.bytes_read <= sum(amc.open_checkpoint(source.path).nbytes)
    else:
        assert report.bytes_read == plain


def makes_state_dicts(source: Published, kind: str, meshes: Meshes) -> None:
    model = sharded(source, kind, meshes, meta=True)
    loaded = amc.load_state_dict(source.path, model)
    for name, like in model.state_dict().items():
        tensor = loaded[name]
        assert isinstance(tensor, DTensor) == isinstance(like, DTensor), name
        if isinstance(like, DTensor):
            assert (tensor.placements, tensor.device_mesh) == (like.placements, like.device_mesh)
            assert (tensor.shape, tensor.stride()) == (like.shape, like.stride())
    assert_holds(loaded, source, whole=False)


@contextmanager
def written_bytes():
    """Record the size of each write to a weight file."""
    real, seen = system.pwritev, []

    def counted(fd, views, offset):
        count = real(fd, views, offset)
        seen.append(count * os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"))
        return count

    system.pwritev = counted
    try:
        yield seen
    finally:
        system.pwritev = real


def saves(source: Published, kind: str, meshes: Meshes) -> None:
    """Save the parts of all ranks: the files equal those of ``save_pretrained``, and load again."""
    model = sharded(source, kind, meshes)
    amc.load_model(model, source.path)
    directory = f"{source.saved} {kind}"
    with written_bytes() as written:
        report = amc.save_checkpoint(model, directory, max_shard_size="60KB")
    total = torch.tensor(sum(written))
    dist.all_reduce(total)
    assert total == report.bytes_written  # no byte is written by two ranks
    assert sorted(file for file in os.listdir(directory) if file.endswith(".safetensors")) == sorted(report.files)
    assert len(report.files) > 2
    if dist.get_rank() == 0:
        assert_same_tensors(read_all(directory), read_all(source.saved))
        again = type(source.model).from_pretrained(directory)
        assert_same_tensors(again.state_dict(), source.full)
    amc.load_model(sharded_again := sharded(source, kind, meshes), directory)
    assert_holds(sharded_again.state_dict(), source, whole=False)


def carries(source: Published, kind: str, meshes: Meshes) -> None:
    """Check that one rank writes the tensors that the model has no place for."""
    extra = {"mtp.fc.weight": torch.arange(6.0).reshape(2, 3), "d2t": torch.arange(5)}
    extra_file = f"{source.saved} {kind} draft.safetensors"
    if dist.get_rank() == 0:
        save_file(extra, extra_file)
    dist.barrier()
    model = sharded(source, kind, meshes)
    amc.load_model(model, source.path)
    report = amc.save_checkpoint(model, f"{source.saved} {kind} carried", max_shard_size="60KB", carry=extra_file)
    assert sorted(report.carried) == sorted(extra)
    if dist.get_rank() == 0:
        assert_same_tensors(read_all(f"{source.saved} {kind} carried"), read_all(source.saved) | extra)


def is_saved_by_dcp(source: Published, kind: str, meshes: Meshes) -> None:
    """Check that ``dcp.save`` writes the same files as ``save_checkpoint``."""
    model = sharded(source, kind, meshes)
    amc.load_model(model, source.path)
    writer = HuggingFaceWriter(f"{source.saved} {kind} dcp", model, max_shard_size="60KB")
    dcp.save(model.state_dict(), storage_writer=writer)
    if dist.get_rank() == 0:
        ours, theirs = (
            {file.name: file.read_bytes() for file in Path(directory).iterdir()}
            for directory in (f"{source.saved} {kind}", f"{source.saved} {kind} dcp")
        )
        assert theirs == ours


def is_loaded_by_dcp(source: Published, kind: str, meshes: Meshes) -> None:
    for dtype in (None, torch.float32) if kind in ("columns", "fsdp over tensor") else (None,):
        model = sharded(source, kind, meshes, dtype=dtype)
        dcp.load(model.state_dict(), storage_reader=HuggingFaceReader(source.path))
        assert dtype in (None, next(model.parameters()).dtype)
        assert_holds(model.state_dict(), source, whole=False)


def is_the_same_compiled(source: Published, kind: str, meshes: Meshes) -> None:
    """Check that a compiled layer or model has the names and parts of the model it wraps."""
    model = sharded(source, kind, meshes)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    compiled = torch.compile(model)
    for tensor in compiled.state_dict().values():
        local(tensor).reshape(-1).view(torch.uint8).fill_(0x5A)
    amc.load_model(compiled, source.path)
    assert_holds(amc.load_state_dict(source.path, compiled), source, whole=False)
    amc.save_checkpoint(compiled, f"{source.saved} {kind} compiled", max_shard_size="60KB")
    if dist.get_rank() == 0:
        ours, theirs = (
            {file.name: file.read_bytes() for file in Path(directory).iterdir()}
            for directory in (f"{source.saved} {kind}", f"{source.saved} {kind} compiled")
        )
        assert theirs == ours


def computes(source: Published, kind: str, meshes: Meshes) -> None:
    """Check that FSDP2 uses the new parameters of a model from the meta device: the results are equal."""
    model = sharded(source, kind, meshes, meta=True)
    amc.load_model(model, source.path)
    numbers = torch.arange(12).reshape(2, 6)
    for compared in (model, source.model):
        compared.config._experts_implementation = "eager"  # the others require larger sizes
    with torch.no_grad():
        assert_bytes_equal(model(numbers).logits, source.model(numbers).logits)
