"""Suite: the tensor bytes that each rank reads from files, compared with the bytes that it owns."""

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
from tests.distributed.starting import send

KINDS = {
    2: ["experts", "fsdp", "columns", "inner"],
    4: ["experts", "fsdp", "experts x fsdp", "fsdp over tensor", "hsdp", "inner"],
}
FIRST_DIMENSION = ("experts", "fsdp", "fsdp over tensor", "hsdp")
# Large enough that gaps between a rank's rows are not worth reading: 14 MB, experts of 256 KB per projection.
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
    """Byte counts of one load on one rank."""

    kind: str
    read: int
    """Bytes read from files, including bytes thrown away."""
    owned: int
    reported: int
    rows: int
    """Bytes of all source rows that contain an owned element."""


def prepare(directory: Path, world: int) -> Published:
    return published("mixtral", directory, **SIZES)


def rank(source: Published, variant: str, directory: Path) -> None:
    meshes = Meshes()
    begins = {
        file: 8 + int.from_bytes(open(file, "rb").read(8), "little") for file in amc.open_checkpoint(source.path).files
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
        model = sharded(source, kind, meshes)
        read.clear()
        report = amc.load_model(model, source.path)
        state = model.state_dict()
        owned = sum(local_of(tensor).nbytes for tensor in state.values())
        plan = amc.compile_plan(source.path, model)
        plan = plan.shard(regions_of(state, plan))
        assert plan.bytes_read == owned
        send(Counts(kind, sum(read), owned, report.bytes_read, rows_touched(plan))._asdict())
        assert_holds(state, source, whole=False)
        whole = amc.compile_plan(source.path, model)
        for tensor in state.values():
            local_of(tensor).zero_()
        assert amc.load_model(model, source.path, plan=whole).bytes_read == report.bytes_read
        assert_holds(state, source, whole=False)
        assert_holds(amc.load_state_dict(source.path, model, plan=whole.to_json()), source, whole=False)


def rows_touched(plan: CopyPlan) -> int:
    """Return the bytes of source rows (along the last dimension) from which a plan reads an element."""
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
