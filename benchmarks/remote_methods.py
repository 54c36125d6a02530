"""Methods that bring a checkpoint from a server into memory: a function for each peer, and ours.

Each function receives a ``Place``. Its preparation is not timed: imports, and the shapes of the buffers. It returns the
function to time, which ends with all bytes in memory.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

import automodel_conv as amc
from benchmarks.grouped import grouped_shapes, new_buffers
from benchmarks.remote_server import BUCKET, OWNER

CONNECTIONS = 16
"""Connections of every method that has such a setting."""
RANGE_BYTES = 16 << 20
"""Length of the ranges of methods that do not choose it. With 8 MiB the roof was 5 % slower."""
_PIECE_BYTES = 1 << 20
GROUPED, TRANSPOSED, NAMED, FILES = "grouped", "transposed", "as named", "files"
"""The result of a method: the model's tensors, those of ``layout="nemo"``, the checkpoint's tensors, or its files."""


class Place(NamedTuple):
    """The places of a checkpoint."""

    urls: Mapping[str, str]
    """Those of the servers."""
    name: str
    """Name of the folder that is served."""
    directory: str
    """The same folder on this machine, only for shapes and sizes."""
    downloads: str
    """An empty directory."""


class Method(NamedTuple):
    prepare: Callable[[Place], Callable[[], Any]]
    ends_with: str
    huge_pages: bool = True
    """Whether torch requests huge pages, as it does not by default."""
    allocates: bool = True
    """Whether the memory that it ends with is allocated within the timing, and is not that of mapped files."""


def ours(place: Place, url: str | None = None, **options: Any) -> Callable[[], dict[str, Tensor]]:
    where = url or f"{place.urls['files']}/{place.name}"
    return lambda: amc.load_state_dict(where, **options)


def ours_transposed(place: Place) -> Callable[[], dict[str, Tensor]]:
    return ours(place, layout="nemo")


def ours_from_hub(place: Place) -> Callable[[], dict[str, Tensor]]:
    return ours(place, f"hf://{OWNER}/{place.name}", cache_dir=place.downloads)


def ours_from_s3(place: Place) -> Callable[[], dict[str, Tensor]]:
    return ours(place, f"s3://{BUCKET}/{place.name}")


def bare_touched(place: Place) -> Callable[[], dict[str, Tensor]]:
    """Read all ranges into memory that was written before."""
    buffers = {path.name: torch.empty(path.stat().st_size, dtype=torch.uint8).fill_(1) for path in _files(place)}
    return lambda: _read_ranges(place, buffers)


def bare(place: Place) -> Callable[[], dict[str, Tensor]]:
    """Read all ranges into new memory."""
    sizes = {path.name: path.stat().st_size for path in _files(place)}
    return lambda: _read_ranges(place, {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in sizes.items()})


def _read_ranges(place: Place, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    server = urlsplit(place.urls["files"]).netloc
    own = threading.local()

    def read(file: str, start: int, stop: int) -> None:
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection(server)
        own.connection.request("GET", f"/{place.name}/{file}", headers={"Range": f"bytes={start}-{stop - 1}"})
        with own.connection.getresponse() as answer:
            view = memoryview(buffers[file].numpy())[start:stop]
            while view:
                view = view[answer.readinto(view[:_PIECE_BYTES]) or _ended(file) :]

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sizes = {file: buffer.nbytes for file, buffer in buffers.items()}
        list(pool.map(lambda one: read(*one), _ranges(sizes)))
    return buffers


def _ended(file: str) -> int:
    raise EOFError(f"{file}: the answer ends too early")


def snapshot_then_transformers(place: Place) -> Callable[[], dict[str, Tensor]]:
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def run() -> dict[str, Tensor]:
        directory = snapshot_download(f"{OWNER}/{place.name}", cache_dir=place.downloads)
        return AutoModelForCausalLM.from_pretrained(directory).state_dict()

    return run


def snapshot_then_ours(place: Place) -> Callable[[], dict[str, Tensor]]:
    from huggingface_hub import snapshot_download

    return lambda: amc.load_state_dict(snapshot_download(f"{OWNER}/{place.name}", cache_dir=place.downloads))


def hf_transfer_then_safetensors(place: Place) -> Callable[[], dict[str, Tensor]]:
    """Download each file over 16 connections, and load it with ``load_file``, which copies no tensor elsewhere."""
    from safetensors.torch import load_file

    download = import_module("hf_transfer").download
    files = [path.name for path in _files(place)]

    def run() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in files:
            path = os.path.join(place.downloads, file)
            download(f"{place.urls['files']}/{place.name}/{file}", path, CONNECTIONS, RANGE_BYTES)
            tensors |= load_file(path)
        return tensors

    return run


def runai(place: Place) -> Callable[[], dict[str, Tensor]]:
    """Call ``copy_`` for every tensor that ``SafetensorsStreamer`` lends from its ring, in the bucket."""
    library = import_module("runai_model_streamer")
    shapes = grouped_shapes(place.directory)
    urls = [f"s3://{BUCKET}/{place.name}/{path.name}" for path in _files(place)]

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed=False)
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_files(urls, owned=False)
            for name, tensor in streamer.get_tensors():
                views[name].copy_(tensor)
        return buffers

    return run


def fsspec_ranges(place: Place) -> Callable[[], dict[str, list[bytes]]]:
    """Call ``cat_ranges`` once for all ranges; the bytes stay where it leaves them."""
    import fsspec

    url = f"{place.urls['files']}/{place.name}/"
    ranges = _ranges({path.name: path.stat().st_size for path in _files(place)})

    def run() -> dict[str, list[bytes]]:
        system = fsspec.filesystem("http")
        names, starts, stops = zip(*ranges, strict=True)
        found = system.cat_ranges([url + name for name in names], list(starts), list(stops), batch_size=CONNECTIONS)
        return _by_file(names, found)

    return run


def obstore_ranges(place: Place) -> Callable[[], dict[str, list[Any]]]:
    """Call ``get_range_async`` for all ranges; the bytes stay where it leaves them."""
    obstore, stores = import_module("obstore"), import_module("obstore.store")
    ranges = _ranges({path.name: path.stat().st_size for path in _files(place)})

    async def get_all() -> list[Any]:
        store = stores.HTTPStore.from_url(place.urls["files"], client_options={"allow_http": True})
        free = asyncio.Semaphore(CONNECTIONS)

        async def get(name: str, start: int, stop: int) -> Any:
            async with free:
                return await obstore.get_range_async(store, f"{place.name}/{name}", start=start, end=stop)

        return await asyncio.gather(*(get(*one) for one in ranges))

    return lambda: _by_file([name for name, _, _ in ranges], asyncio.run(get_all()))


def as_tensors(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a method returned as tensors."""
    return {
        name: value if isinstance(value, Tensor) else torch.frombuffer(bytearray().join(value), dtype=torch.uint8)
        for name, value in result.items()
    }


def _by_file(names: Sequence[str], parts: Sequence[Any]) -> dict[str, list[Any]]:
    files: dict[str, list[Any]] = {}
    for name, part in zip(names, parts, strict=True):
        files.setdefault(name, []).append(part)
    return files


def _files(place: Place) -> list[Path]:
    return sorted(Path(place.directory).glob("*.safetensors"))


def _ranges(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    return [
        (name, start, min(start + RANGE_BYTES, nbytes))
        for name, nbytes in sizes.items()
        for start in range(0, nbytes, RANGE_BYTES)
    ]


METHODS: Mapping[str, Method] = {
    "bare ranged reads, memory touched before": Method(bare_touched, FILES, allocates=False),
    "bare ranged reads, new memory": Method(bare, FILES),
    "snapshot_download, from_pretrained": Method(snapshot_then_transformers, GROUPED),
    "snapshot_download, ours": Method(snapshot_then_ours, GROUPED, huge_pages=False),
    "hf_transfer, safetensors": Method(hf_transfer_then_safetensors, NAMED, allocates=False),
    "Run:ai streamer (S3), copy_": Method(runai, GROUPED),
    "fsspec cat_ranges": Method(fsspec_ranges, FILES),
    "obstore get_range": Method(obstore_ranges, FILES),
    "ours, s3://": Method(ours_from_s3, GROUPED, huge_pages=False),
    "ours, hf://": Method(ours_from_hub, GROUPED, huge_pages=False),
    "ours, transposed": Method(ours_transposed, TRANSPOSED, huge_pages=False),
    "ours": Method(ours, GROUPED, huge_pages=False),
}
