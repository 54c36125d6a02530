"""What executing a plan costs for each tensor, apart from planning and from the bytes: many tensors of 2 KiB.

    python -m benchmarks.executing [--against CHECKOUT] [--case CASE ...] [--size full|small]
                                   [--repetitions N] [--rounds N] [--directory DIR] [--json FILE]

One file of 38,400 matrices [32, 32] in bfloat16, in the page cache. Cases: each is a target of its own; grouped by
layer, gate and up above each other; grouped and transposed, as NeMo AutoModel has them. ``load_model`` with a plan that
was made before, into parameters that are there, by one thread. A repetition is a process of its own, in which rounds of
a load and of the floor take turns (``benchmarks/executing_worker.py``); the processes of all cases and checkouts take
turns too, in another order each time. A repetition counts with the median of its rounds.

schedule        from the copies of the plan to jobs; of this checkout only.
execute         the rest of the load's reading phase: buffers checked, files read, copies made.
load            both, as the report has it.
floor           the same bytes by ``os.preadv`` and numpy, in as many calls as the bytes want.
above the floor what each tensor costs because it is a tensor.

Times are the processor's, in the thread that reads, so that a busy machine disturbs them less. ``--against`` runs
another checkout of this package in turns with this one, by public functions only.
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
    """By case and checkout, the runs of all repetitions.

    Raises:
        RuntimeError: a load does not make the floor's bytes, or a process imported another checkout than it should.
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
    for method, found in runs.items():
        checkout = checkouts[method.rpartition("|")[2]]
        if any(Path(one["package"]).parent != Path(checkout) for one in found):
            raise RuntimeError(f"{checkout} was to be timed, and {found[0]['package']} was")
    return {case: {name: runs[f"{case}|{name}"] for name in checkouts} for case in cases}


def per_tensor(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds a tensor, one of each repetition, by what took them; what was not timed is left out."""
    found: dict[str, list[float]] = {}
    for one in runs:
        median = {kind: statistics.median(times) for kind, times in one["seconds"].items() if times}
        if "schedule" in median:
            median["execute"] = median["load"] - median["schedule"]
        median["above"] = median["load"] - median["floor"]
        for kind, seconds in median.items():
            found.setdefault(kind, []).append(seconds / one["tensors"])
    return found


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
        found = [per_tensor(runs) for runs in by_checkout.values()]
        for kind, title in _KINDS.items():
            cells = [measure.spread(times[kind]).text(1e6) if kind in times else "-" for times in found]
            shown.add_row(case if kind == "schedule" else "", title, *cells, *_ratio([of.get(kind) for of in found]))
        shown.add_section()
    return shown


def _ratio(times: Sequence[Sequence[float] | None]) -> list[str]:
    """Of what two checkouts took in each repetition; nothing where there is one, or one was not timed."""
    if len(times) < 2 or None in times:
        return []
    here, there = times
    return [measure.spread([a / b for a, b in zip(here or (), there or (), strict=True)]).text()]


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("executing", __doc__, repetitions=7, room="90 MB")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--against", metavar="CHECKOUT", help="another checkout of this package, timed in turns")
    parser.add_argument("--size", choices=LAYERS, default="full")
    parser.add_argument("--rounds", type=int, default=5, help="loads in each process")
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
