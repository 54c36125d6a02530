"""Suite: several ranks save one model to S3 through a folder that they share, or that each of them has alone.

The test passes the options of the store in ``UPLOAD_OPTIONS``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist

import automodel_conv as amc
from automodel_conv.files.uploads import s3_store
from tests.distributed.models import Meshes, Published, published, sharded
from tests.distributed.starting import send
from tests.stores import BUCKET

TIMEOUT_S = 60
SIZES = {"max_shard_size": 100_000, "checksums": True}


def prepare(directory: Path, world: int) -> Published:
    return published("mixtral", directory)


def rank(source: Published, variant: str, directory: Path) -> None:
    number = dist.get_rank()
    options = json.loads(os.environ["UPLOAD_OPTIONS"])
    cache = directory / "cache" / (str(number) if variant == "nodes" else "")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    model = sharded(source, "experts" if variant == "experts" else "fsdp", Meshes())
    amc.load_model(model, source.path)
    if variant == "refused":
        options["endpoint_url"] = "http://127.0.0.1:1"
    watched: list[int] = []
    real = s3_store.S3Store.upload

    def upload(self, name: str, path: str, *rest):
        watched.append(len(list(Path(path).parent.glob("*.safetensors"))))
        return real(self, name, path, *rest)

    s3_store.S3Store.upload = upload
    outcome: dict = {"error": None}
    try:
        amc.save_checkpoint(model, f"s3://{BUCKET}/{variant}", storage_options=options, **SIZES)
    except amc.ConversionError as error:
        outcome["error"] = [type(error).__name__, str(error)]
    dist.barrier()
    if number == 0:
        amc.save_checkpoint(source.model, directory / "alone", **SIZES)
    left = sorted(str(path) for path in cache.rglob("*") if path.is_file())
    send(outcome | {"left": left, "most": max(watched, default=0), "uploads": len(watched)})
