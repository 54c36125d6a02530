"""Everything there is to know of one GPU, in one command of less than 10 minutes.

    python -m benchmarks.gpu [--json FILE] [--minutes N] [--layers N] [--commit NAME] [--sweep]
    python -m benchmarks.gpu --table FILE     (prints the README's tables from a result)
    python -m benchmarks.gpu --smoke          (all of it, tiny, on the CPU, in Triton's interpreter)

In this order: the tests of tests/gpu, of which one that fails ends it; kernels against copy_ and against torch; what
bounds a load; whole loads. What is timed has been verified bit by bit just before, and wrong bytes end it too. The
result is written after every stage, so that whatever stops the command leaves what was measured; a stage that breaks
is told in it, and the next begins.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import kernels, loading, tables, transfers
from benchmarks.operations import Mismatch
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint

_RESULTS = measure.REPOSITORY / "benchmarks" / "results"
# Of the whole time: what the tests may take, and by when no further kernel is begun; but some always are.
_TESTS_SHARE, _KERNELS_SHARE = 0.5, 0.6
_KERNELS_LEAST_S = 60
_SWEEP_S = 60


class TestsFailed(Exception):
    """What is not right is not timed."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="default: benchmarks/results/gpu-<name of the GPU>.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="what to stay within, roughly")
    parser.add_argument("--layers", type=int, default=4, help="of the checkpoint, 1.2 GB each")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds of loads, at most")
    parser.add_argument("--directory", help="where a temporary directory is made, for the checkpoint")
    parser.add_argument("--tests", default="tests/gpu", help="what to run before anything is timed")
    parser.add_argument("--commit", help="of the code, where the checkout has no .git")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; the times mean nothing")
    parser.add_argument("--table", metavar="FILE", help="print the tables of a result and do nothing else")
    options = parser.parse_args(arguments)
    if options.table:
        sys.stdout.write(tables.markdown(measure.read_json(options.table)))
        return
    if options.smoke:
        # Before anything asks for a device or imports triton, and for the processes that are started here.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "0"  # which the tests would turn on
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        parser.error("there is no CUDA device; --smoke tries everything on the CPU")
    run(device, options)


def run(device: torch.device, options: argparse.Namespace) -> None:
    """All stages; see the top of this file.

    Raises:
        TestsFailed, Mismatch: something is wrong; no number of what follows is written.
        SystemExit: a stage broke.
    """
    start = time.monotonic()
    seconds = 60 * options.minutes
    environment = measure.environment()
    if options.commit:
        environment["commit"] = options.commit
    result: dict[str, Any] = {"environment": environment, "device": describe(device), "stages_s": {}, "errors": {}}
    path = options.json or str(_RESULTS / f"gpu-{_slug(result['device']['name'])}.json")

    def stage(name: str, do: Callable[[], Any]) -> None:
        began = time.monotonic()
        _say(f"[{began - start:4.0f} s] {name}")
        try:
            result[name] = do()
        except (TestsFailed, Mismatch):
            raise
        except Exception:
            # One machine, one chance: what else can be measured is.
            result["errors"][name] = traceback.format_exc()
            _say(result["errors"][name])
        finally:
            result["stages_s"][name] = round(time.monotonic() - began, 1)
            measure.write_json(path, result)

    layers = kernels.SMOKE_LAYERS if options.smoke else kernels.LAYERS
    _say(tables.markdown(result))
    stage("tests", lambda: run_tests(options.tests, _TESTS_SHARE * seconds))
    deadline = max(start + _KERNELS_SHARE * seconds, time.monotonic() + _KERNELS_LEAST_S)
    result["kernels"] = []  # filled row by row: what was measured stays, whatever comes
    stage("kernels", lambda: _shown(kernels.measure_layers(layers, device, deadline), result["kernels"]))
    if options.sweep:
        result["sweep"] = []
        stage("sweep", lambda: _shown(kernels.sweep(layers[:2], device, time.monotonic() + _SWEEP_S), result["sweep"]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-", dir=options.directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        shape = SMALL if options.smoke else qwen3_30b(options.layers)
        stage("checkpoint", lambda: write(shape, big, warm_up))
        threads = min(16, measure.cores())
        stage("transfers", lambda: bounds(big, threads, device, 1 << (24 if options.smoke else 30)))
        stage("loads", lambda: loads(shape, big, warm_up, threads, device, options, start + seconds))
    _say(f"[{time.monotonic() - start:4.0f} s] done: {path}\n")
    sys.stdout.write(tables.markdown(result))
    if result["errors"]:
        sys.exit(f"broken: {', '.join(result['errors'])}; see {path}")


def write(shape: Shape, big: str, warm_up: str) -> dict[str, Any]:
    write_checkpoint(SMALL, warm_up)
    write_checkpoint(shape, big)
    return {"shape": shape.name, "source": shape.source}


def run_tests(tests: str, timeout_s: float) -> dict[str, Any]:
    """Run the tests in a process of their own.

    Raises:
        TestsFailed: one of them failed, or they took too long.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=10", tests]
    path = os.pathsep.join(filter(None, [str(measure.REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        # To standard error: on standard output there are the tables alone.
        done = subprocess.run(command, cwd=measure.REPOSITORY, env=environment, stdout=2, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TestsFailed(f"{tests} took more than {timeout_s:.0f} s; nothing was timed") from error
    if done.returncode:
        raise TestsFailed(f"{tests} failed; nothing was timed")
    return {"passed": tests}


def bounds(directory: str, threads: int, device: torch.device, nbytes: int) -> dict[str, Any]:
    return {
        "threads": threads,
        "host_to_device_gb_per_s": transfers.host_to_device_gb_per_s(nbytes, device),
        "preadv_gb_per_s": transfers.preadv_gb_per_s(directory, nbytes, threads, device),
        "compilation": transfers.cold_compilation(timeout_s=120),
    }


def loads(
    shape: Shape,
    directory: str,
    warm_up: str,
    threads: int,
    device: torch.device,
    options: argparse.Namespace,
    deadline: float,
) -> dict[str, Any]:
    repetitions = 1 if options.smoke else options.repetitions
    runs = loading.measure_loads(directory, warm_up, device, threads, repetitions, deadline)
    return {"shape": shape.name, "file_bytes": measure.read_through(directory), "threads": threads, "runs": runs}


def describe(device: torch.device) -> dict[str, Any]:
    """The device's name, memory and toolkit."""
    if device.type != "cuda":
        return {"name": "CPU, interpreted", "memory_bytes": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": [found.major, found.minor],
        "cuda": torch.version.cuda,
    }


def _shown(rows: Iterable[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the rows into ``found``, each said as it comes."""
    for row in rows:
        ms = row["ms"]
        each = ", ".join(f"{way} {time_ms:.3f}" if time_ms else f"{way} no memory" for way, time_ms in ms.items())
        _say(f"    {row['layer']}: {row['operation']} {row.get('tile', '')}: {each} ms")
        found.append(row)
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
