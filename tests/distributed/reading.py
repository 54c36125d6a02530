"""Suite: bytes that a rank reads, counted where files are read, headers aside, against the bytes that it owns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

import automodel_conv as amc
from automodel_conv.destinations.model import regions_of
from automodel_conv.distributed.placements import local_of
from automodel_conv.dtypes import nbytes
from automodel_conv.files import system
from automodel_conv.planning.plan import CopyPlan
from tests.distributed.models import Meshes, Published, assert_holds, published, sharded
from tests.distributed.starting import say

KINDS = {
    2: ["experts", "fsdp", "columns", "inner"],
    4: ["experts", "fsdp", "experts x fsdp", "fsdp over tensor", "hsdp", "inner"],
}
FIRST_DIMENSION = ("experts", "fsdp", "fsdp over tensor", "hsdp")
# So large that what lies between a rank's rows is worth no read: 14 MB, experts of 256 KB a projection.
SIZES = {
    "num_local_experts": 8,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


class Counts(NamedTuple):
    """Of one load on one rank, in bytes."""

    kind: str
    read: int
    """From files, what was thrown away included."""
    owned: int
    reported: int
    rows: int
    """Of all rows of sources that any owned element lies in."""


def prepare(directory: Path, world: int) -> Published:
    return published("mixtral", directory, **SIZES)


def rank(of: Published, variant: str, directory: Path) -> None:
    meshes = Meshes()
    begins = {
        file: 8 + int.from_bytes(open(file, "rb").read(8), "little") for file in amc.open_checkpoint(of.path).files
    }
    read = []
    real = system.preadv

    def counted(fd, views, offset):
        count = real(fd, views, offset)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path in begins and offset >= begins[path]:
            read.append(count)
        return count

    system.preadv = counted
    for kind in KINDS[dist.get_world_size()]:
        model = sharded(of, kind, meshes)
        read.clear()
        report = amc.load_model(model, of.path)
        state = model.state_dict()
        owned = sum(local_of(tensor).nbytes for tensor in state.values())
        plan = amc.compile_plan(of.path, model)
        plan = plan.shard(regions_of(state, plan))
        assert plan.bytes_read == owned
        say(Counts(kind, sum(read), owned, report.bytes_read, rows_touched(plan))._asdict())
        assert_holds(state, of, whole=False)
        whole = amc.compile_plan(of.path, model)
        for tensor in state.values():
            local_of(tensor).zero_()
        assert amc.load_model(model, of.path, plan=whole).bytes_read == report.bytes_read
        assert_holds(state, of, whole=False)
        assert_holds(amc.load_state_dict(of.path, model, plan=whole.to_json()), of, whole=False)


def rows_touched(plan: CopyPlan) -> int:
    """Bytes of the rows (along the last dimension) of sources that a plan reads an element of."""
    rows = [np.zeros(shape[:-1], bool).reshape(-1) for shape in plan.sources.shapes]
    for target in plan.targets:
        for copy in target.copies:
            for piece in copy.pieces():
                elements = np.array(piece.source_offset)
                for count, stride in zip(piece.box.shape, piece.box.source_strides, strict=True):
                    elements = elements[..., None] + np.arange(count) * stride
                row = target.sources[piece.source]
                rows[row][np.unique(elements // plan.sources.shapes[row][-1])] = True
    sizes = zip(plan.sources.dtypes, plan.sources.shapes, rows, strict=True)
    return sum(nbytes(dtype, int(touched.sum()) * shape[-1]) for dtype, shape, touched in sizes)
