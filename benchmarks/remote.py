"""Benchmark loads from a server: by range straight into place, against downloads and other readers.

    python -m benchmarks.remote [--layers N] [--smoke] [--repetitions N] [--method NAME ...] [--latency S]
                                [--gb-per-s N] [--memory ready|as-found] [--directory DIR] [--json FILE]
    python -m benchmarks.remote --table FILE     the tables again from that JSON
    python -m benchmarks.remote --from FILE      those of docs/performance.md, in Markdown

The checkpoint has N layers with the experts of Qwen3-30B-A3B in bfloat16, a tensor for each expert and projection (2
are 2.4 GB). A process serves it on the loopback interface, as files, as a Hub and as a bucket of S3: each answer comes
after ``--latency`` seconds, and all bodies together at ``--gb-per-s``.

bare ranged reads                   The roof: ranges of 16 MiB by ``http.client``, over 16 connections with a thread
                                    each, straight into memory of the files' size, new or touched before.
ours                                ``load_state_dict`` of the URL, from transformers' names to grouped experts
                                    ``[E, 2I, H]``; "transposed": to ``[E, H, 2I]`` with ``layout="nemo"``.
snapshot_download                   Download by huggingface_hub, then ``from_pretrained`` or this package.
hf_transfer, safetensors            Download of each file over 16 connections, then ``load_file``, which only maps it.
Run:ai streamer (S3), copy_         ``SafetensorsStreamer``, and ``copy_`` into views of grouped tensors.
fsspec cat_ranges, obstore          The same ranges as bytes objects, which stay as they come.

Every run is a process of its own that first loads a tiny checkpoint in the same way. Methods alternate. The state of
free memory is set as in ``benchmarks.peers``; torch requests huge pages (``THP_MEM_ALLOC_ENABLE=1``) in all rows but
ours. Downloads go to ``--directory`` and are not flushed to the disk. Then each process computes a digest of all its
tensors, outside the timing. It must equal that of what transformers or safetensors load from the files on the disk.

Requests, bytes sent and new connections are those that the server counted. Memory is the peak of anonymous memory
above the level at the start of the timing, without the tensors themselves.

Ranks: four ranks with a quarter of the experts each and all other tensors load one after the other by the plans of
their parts; the bytes that the server sent, divided by those that the rank owns. First tensor: with a latency of half a
second, the time until one tensor is in place, divided by the latency.

The packages that this benchmark compares with are pinned in ``benchmarks/remote.txt`` and installed into
``.venv/remote``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks import measure, memory, options
from benchmarks.peers import overlay
from benchmarks.remote_methods import METHODS
from benchmarks.remote_server import serve_elsewhere
from benchmarks.remote_worker import expected_digests, first_tensor, load, load_ranks, variables
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

PINS = measure.REPOSITORY / "benchmarks" / "remote.txt"
FOLDER = measure.REPOSITORY / ".venv" / "remote"
_OURS, _ROOF = "ours", "bare ranged reads, new memory"
_FIRST_LATENCY = 0.5
_TITLES = (
    *("seconds", "GB/s", "ours is", "of the roof", "s of CPU", "requests", "sent MB", "connections", "memory MB"),
    "on disk MB",
)


def run(
    shape: Shape,
    methods: Sequence[str],
    repetitions: int,
    latency: float,
    gb_per_s: float,
    state: str,
    directory: str | None,
) -> dict[str, Any]:
    """Return all runs, the ranks, and the times of the first tensor.

    Raises:
        RuntimeError: a run failed, or has other tensors than the files.
    """
    peers = str(overlay.install(PINS, FOLDER))
    with tempfile.TemporaryDirectory(prefix="benchmark-remote-", dir=directory) as root:
        served = os.path.join(root, "served")
        show(f"  writing {shape.name} to {served}", err=True)
        for name, wanted in (("big", shape), ("small", SMALL)):
            write_checkpoint(wanted, os.path.join(served, name))
        digests = expected_digests(os.path.join(served, "big"))

        def before() -> None:
            measure.read_through(os.path.join(served, "big"))
            memory.wait(state)

        def worker(what: str, urls: Mapping[str, str]) -> list[str]:
            return ["-m", "benchmarks.remote", "--worker", what, json.dumps([urls, root, state])]

        with serve_elsewhere(served, latency, gb_per_s) as urls:
            commands = {method: worker(method, urls) for method in methods}
            settings = {method: variables(urls, METHODS[method].huge_pages, peers) for method in methods}
            runs = measure.run_interleaved(commands, repetitions, before, settings)
            of_ours = variables(urls, False, peers)
            ranks = measure.run_worker(worker("ranks", urls), 0, variables=of_ours)["ranks"]
        with serve_elsewhere(served, _FIRST_LATENCY, gb_per_s) as urls:
            of_ours = variables(urls, False, peers)
            first = [
                measure.run_worker(worker("first", urls), at, variables=of_ours)["seconds"] for at in range(repetitions)
            ]
        file_bytes = measure.file_bytes(os.path.join(served, "big"))
    check(runs, digests)
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "files": shape.files,
        "latency": latency,
        "gb_per_s": gb_per_s,
        "memory": state,
        "runs": runs,
        "ranks": ranks,
        "first_latency": _FIRST_LATENCY,
        "first_seconds": first,
    }


def check(runs: Mapping[str, Sequence[Mapping[str, Any]]], digests: Mapping[str, str]) -> None:
    """Check that all methods ended with the bytes of the files.

    Raises:
        RuntimeError: one did not.
    """
    for method, of in runs.items():
        if any(run["digest"] != digests[METHODS[method].ends_with] for run in of):
            raise RuntimeError(f"{method}: the tensors are not those of the files")


def work(what: str, urls: dict[str, str], root: str, state: str) -> dict[str, Any]:
    """Perform one run in this process."""
    if what == "first":
        return {"seconds": first_tensor(urls, root)}
    if what == "ranks":
        return {"ranks": load_ranks(urls, root)}
    return load(what, urls, root, state)


def _median(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(run[key] or 0 for run in runs)


def _rows(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the cells of each method by their titles."""
    runs = result["runs"]
    seconds = {name: _median(of, "seconds") for name, of in runs.items()}
    rows = {}
    for name, of in runs.items():
        cells = [
            measure.spread([run["seconds"] for run in of]).text(),
            f"{result['file_bytes'] / 1e9 / seconds[name]:.2f}",
            f"{seconds[name] / seconds[_OURS]:.2f}x" if _OURS in seconds else "",
            f"{seconds[_ROOF] / seconds[name]:.2f}" if _ROOF in seconds else "",
            f"{_median(of, 'cpu_seconds'):.2f}",
            *(
                f"{_median(of, 'requests'):.0f}",
                f"{_median(of, 'sent') / 1e6:.0f}",
                f"{_median(of, 'connections'):.0f}",
            ),
            f"{max(run['beyond_bytes'] for run in of) / 1e6:.0f}",
            f"{_median(of, 'written_bytes') / 1e6:.0f}",
        ]
        rows[name] = dict(zip(_TITLES, cells, strict=True))
    return rows


def ranks_text(result: Mapping[str, Any]) -> str:
    """Return a sentence about ranks, and one about the first tensor."""
    most = max(rank["sent"] / rank["owned_bytes"] for rank in result["ranks"])
    latency, seconds = result["first_latency"], statistics.median(result["first_seconds"])
    return (
        f"Each of {len(result['ranks'])} ranks is sent at most {most:.4f} of the bytes that it owns. With {latency} s "
        f"before each answer, the first tensor is in place after {seconds:.2f} s, {seconds / latency:.1f} round trips."
    )


def table(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    runs = next(iter(result["runs"].values()))
    shown = Table(
        title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB in {result['files']} files, "
        f"{result['latency'] * 1e3:.0f} ms, {result['gb_per_s']} GB/s, {memory.MEMORY[result['memory']]}, {len(runs)} "
        "runs each: median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("method")
    for title in _TITLES:
        shown.add_column(title, justify="right")
    for name, row in _rows(result).items():
        shown.add_row(name, *row.values())
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table and the sentences below it for pages."""
    lines = [f"| | {' | '.join(_TITLES)} |", "|---" * (len(_TITLES) + 1) + "|"]
    for name, row in _rows(result).items():
        bold = name == _OURS
        lines.append(f"| {' | '.join(f'**{cell}**' if bold and cell else cell for cell in [name, *row.values()])} |")
    return f"{measure.about(result['environment'])}\n\n" + "\n".join(lines) + f"\n\n{ranks_text(result)}\n"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("remote", __doc__, repetitions=3, room="three times the size of the checkpoint")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--gb-per-s", type=float, default=1.0, help="bandwidth of the server; 0 for no limit")
    parser.add_argument("--memory", choices=memory.MEMORY, default=memory.READY)
    parser.add_argument("--table", metavar="FILE", help="only print the tables of a result file")
    parser.add_argument("--from", dest="source", metavar="FILE", help="only print them in Markdown")
    options.add_worker(parser, 2)
    given = parser.parse_args(arguments)
    if given.worker:
        what, settings = given.worker
        sys.stdout.write(json.dumps(work(what, *json.loads(settings))) + "\n")
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)))
        return
    if given.table:
        result = measure.read_json(given.table)
    else:
        environment = measure.environment(touch=not given.smoke)
        shape = SMALL if given.smoke else qwen3_30b(given.layers)
        methods = given.method or list(METHODS)
        how = given.latency, given.gb_per_s, given.memory, given.directory
        result = {"environment": environment, **run(shape, methods, given.repetitions, *how)}
        measure.write_json(given.json, result)
    show_environment(result["environment"])
    show(table(result))
    show(ranks_text(result))


if __name__ == "__main__":
    main()
