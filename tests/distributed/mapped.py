"""Suite: shards that lie in a file in one run are mapped, and what is received from another rank is not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import automodel_conv as amc
from tests.distributed.models import Meshes, Published, assert_holds, local, published, sharded
from tests.distributed.starting import say

KINDS = {"experts": True, "fsdp": True, "columns": False}
"""Whether all shards lie in one run."""


def prepare(directory: Path, world: int) -> tuple[Published, Path]:
    of = published("mixtral", directory)
    amc.convert_checkpoint(of.path, directory / "own")
    return of, directory / "own"


def rank(common: tuple[Published, Path], variant: str, directory: Path) -> None:
    of, own = common
    meshes = Meshes()
    file = own / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    for kind, in_one_run in KINDS.items():
        model = sharded(of, kind, meshes)
        loaded = amc.load_state_dict(own, model, memory_map=True)
        assert_holds(dict(loaded), of, whole=False)
        held = sum(local(tensor).nbytes for tensor in loaded.values())
        assert (loaded.report.bytes_mapped == held) == in_one_run
        assert loaded.report.bytes_read + loaded.report.bytes_mapped >= held
        assert amc.load_model(model, own, memory_map=True).bytes_mapped == 0  # it is materialized
        dist.barrier()
        for tensor in loaded.values():
            local(tensor).reshape(-1).view(torch.uint8).fill_(0x5A)
    new = sharded(of, "experts", meshes, meta=True)
    report = amc.load_model(new, own, memory_map=True)
    assert report.bytes_read == 0
    assert_holds(new.state_dict(), of, whole=False)
    model = sharded(of, "experts", meshes)
    loaded = amc.load_state_dict(own, model, memory_map=True, broadcast=True)
    assert_holds(dict(loaded), of, whole=False)
    sent = [t for t in loaded.values() if isinstance(t, DTensor) and t.placements[0].is_replicate()]
    received = sum(local(tensor).nbytes for tensor in sent) if dist.get_rank() else 0
    held = sum(local(tensor).nbytes for tensor in loaded.values())
    assert (loaded.report.bytes_read, loaded.report.bytes_mapped) == (0, held - received)
    dist.barrier()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    say(json.dumps([received > 0, report.bytes_mapped > 0]))
