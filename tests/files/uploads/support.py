"""Files that the tests of uploads write."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from automodel_conv.files.destination import Destination
from automodel_conv.files.shards import DEFAULT_NAMING, Shard, Spec, shard_of
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.files.uploads.output_folders import UploadedFolder
from tests.stores import BUCKET, S3Server

WORK = {"files": ["x"], "options": {"layout": "nemo"}}
INDEX = DEFAULT_NAMING.index_name
_numbers = itertools.count()


def new_folder() -> str:
    """Return the name of a folder that no other test uses."""
    return f"folder-{next(_numbers)}"


def s3_folder(server: S3Server, folder: str, **options: Any) -> UploadedFolder:
    found = folder_of(f"s3://{BUCKET}/{folder}", SourceSettings(storage_options={**server.options, **options}))
    assert isinstance(found, UploadedFolder)
    return found


def shards(count: int = 3, elements: int = 1000) -> list[Shard]:
    if count == 1:
        return [shard_of("model.safetensors", [Spec("w1", "F32", (elements,))])]
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [shard_of(name, [Spec(f"w{number}", "F32", (elements,))]) for number, name in enumerate(names)]


def content(shard: Shard) -> bytes:
    """Return the bytes of a file, which differ from those of the others at every place."""
    seed = np.frombuffer(shard.name.encode(), np.uint8).sum()
    return shard.header + np.random.default_rng(seed).bytes(shard.nbytes - len(shard.header))


def write(place: Destination, plan: list[Shard], **finished: Any) -> None:
    """Write and finish all files that are not finished, one after the other."""
    for shard in plan:
        if shard.name in place.unfinished:
            Path(place.path(shard.name)).write_bytes(content(shard))
            place.finish(shard, **finished)


def write_beside(place: Destination) -> dict[str, bytes]:
    """Write files next to the weights, one of them in a folder."""
    files = {"config.json": b"{}", "tokenizer/vocab.json": b"words"}
    place.write("config.json", files["config.json"])
    Path(place.companion_path("tokenizer/vocab.json")).write_bytes(files["tokenizer/vocab.json"])
    return files


def complete(folder: UploadedFolder, plan: list[Shard], work: Any = WORK, **options: Any) -> dict[str, bytes]:
    """Write a whole checkpoint; return its files."""
    with folder.open(plan, work, **options) as place:
        write(place, plan)
        files = write_beside(place)
        place.commit(None if len(plan) == 1 else b"index")
    files |= {shard.name: content(shard) for shard in plan}
    return files if len(plan) == 1 else files | {INDEX: b"index"}


def left_on_disk(folder: UploadedFolder) -> list[str]:
    """Return the files of a folder's work on this machine."""
    root = Path(folder.directory)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
