"""Suite: loads of ranks from a web server, whose URL is in a file of the directory; each rank has a user of its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

import automodel_conv as amc
from automodel_conv.destinations.model import regions_of
from automodel_conv.distributed.placements import local_of
from tests.distributed.models import Meshes, Published, assert_holds, published, sharded
from tests.distributed.reading import SIZES, rows_touched
from tests.distributed.starting import send

KINDS = {2: ["fsdp", "columns"], 4: ["experts", "fsdp", "experts x fsdp"]}
"""Kinds by the number of ranks: FSDP, tensor parallelism over columns, expert parallelism, and both."""
URL = "url"
"""Name of the file with the URL of the directory."""


class Owned(NamedTuple):
    """The bytes that one rank owns in one load."""

    kind: str
    user: str
    owned: int
    rows: int
    """Bytes of all source rows that contain an owned element."""
    received: int
    """Bytes received, with headers and small files."""


def prepare(directory: Path, world: int) -> Published:
    return published("mixtral", directory, **SIZES)


def rank(source: Published, variant: str, directory: Path) -> None:
    meshes = Meshes()
    base = (Path(source.path).parent / URL).read_text()
    for kind in KINDS[dist.get_world_size()]:
        user = f"{kind}-{dist.get_rank()}".replace(" ", "")
        url = f"{base}/{Path(source.path).name}".replace("://", f"://{user}:x@")
        model = sharded(source, kind, meshes)
        report = amc.load_model(model, url)
        state = model.state_dict()
        assert_holds(state, source, whole=False)
        plan = amc.compile_plan(source.path, model)
        plan = plan.shard(regions_of(state, plan))
        owned = sum(local_of(tensor).nbytes for tensor in state.values())
        send(Owned(kind, user, owned, rows_touched(plan), report.bytes_received)._asdict())
