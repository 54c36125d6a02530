"""Fuzzing with atheris (libFuzzer), guided by the coverage of this package, from the corpus in this folder.

    python -m tests.fuzz [TARGET ...] [--seconds N] [--seed N] [--keep] [--record FILE]

Each target runs for N seconds in its own process, and ends with its finding, if any. The input is then in the current
directory, and ``--input FILE`` runs it again. ``--keep`` adds inputs that reach new code to the corpus; ``--record``
adds a line for each target to a CSV file. atheris must be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("header", "load", "index", "config", "journal", "checksums")
_LONGEST_INPUT = 16384
_LONGEST_KEPT = 1024
_MOST_SECONDS_AN_INPUT = 5
_STARTING_SECONDS = 120
_MOST_MIB = 3000
_COLUMNS = ("date", "target", "executions", "seconds", "seed", "inputs", "found", "python", "atheris", "safetensors")


class Run(NamedTuple):
    """The result of fuzzing one target."""

    executions: int
    seconds: float
    found: str
    """The last lines printed before the target ended early; empty if it did not."""


def fuzz(name: str, seconds: float, seed: int, planted: str | None = None, keep: bool = False) -> Run:
    """Fuzz a target in its own process."""
    with tempfile.TemporaryDirectory() as new:
        corpus = CORPUS / name
        command = [
            *(sys.executable, "-m", "tests.fuzz", "--target", name, *(["--plant", planted] if planted else [])),
            *(new, *([str(corpus)] if corpus.exists() else [])),
            *(f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={_LONGEST_INPUT}", "-print_final_stats=1"),
            f"-rss_limit_mb={_MOST_MIB}",
        ]
        start = time.monotonic()
        try:
            most_seconds = seconds + _STARTING_SECONDS
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=most_seconds)
        except subprocess.TimeoutExpired:
            return Run(0, seconds, f"{name} hangs")
        took = time.monotonic() - start
        executed = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        if keep and not done.returncode:
            corpus.mkdir(parents=True, exist_ok=True)
            for path in Path(new).iterdir():
                if path.stat().st_size <= _LONGEST_KEPT:
                    shutil.copy(path, corpus)
    finding = f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}" if done.returncode else ""
    return Run(int(executed[-1]) if executed else 0, took, finding)


def run_target(name: str, planted: str | None, arguments: list[str]) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["automodel_conv"], enable_loader_override=False):
        from automodel_conv.files import header
        from tests.fuzz.targets import TARGETS
    if planted:
        from tests.fuzz.planted import plant

        for function in plant(planted, header):
            atheris.instrument_func(function)
    target = TARGETS[name]
    seeds = target.seeds()

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.05:
            data = random.choice(seeds)
        if random.random() < 0.2:
            return atheris.Mutate(data, most)
        return target.mutate(data, random)[:most]

    def check(data: bytes) -> None:
        start = time.monotonic()
        target.check(data)
        if time.monotonic() - start > _MOST_SECONDS_AN_INPUT:
            raise AssertionError(f"took {time.monotonic() - start:.1f} s")

    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # libFuzzer's handler would end this process silently
    atheris.Setup(["fuzz", *arguments], check, custom_mutator=mutated)
    # At exit, atheris would wait for an interpreter that is gone, so end at once.
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)
    atheris.Fuzz()


def record(path: Path, name: str, seed: int, run: Run) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS)
        if fresh:
            table.writeheader()
        line: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "target": name,
            "executions": run.executions,
            "seconds": round(run.seconds),
            "seed": seed,
            "inputs": len(list((CORPUS / name).glob("*"))),
            "found": len(run.found) > 0,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in ("atheris", "safetensors")},
        }
        table.writerow(line)


def main() -> None:
    if "--target" in sys.argv:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--target")
        parser.add_argument("--plant")
        own, arguments = parser.parse_known_args()
        run_target(own.target, own.plant, arguments)
        return
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", choices=[*NAMES, []], metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add inputs that reach new code to the corpus")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a CSV file, to which a line is added for each")
    options = parser.parse_args()
    wrong = False
    for name in options.targets or NAMES:
        run = fuzz(name, options.seconds, options.seed, keep=options.keep)
        sys.stdout.write(f"{name}: {run.executions:,} executions in {run.seconds:.0f} s\n{run.found}")
        sys.stdout.flush()
        if options.record:
            record(options.record, name, options.seed, run)
        wrong |= bool(run.found)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
