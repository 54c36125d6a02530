"""Suite: shards that are one contiguous run of a file are mapped; shards received from another rank are not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import automodel_conv as amc
from tests.distributed.models import Meshes, Published, assert_holds, local, published, sharded
from tests.distributed.starting import send

KINDS = {"experts": True, "fsdp": True, "columns": False}
"""Whether all shards are contiguous runs of a file."""


def prepare(directory: Path, world: int) -> tuple[Published, Path]:
    source = published("mixtral", directory)
    amc.convert_checkpoint(source.path, directory / "own")
    return source, directory / "own"


def rank(common: tuple[Published, Path], variant: str, directory: Path) -> None:
    source, own = common
    meshes = Meshes()
    file = own / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    for kind, in_one_run in KINDS.items():
        model = sharded(source, kind, meshes)
        loaded = amc.load_state_dict(own, model, memory_map=True)
        assert_holds(dict(loaded), source, whole=False)
        held = sum(local(tensor).nbytes for tensor in loaded.values())
        assert (loaded.report.bytes_mapped == held) == in_one_run
        assert loaded.report.bytes_read + loaded.report.bytes_mapped >= held
        assert amc.load_model(model, own, memory_map=True).bytes_mapped == 0  # materialized parameters are not mapped
        dist.barrier()
        for tensor in loaded.values():
            local(tensor).reshape(-1).view(torch.uint8).fill_(0x5A)
    new = sharded(source, "experts", meshes, meta=True)
    report = amc.load_model(new, own, memory_map=True)
    assert report.bytes_read == 0
    assert_holds(new.state_dict(), source, whole=False)
    model = sharded(source, "experts", meshes)
    loaded = amc.load_state_dict(own, model, memory_map=True, broadcast=True)
    assert_holds(dict(loaded), source, whole=False)
    sent = [t for t in loaded.values() if isinstance(t, DTensor) and t.placements[0].is_replicate()]
    received = sum(local(tensor).nbytes for tensor in sent) if dist.get_rank() else 0
    held = sum(local(tensor).nbytes for tensor in loaded.values())
    assert (loaded.report.bytes_read, loaded.report.bytes_mapped) == (0, held - received)
    dist.barrier()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    send(json.dumps([received > 0, report.bytes_mapped > 0]))
