"""The cost per tensor of executing a plan, without planning and without the bytes: many tensors of 2 KiB.

    python -m benchmarks.executing [--against CHECKOUT] [--case CASE ...] [--size full|small]
                                   [--repetitions N] [--rounds N] [--directory DIR] [--json FILE]

One file has 38,400 matrices [32, 32] in bfloat16, in the page cache. The cases are: each matrix is a target of its own;
matrices are grouped by layer, gate and up stacked; matrices are grouped and transposed, in NeMo AutoModel's layout.
``load_model`` loads them with an existing plan, into existing parameters, in one thread. A repetition is a process of
its own, in which rounds of a load and of the floor alternate (``benchmarks/executing_worker.py``). The processes of all
cases and checkouts alternate too, in a different order each time. A repetition counts with the median of its rounds.

schedule        from the copies of the plan to jobs; only of this checkout.
execute         the rest of the load's reading phase: checks of buffers, reads, copies.
load            both, as the report records them.
floor           the same bytes by ``os.preadv`` and numpy, in the number of calls that the bytes require.
above the floor the cost of each tensor in addition to its bytes.

Times are the processor's, in the thread that reads, so that a busy machine disturbs them less. ``--against`` alternates
between another checkout of this package and this one, with public functions only.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import measure, options
from benchmarks.executing_worker import CASES, write_file
from benchmarks.show import show, show_environment

LAYERS = {"full": 100, "small": 1}
HERE, THERE = "here", "against"
_WORKER = Path(__file__).with_name("executing_worker.py")


def run(
    cases: Sequence[str],
    layers: int,
    checkouts: Mapping[str, str],
    repetitions: int,
    rounds: int,
    directory: str | None,
) -> dict[str, Any]:
    """Return the runs of all repetitions, by case and checkout.

    Raises:
        RuntimeError: a load does not produce the floor's bytes, or a process imported another checkout than it should.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-executing-", dir=directory) as root:
        path = os.path.join(root, "model.safetensors")
        write_file(path, layers)
        commands, settings = {}, {}
        for case in cases:
            for name, checkout in checkouts.items():
                commands[f"{case}|{name}"] = [str(_WORKER), case, path, str(layers), str(rounds)]
                settings[f"{case}|{name}"] = {"PYTHONPATH": checkout}
        runs = measure.run_interleaved(commands, repetitions, lambda: measure.read_through(root), settings)
    for method, method_runs in runs.items():
        checkout = checkouts[method.rpartition("|")[2]]
        if any(Path(one["package"]).parent != Path(checkout) for one in method_runs):
            raise RuntimeError(f"{checkout} was to be timed, and {method_runs[0]['package']} was")
    return {case: {name: runs[f"{case}|{name}"] for name in checkouts} for case in cases}


def per_tensor(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return seconds per tensor for each repetition, by part.

    Parts that were not timed are left out.
    """
    by_kind: dict[str, list[float]] = {}
    for one in runs:
        median = {kind: statistics.median(times) for kind, times in one["seconds"].items() if times}
        if "schedule" in median:
            median["execute"] = median["load"] - median["schedule"]
        median["above"] = median["load"] - median["floor"]
        for kind, seconds in median.items():
            by_kind.setdefault(kind, []).append(seconds / one["tensors"])
    return by_kind


# In the order of the table.
_KINDS = {"schedule": "schedule", "execute": "execute", "load": "load", "floor": "floor", "above": "above the floor"}


def table(results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Table:
    shown = Table(title="microseconds of the processor a tensor: median (20th-80th percentile)", title_justify="left")
    names = list(next(iter(results.values())))
    for title in ("case", "what"):
        shown.add_column(title)
    for title in (*names, f"{HERE} / {THERE}")[: 2 * len(names) - 1]:
        shown.add_column(title, justify="right")
    for case, by_checkout in results.items():
        times_of_checkouts = [per_tensor(runs) for runs in by_checkout.values()]
        for kind, title in _KINDS.items():
            cells = [measure.spread(times[kind]).text(1e6) if kind in times else "-" for times in times_of_checkouts]
            shown.add_row(
                case if kind == "schedule" else "", title, *cells, *_ratio([of.get(kind) for of in times_of_checkouts])
            )
        shown.add_section()
    return shown


def _ratio(times: Sequence[Sequence[float] | None]) -> list[str]:
    """Return the ratio of two checkouts over the repetitions, or nothing if there is one or one was not timed."""
    if len(times) < 2 or None in times:
        return []
    here, there = times
    return [measure.spread([a / b for a, b in zip(here or (), there or (), strict=True)]).text()]


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("executing", __doc__, repetitions=7, room="90 MB")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--against", metavar="CHECKOUT", help="another checkout to alternate with")
    parser.add_argument("--size", choices=LAYERS, default="full")
    parser.add_argument("--rounds", type=int, default=5, help="number of loads in each process")
    given = parser.parse_args(arguments)
    checkouts = {HERE: str(measure.REPOSITORY)}
    if given.against:
        checkouts[THERE] = os.path.realpath(given.against)
    environment = measure.environment()
    cases = given.case or list(CASES)
    results = run(cases, LAYERS[given.size], checkouts, given.repetitions, given.rounds, given.directory)
    show_environment(environment)
    show(table(results))
    measure.write_json(given.json, {"environment": environment, "results": results})


if __name__ == "__main__":
    main()
