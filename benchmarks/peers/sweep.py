"""The growth of a load's seconds with tensors, their size, experts, threads and files, one at a time.

    python -m benchmarks.peers.sweep [--axis NAME ...] [--repetitions N] [--size full|small] [--directory DIR]
                                     [--results DIR] [--pictures DIR]
    python -m benchmarks.peers.sweep --plot             the plots again, from the CSV files

The conditions are those of ``python -m benchmarks.peers``: warm page cache, ``[E, 2I, H]``. A process loads all points
of an axis with one method, one after the other, each after a tiny checkpoint. A point is left out if the one before
predicts more than a minute for it. Its line in the CSV then has no seconds. The tensors of the first round have the
same digest in all methods.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from benchmarks.memory import READY
from benchmarks.peers import overlay
from benchmarks.peers.methods import METHODS
from benchmarks.peers.worker import Job, variables
from benchmarks.shapes import SMALL, Shape, write_checkpoint
from benchmarks.show import show

COMPARED = ("transformers", "safetensors-copy", "dcp", "ours")
COLUMNS = ("axis", "x", "method", "version", "tensors", "files", "bytes", "threads", "run", "seconds")
_MOST_SECONDS = 60.0
_BYTES = 400 << 20


class Point(NamedTuple):
    """A checkpoint and how it is loaded.

    ``x`` is its place on the axis.
    """

    x: int
    shape: Shape
    threads: int


class Axis(NamedTuple):
    title: str
    points: Callable[[int], list[Point]]
    """Returns the points, for a factor by which all sizes are smaller than the full ones."""


def _shape(layers: int, experts: int, tensor_bytes: int, files: int, hidden: int = 2048) -> Shape:
    """Return Qwen3-MoE layers with expert tensors of about ``tensor_bytes``."""
    intermediate = max(8, tensor_bytes // (2 * hidden))
    return Shape(
        f"{layers} layers of {experts} experts, {intermediate} x {hidden}",
        "no published model",
        "qwen3_moe",
        {
            **SMALL.config,
            "num_hidden_layers": layers,
            "num_experts": experts,
            "hidden_size": hidden,
            "moe_intermediate_size": intermediate,
        },
        keys=layers * (experts * 3 + 9) + 3,
        files=files,
    )


def _by_tensors(smaller: int) -> list[Point]:
    counts = [count // smaller for count in (1_000, 3_000, 10_000, 30_000, 100_000)]
    shapes = [_shape(max(1, n // 384), 128, _BYTES // smaller // n, 4, hidden=64) for n in counts]
    return [Point(shape.keys, shape, measure.cores()) for shape in shapes]


def _by_size(smaller: int) -> list[Point]:
    sizes = [(64 << 10) << 2 * step for step in range(6)]
    if smaller > 1:
        sizes = sizes[:2]
    points = []
    for size in sizes:
        count = max(2, _BYTES // smaller // (3 * size))
        experts = min(count, 128)
        points.append(Point(size, _shape(count // experts, experts, size, 4), measure.cores()))
    return points


def _by_experts(smaller: int) -> list[Point]:
    counts = [8, 32, 128, 512] if smaller == 1 else [2, 4]
    return [Point(n, _shape(1, n, (1 << 20) // smaller, 4), measure.cores()) for n in counts]


def _by_threads(smaller: int) -> list[Point]:
    shape = _shape(1, 128 // min(smaller, 32), 1 << 20, 4)
    return [Point(threads, shape, threads) for threads in (1, 2, 4, 8)]


def _by_files(smaller: int) -> list[Point]:
    counts = [1, 4, 16, 64, 256] if smaller == 1 else [1, 2]
    return [Point(n, _shape(2, 128 // min(smaller, 32), (512 << 10) // smaller, n), measure.cores()) for n in counts]


AXES: Mapping[str, Axis] = {
    "tensors": Axis(f"tensors, {_BYTES >> 20} MiB in all", _by_tensors),
    "size": Axis(f"bytes of an expert's tensor, {_BYTES >> 20} MiB in all", _by_size),
    "experts": Axis("experts of three tensors of 1 MiB", _by_experts),
    "threads": Axis("threads, 384 MiB", _by_threads),
    "files": Axis("files, 384 MiB in all", _by_files),
}


def run(axis: str, methods: Sequence[str], repetitions: int, smaller: int, directory: str | None) -> list[dict]:
    """Return the lines of the CSV of an axis.

    Raises:
        RuntimeError: two methods do not produce the same tensors, or a run failed.
    """
    points = AXES[axis].points(smaller)
    with tempfile.TemporaryDirectory(prefix="benchmark-sweep-", dir=directory) as root:
        warm_up = os.path.join(root, "warm-up")
        write_checkpoint(SMALL, warm_up)
        places = {shape.name + str(shape.files): shape for _, shape, _ in points}
        for number, (name, shape) in enumerate(list(places.items())):
            places[name] = os.path.join(root, str(number))
            show(f"  writing {shape.name} to {places[name]}", err=True)
            write_checkpoint(shape, places[name])
        where = [places[point.shape.name + str(point.shape.files)] for point in points]
        pairs = [(path, point.threads) for path, point in zip(where, points, strict=True)]
        growth = [1.0, *(b.shape.keys / a.shape.keys for a, b in itertools.pairwise(points))]
        jobs = {m: Job(m, pairs, warm_up, growth=growth, most_seconds=_MOST_SECONDS) for m in methods}
        results = measure.run_interleaved(
            {m: ["-m", "benchmarks.peers", "--worker", json.dumps(job.as_dict())] for m, job in jobs.items()},
            repetitions,
            lambda: None,
            {m: variables("warm", READY in METHODS[m].huge_pages) for m in methods},
        )
        sizes = [measure.file_bytes(path) for path in where]
    lines = []
    for number, point in enumerate(points):
        loads = {m: [one["loads"][number] for one in results[m]] for m in methods}
        measure.check_digests(
            {m: method_loads[0]["digest"] for m, method_loads in loads.items() if "digest" in method_loads[0]}
        )
        for method, method_loads in loads.items():
            common = (point.shape.keys, point.shape.files, sizes[number], point.threads)
            version = overlay.version(METHODS[method].package)
            lines += [
                dict(zip(COLUMNS, (axis, point.x, method, version, *common, k, load.get("seconds", "")), strict=True))
                for k, load in enumerate(method_loads)
            ]
    return lines


def write(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--axis", action="append", choices=AXES, help="default: all")
    parser.add_argument("--method", action="append", choices=METHODS, help=f"default: {', '.join(COMPARED)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--directory", help="parent of the temporary directory; it needs 3 GB")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="directory for the CSV files")
    parser.add_argument("--pictures", type=Path, default=measure.PICTURES, help="directory for the plots")
    parser.add_argument("--plot", action="store_true", help="draw the CSV files of --results; measure nothing")
    options = parser.parse_args(arguments)
    overlay.use()
    from benchmarks.peers.plots import draw

    if not options.plot:
        for axis in options.axis or AXES:
            smaller = 1 if options.size == "full" else 64
            lines = run(axis, options.method or COMPARED, options.repetitions, smaller, options.directory)
            write(lines, options.results / f"sweep-{axis}.csv")
    for axis in options.axis or AXES:
        if (options.results / f"sweep-{axis}.csv").exists():
            for path in draw(options.results / f"sweep-{axis}.csv", AXES[axis].title, options.pictures):
                show(str(path))


if __name__ == "__main__":
    main()
