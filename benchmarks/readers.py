"""Benchmark readers of local files with a cold page cache: ours, direct reads, io_uring, and those of others.

    python -m benchmarks.readers [--layers N] [--smoke] [--repetitions N] [--method NAME ...] [--directory DIR]
                                 [--json FILE]
    python -m benchmarks.readers --table FILE     the table again from that JSON
    python -m benchmarks.readers --from FILE      that of docs/performance.md, in Markdown

The checkpoint is that of ``benchmarks.peers``: N layers with the experts of Qwen3-30B-A3B (2 are 2.4 GB), a tensor for
each expert and projection. Every file is dropped from the page cache before each run (``benchmarks.peers.cache``), and
memory of three times its size is touched and freed. Every run is a process of its own, and methods alternate.

preadv          Runs of 4 MiB by ``os.preadv`` into new memory of huge pages, in 2 threads: through the page cache.
O_DIRECT        Runs of 8 MiB by ``os.preadv`` past the page cache, straight into new memory of huge pages.
Run:ai          ``SafetensorsStreamer`` with each strategy that it has, and ``copy_`` into views of grouped tensors.
safetensors     0.9.0rc1 with ``backend="pread"``: a new tensor for each tensor of the files. Its prefetch needs CUDA.
ours            ``load_state_dict``, from transformers' names to grouped experts ``[E, 2I, H]``.

In the first round each process computes a digest of what it has read, which must be that of the files. Not measured,
because they do not run here or cannot read into a tensor: KvikIO 26.10 needs libcuda.so.1 even for its POSIX reads;
liburing 2026.3.30 reads into a bytearray only.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import automodel_conv as amc
from benchmarks import measure, memory, options, remote
from benchmarks.grouped import grouped_shapes, new_buffers
from benchmarks.peers import cache, overlay
from benchmarks.peers.roofs import preadv_untouched
from benchmarks.peers.worker import variables
from benchmarks.remote_methods import FILES, GROUPED, NAMED
from benchmarks.remote_worker import expected_digests
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

PINS = measure.REPOSITORY / "benchmarks" / "readers.txt"
FOLDER = measure.REPOSITORY / ".venv" / "readers"
_OURS = "ours"
_DIRECT_BYTES = 8 << 20
_TITLES = ("seconds", "GB/s", "ours is", "s of CPU", "memory of the files", "read from the disk")

Run = Callable[[], Any]


class Reader(NamedTuple):
    prepare: Callable[[str], Run]
    ends_with: str
    settings: Mapping[str, str] = {}
    """Environment variables of its processes."""
    newest_safetensors: bool = False
    huge_pages: bool = True


def buffered(directory: str) -> Run:
    run = preadv_untouched(directory, measure.cores(), huge=True)
    names = [path.name for path in _files(directory)]
    return lambda: dict(zip(names, run(), strict=True))


def direct(directory: str, threads: int) -> Run:
    """Read past the page cache into new memory that begins at a page; the last bytes of a file end within one."""
    files = _files(directory)
    runs = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _DIRECT_BYTES)]

    def run() -> dict[str, Tensor]:
        buffers = {path: _new_pages(path.stat().st_size) for path in files}
        opened = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}

        def read(one: tuple[Path, int]) -> None:
            path, offset = one
            view = memoryview(buffers[path].numpy())[offset : offset + _DIRECT_BYTES]
            wanted = min(_DIRECT_BYTES, path.stat().st_size - offset)
            if (count := os.preadv(opened[path], [view], offset)) != wanted:
                raise EOFError(f"{path}: {count} bytes at {offset}, expected {wanted}")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, runs))
        for descriptor in opened.values():
            os.close(descriptor)
        return {path.name: buffers[path][: path.stat().st_size] for path in files}

    return run


def _new_pages(nbytes: int) -> Tensor:
    """Return new memory of huge pages, of whole pages."""
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def runai(directory: str) -> Run:
    library = import_module("runai_model_streamer")
    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed=False)
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in _files(directory)], owned=False)
            for name, tensor in streamer.get_tensors():
                views[name].copy_(tensor)
        return buffers

    return run


def safetensors_pread(directory: str) -> Run:
    safe_open: Any = import_module("safetensors").safe_open

    def run() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in _files(directory):
            with safe_open(path, "pt", backend="pread") as file:
                tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
        return tensors

    return run


def ours(directory: str) -> Run:
    return lambda: amc.load_state_dict(directory)


def _strategy(name: str) -> Reader:
    return Reader(runai, GROUPED, {"RUNAI_STREAMER_FS_STRATEGY": name})


READERS: Mapping[str, Reader] = {
    "preadv": Reader(buffered, FILES),
    "O_DIRECT, 2 threads": Reader(partial(direct, threads=2), FILES),
    "O_DIRECT, 16 threads": Reader(partial(direct, threads=16), FILES),
    "Run:ai, sync_buffered": _strategy("sync_buffered"),
    "Run:ai, io_uring_buffered": _strategy("io_uring_buffered"),
    "Run:ai, io_uring_direct": _strategy("io_uring_direct"),
    "Run:ai, libaio_direct": _strategy("libaio_direct"),
    "safetensors 0.9.0rc1, pread": Reader(safetensors_pread, NAMED, newest_safetensors=True),
    _OURS: Reader(ours, GROUPED, huge_pages=False),
}


def read(method: str, root: str, repetition: int) -> dict[str, Any]:
    """Read the small checkpoint, then the big one, cold; return the figures of the second, and a digest the first time.

    Raises:
        RuntimeError: files stayed in the page cache.
    """
    READERS[method].prepare(os.path.join(root, "small"))()
    big = os.path.join(root, "big")
    run = READERS[method].prepare(big)
    nbytes = measure.file_bytes(big)
    memory.prepare(memory.READY, nbytes)
    cache.evict(big)
    if cache.cached_share(big) > 0.01:
        raise RuntimeError(f"{cache.cached_share(big):.1%} of the files stayed in the page cache")
    with measure.Measured() as measured:
        result = run()
    return {**measured.result, "digest": None if repetition else measure.digest(result)}


def run(shape: Shape, methods: Sequence[str], repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return all runs.

    Raises:
        RuntimeError: a run failed, or read other bytes than the files have.
    """
    overlay.install(PINS, FOLDER)
    overlay.install(remote.PINS, remote.FOLDER)
    with tempfile.TemporaryDirectory(prefix="benchmark-readers-", dir=directory) as root:
        show(f"  writing {shape.name} to {root}", err=True)
        for name, wanted in (("big", shape), ("small", SMALL)):
            write_checkpoint(wanted, os.path.join(root, name))
        digests = expected_digests(os.path.join(root, "big"))
        commands = {method: ["-m", "benchmarks.readers", "--worker", method, root] for method in methods}
        settings = {method: _variables(READERS[method]) for method in methods}
        runs = measure.run_interleaved(commands, repetitions, lambda: None, settings)
        file_bytes = measure.file_bytes(os.path.join(root, "big"))
    for method, of in runs.items():
        if of[0]["digest"] != digests[READERS[method].ends_with]:
            raise RuntimeError(f"{method}: the bytes are not those of the files")
    return {"shape": shape.name, "source": shape.source, "file_bytes": file_bytes, "runs": runs}


def _variables(reader: Reader) -> dict[str, str]:
    settings = variables("cold", reader.huge_pages)
    first = [str(FOLDER)] if reader.newest_safetensors else []
    path = os.pathsep.join([*first, settings["PYTHONPATH"], str(remote.FOLDER)])
    return {**settings, **reader.settings, "PYTHONPATH": path}


def _rows(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the cells of each method by their titles."""
    runs, nbytes = result["runs"], result["file_bytes"]
    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    rows = {}
    for name, of in runs.items():
        cells = [
            measure.spread([run["seconds"] for run in of]).text(),
            f"{nbytes / 1e9 / seconds[name]:.2f}",
            f"{seconds[name] / seconds[_OURS]:.2f}x" if _OURS in seconds else "",
            f"{statistics.median(run['cpu_seconds'] for run in of):.2f}",
            f"{max(run['anonymous_bytes'] or 0 for run in of) / nbytes:.2f}x",
            f"{statistics.median(run['disk_bytes'] or 0 for run in of) / nbytes:.2f}x",
        ]
        rows[name] = dict(zip(_TITLES, cells, strict=True))
    return rows


def table(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    runs = next(iter(result["runs"].values()))
    shown = Table(
        title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB, cold page cache, {len(runs)} runs each: median "
        "(20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("reader")
    for title in _TITLES:
        shown.add_column(title, justify="right")
    for name, row in _rows(result).items():
        shown.add_row(name, *row.values())
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table for pages."""
    lines = [f"| | {' | '.join(_TITLES)} |", "|---" * (len(_TITLES) + 1) + "|"]
    for name, row in _rows(result).items():
        cells = [name, *row.values()]
        lines.append(f"| {' | '.join(f'**{cell}**' if name == _OURS and cell else cell for cell in cells)} |")
    return f"{measure.about(result['environment'])}\n\n" + "\n".join(lines) + "\n"


def _files(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*.safetensors"))


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("readers", __doc__, repetitions=5, room="the size of the checkpoint")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--method", action="append", choices=READERS, help="default: all")
    parser.add_argument("--table", metavar="FILE", help="only print the table of a result file")
    parser.add_argument("--from", dest="source", metavar="FILE", help="only print it in Markdown")
    options.add_worker(parser, 2)
    given = parser.parse_args(arguments)
    if given.worker:
        sys.stdout.write(json.dumps(read(*given.worker, given.repetition)) + "\n")
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)))
        return
    if given.table:
        result = measure.read_json(given.table)
    else:
        environment = measure.environment(touch=not given.smoke)
        shape = SMALL if given.smoke else qwen3_30b(given.layers)
        methods = given.method or list(READERS)
        result = {"environment": environment, **run(shape, methods, given.repetitions, given.directory)}
        measure.write_json(given.json, result)
    show_environment(result["environment"])
    show(table(result))


if __name__ == "__main__":
    main()
