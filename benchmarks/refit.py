"""Benchmark refits: from a trainer on two ranks to an engine on two ranks, against gathering and broadcasting.

    python -m benchmarks.refit [--layers N] [--smoke] [--repetitions N] [--calls N] [--bucket-bytes N]
                               [--method NAME ...] [--directory DIR] [--json FILE]
    python -m benchmarks.refit --table FILE     the table again from that JSON
    python -m benchmarks.refit --from FILE      that of docs/performance.md, in Markdown

The model has N layers of Qwen3-30B-A3B in bfloat16 with few words (2 are 2.5 GB). Two processes hold it as a trainer,
under FSDP2. Two others hold an engine with the parameters of vLLM: half of the experts each, as ``w13_weight`` and
``w2_weight``, fused q, k and v, and all of everything else. All communicate over gloo, on the loopback interface.

ours                                ``Refit``, with the engine's ``load_weights`` as ``loader``.
gather, broadcast each tensor, load  All ranks of the trainer gather each parameter (``full_tensor``). The first one
                                    broadcasts each tensor of the checkpoint, with an expert's projections on their own,
                                    to all ranks of the engine, which call ``load_weights`` with it. vLLM does so
                                    (``ModuleSource``, "nccl", ``packed=False``).
gather, broadcast buckets, load     The same in buckets of ``--bucket-bytes``, as verl and vLLM (``packed=True``) do:
                                    one is filled or loaded from while the other one is under way.
gather alone                        The gathering of the two above, without what follows.
plain send                          The roof: each rank of the trainer sends to one rank of the engine as many bytes as
                                    that rank's parameters have, from one buffer to one buffer.

A process that has imported everything forks all ranks of a run; methods alternate. Each rank has one thread of torch.
The ranks first do the same with a tiny model, so that they are connected. Before each call, the weights of the trainer
change and those of the engine are overwritten; then all ranks begin together. The time of a call is that of its slowest
rank. The first call includes whatever happens once: ``Refit`` plans, and buckets are allocated.

After each call, every rank of the engine compares each byte with the checkpoint, whose values the trainer has, every
other time with flipped signs. No figure is printed unless all are equal.

Bytes sent are those that a process writes to sockets (wchar of /proc/self/io). Memory is the peak of anonymous memory
above the level before the first call, of the rank with the most.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks import measure, options, sharded
from benchmarks.adapters import qwen3_30b
from benchmarks.refit_worker import METHODS, RANKS, TRAINERS, work
from benchmarks.shapes import SMALL, Shape, write_checkpoint
from benchmarks.show import show, show_environment

_OURS, _ROOF = "ours", "plain send"
_TITLES = (
    *("seconds", "first call", "ours is", "of the roof", "s of CPU", "sent by all MB", "sent by one MB"),
    *("trainer MB", "engine MB"),
)
_ON_PAGES = (*_TITLES[:6], *_TITLES[7:])
"""The columns that pages show. The terminal and the data have all of them."""


def run_ranks(method: str, shape: Shape, directory: str, bucket_bytes: int, calls: int) -> dict[str, Any]:
    """Perform one run on all ranks.

    Raises:
        RuntimeError: a rank failed.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM  # noqa: F401  before the fork

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return {"ranks": sharded.divided(lambda: work(method, shape, SMALL, directory, bucket_bytes, calls), RANKS)}


def run(
    shape: Shape, methods: Sequence[str], repetitions: int, calls: int, bucket_bytes: int, directory: str | None
) -> dict[str, Any]:
    """Return all runs, and the bytes of the checkpoint.

    Raises:
        RuntimeError: a run failed, or gave the engine other bytes than the checkpoint has.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-refit-", dir=directory) as root:
        show(f"  writing {shape.name} to {root}", err=True)
        for size, wanted in (("big", shape), ("small", SMALL)):
            write_checkpoint(wanted, os.path.join(root, size))
        worker = ["-m", "benchmarks.refit", "--worker"]
        given = json.dumps([shape.config["num_hidden_layers"] if shape is not SMALL else 0, root, bucket_bytes, calls])
        commands = {method: [*worker, method, given] for method in methods}
        runs = measure.run_interleaved(commands, repetitions, lambda: measure.read_through(os.path.join(root, "big")))
        file_bytes = measure.file_bytes(os.path.join(root, "big"))
    check(runs)
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "bucket_bytes": bucket_bytes,
        "calls": calls,
        "runs": runs,
    }


def check(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Check that all ranks of the engine had the trainer's weights after each call.

    Raises:
        RuntimeError: one had not.
    """
    for method, of in runs.items():
        names = [name for run in of for rank in run["ranks"] for name in rank["wrong"]]
        if names:
            raise RuntimeError(f"{method}: the engine does not have the bytes of {', '.join(names[:3])}")


def _shape(layers: int) -> Shape:
    return qwen3_30b(layers) if layers else SMALL


def _calls(run: Mapping[str, Any], key: str, of: Any) -> list[float]:
    """Return ``of`` the values of all ranks, for each call of a run."""
    return [of(values) for values in zip(*(rank[key] for rank in run["ranks"]), strict=True)]


def _later(runs: Sequence[Mapping[str, Any]], key: str, of: Any) -> list[float]:
    return [value for run in runs for value in _calls(run, key, of)[1:]]


def _rows(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the cells of each method by their titles."""
    runs = result["runs"]
    seconds = {name: statistics.median(_later(of, "seconds", max)) for name, of in runs.items()}
    rows = {}
    for name, of in runs.items():
        cells = [
            measure.spread(_later(of, "seconds", max)).text(),
            f"{statistics.median(_calls(run, 'seconds', max)[0] for run in of):.2f}",
            f"{seconds[name] / seconds[_OURS]:.2f}x" if _OURS in seconds and METHODS[name].fills else "",
            f"{seconds[_ROOF] / seconds[name]:.2f}" if _ROOF in seconds else "",
            f"{statistics.median(_later(of, 'cpu_seconds', sum)):.2f}",
            f"{statistics.median(_later(of, 'sent_bytes', sum)) / 1e6:.0f}",
            f"{statistics.median(_later(of, 'sent_bytes', max)) / 1e6:.0f}",
            *(
                f"{max(rank['anonymous_bytes'] or 0 for run in of for rank in run['ranks'][ranks]) / 1e6:.0f}"
                for ranks in (slice(TRAINERS), slice(TRAINERS, None))
            ),
        ]
        rows[name] = dict(zip(_TITLES, cells, strict=True))
    return rows


def table(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    runs = next(iter(result["runs"].values()))
    shown = Table(
        title=f"{result['shape']}: {result['file_bytes'] / 1e9:.2f} GB, {TRAINERS} + {RANKS - TRAINERS} ranks over "
        f"gloo, buckets of {result['bucket_bytes'] / 2**20:.0f} MiB, {len(runs)} runs each of {result['calls']} calls: "
        "median (20th-80th percentile) of the later calls; the slowest rank; memory of the rank that needs most",
        title_justify="left",
    )
    shown.add_column("method")
    for title in _TITLES:
        shown.add_column(title, justify="right")
    for name, row in _rows(result).items():
        shown.add_row(name, *row.values())
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table with the columns that pages show."""
    lines = [f"| | {' | '.join(_ON_PAGES)} |", "|---" * (len(_ON_PAGES) + 1) + "|"]
    for name, row in _rows(result).items():
        cells = [name, *(row[title] for title in _ON_PAGES)]
        lines.append(f"| {' | '.join(f'**{cell}**' if name == _OURS and cell else cell for cell in cells)} |")
    return f"{measure.about(result['environment'])}\n\n" + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("refit", __doc__, repetitions=3, room="the size of the checkpoint")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--calls", type=int, default=4, help="calls of each run; the first one is timed apart")
    parser.add_argument("--bucket-bytes", type=int, default=256 << 20)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--table", metavar="FILE", help="only print the table of a result file")
    parser.add_argument("--from", dest="source", metavar="FILE", help="only print it in Markdown")
    options.add_worker(parser, 2)
    given = parser.parse_args(arguments)
    if given.worker:
        method, settings = given.worker
        layers, directory, bucket_bytes, calls = json.loads(settings)
        result = run_ranks(method, _shape(layers), directory, bucket_bytes, calls)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if given.source:
        sys.stdout.write(markdown(measure.read_json(given.source)))
        return
    if given.table:
        result = measure.read_json(given.table)
    else:
        environment = measure.environment(touch=not given.smoke)
        shape = _shape(0 if given.smoke else given.layers)
        methods = given.method or list(METHODS)
        results = run(shape, methods, given.repetitions, given.calls, given.bucket_bytes, given.directory)
        result = {"environment": environment, **results}
        measure.write_json(given.json, result)
    show_environment(result["environment"])
    show(table(result))


if __name__ == "__main__":
    main()
