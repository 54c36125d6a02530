"""Measurement for the benchmarks: interleaved runs in new processes, medians and spread, environment.

This module needs only numpy, torch and this package, so that it also runs in a minimal environment. ``show`` prints.

A worker times a method. It is a command that prints one JSON object on its last line. Workers alternate, in a
different order each round, so that a slow minute affects all methods equally.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy
from torch import Tensor

import automodel_conv
from automodel_conv.cli.demo_process import digests
from automodel_conv.cli.measuring import PeakMemory
from benchmarks import memory

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PICTURES = REPOSITORY / "docs" / "pictures"
"""The folder of all plots that pages show."""
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_IO = Path("/proc/self/io")
_CPUS = Path("/proc/cpuinfo")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes in Python and in a shell
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


class Spread(NamedTuple):
    """A median with the 20th and the 80th percentile."""

    median: float
    p20: float
    p80: float

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Return "median (p20-p80)", scaled and rounded."""
        median, p20, p80 = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median} ({p20}-{p80})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the 20th and 80th percentiles of values."""
    p20, median, p80 = numpy.percentile(values, [20, 50, 80])
    return Spread(float(median), float(p20), float(p80))


def shuffled(names: Sequence[str], repetition: int) -> list[str]:
    """Return the order of a round.

    It differs between rounds, so that no method always runs after the same one.
    """
    return random.Random(repetition).sample(names, len(names))


def run_interleaved(
    commands: Mapping[str, Sequence[str]],
    repetitions: int,
    before: Callable[[], object],
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run workers and return the JSON that each printed, by method and repetition.

    Args:
        commands: arguments to this Python interpreter, by method.
        before: called before each worker starts.
        settings: environment variables of a worker in addition to those of this process, by method.

    Raises:
        RuntimeError: a worker failed; with the end of its output.
    """

    def run(method: str, repetition: int) -> dict[str, Any]:
        before()
        return run_worker(commands[method], repetition, variables=settings[method] if settings else None)

    return interleaved(list(commands), repetitions, run)


def interleaved(
    methods: Sequence[str], repetitions: int, run: Callable[[str, int], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of ``run(method, repetition)`` by method.

    Methods alternate.
    """
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for repetition in range(repetitions):
        for method in shuffled(methods, repetition):
            results[method].append(run(method, repetition))
            sys.stderr.write(f"  round {repetition + 1} of {repetitions}: {method}\n")
    return results


class Killed(RuntimeError):
    """A worker was killed, for example by a memory limit."""


def run_worker(
    arguments: Sequence[str],
    repetition: int,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a worker and return the JSON that it printed.

    Args:
        variables: environment variables in addition to those of this process.
        prefix: a command that runs the worker's command.

    Raises:
        Killed: the worker was killed.
        RuntimeError: the worker failed; with the end of its output.
        subprocess.TimeoutExpired: the worker took longer than ``timeout_s``.
    """
    command = [*prefix, sys.executable, *arguments, "--repetition", str(repetition)]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=timeout_s,
        env={**os.environ, **(variables or {})},
    )
    if run.returncode in _KILLED:
        raise Killed(f"{' '.join(command)} was killed")
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


class Measured:
    """Measure a block: ``with Measured() as measured: ...``; then read ``measured.result``.

    The result has seconds on the clock and of the processor (user and system, all threads), page faults, bytes read,
    and peak memory above the level at the start. Bytes are counted in three ways: ``called_bytes`` are read by calls
    (rchar of /proc/self/io, including 1 MB a second of the measurement itself), ``mapped_bytes`` are pages of files
    that came into memory, ``disk_bytes`` come from below the page cache (read_bytes).
    """

    def __enter__(self) -> Measured:
        self.result: dict[str, Any] = {}
        self._peak = PeakMemory()
        self._peak.__enter__()
        self._io = _io()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        usage, io = resource.getrusage(resource.RUSAGE_SELF), _io()
        self._peak.__exit__(kind, error, trace)
        self.result |= {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime - self._usage.ru_utime - self._usage.ru_stime,
            "minor_faults": usage.ru_minflt - self._usage.ru_minflt,
            "major_faults": usage.ru_majflt - self._usage.ru_majflt,
            "called_bytes": io["rchar"] - self._io["rchar"] if io else None,
            "disk_bytes": io["read_bytes"] - self._io["read_bytes"] if io else None,
            "mapped_bytes": self._peak.mapped_bytes,
            "anonymous_bytes": self._peak.anonymous_bytes,
            "resident_bytes": self._peak.resident_bytes,
        }


def _io() -> dict[str, int]:
    """Return the counters of /proc/self/io, or an empty dict if the file does not exist."""
    if not _IO.exists():
        return {}
    return {name: int(count) for name, count in (line.split(": ") for line in _IO.read_text().splitlines())}


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_into(descriptor: int, offset: int, view: memoryview) -> None:
    """Fill ``view`` with a file's bytes from ``offset`` on."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise EOFError(f"byte {offset + done} is beyond the end of the file")
        done += count


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of all tensors: names, dtypes, shapes and bytes."""
    with ThreadPoolExecutor(cores()) as pool:
        parts = pool.map(lambda item: digests({item[0]: item[1].cpu()}), sorted(tensors.items()))
        return hashlib.blake2b(repr(list(parts)).encode(), digest_size=16).hexdigest()


def check_digests(digests: Mapping[str, Any]) -> None:
    """Check that all methods returned the same tensors, so that their times can be compared.

    Raises:
        RuntimeError: the digests differ; with the digest of each method.
    """
    if any(digest != next(iter(digests.values())) for digest in digests.values()):
        raise RuntimeError(f"the methods do not produce the same tensors: {digests}")


def file_bytes(directory: str) -> int:
    """Return the size of all tensor files together."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


def mapped_pss(directory: str) -> int:
    """Return the bytes of a directory's mapped pages in this process, each divided by the processes that share it."""
    kib, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):  # a mapping begins: addresses, rights, offset, device, inode, path
            inside = len(words) > 5 and words[5].startswith(f"{os.path.realpath(directory)}{os.sep}")
        elif inside and words[0] == "Pss:":
            kib += int(words[1])
    return kib * 1024


def read_through(directory: str) -> int:
    """Read every file once, so that all are in the page cache.

    Return their bytes.
    """
    buffer = bytearray(16 << 20)
    total = 0
    for path in sorted(Path(directory).iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def environment(touch: bool = False) -> dict[str, Any]:
    """Return the machine and the versions, without which no figure can be interpreted.

    Args:
        touch: also measure how fast memory is touched (``memory.touch_speeds``). This needs 2 GB and at most two
            minutes.
    """
    versions: dict[str, str | None] = {"automodel_conv": automodel_conv.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "memory_bytes": memory.total_bytes(),
        "cores": cores(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "huge_pages": _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else None,
        "touched_gb_per_s": memory.touch_speeds() if touch else None,
        "commit": _commit(),
        "versions": versions,
    }


def about(environment: Mapping[str, Any]) -> str:
    """Return a line that describes the machine, as far as it is known."""
    cpu, total, pages, speeds = (
        environment.get(key) for key in ("cpu", "memory_bytes", "huge_pages", "touched_gb_per_s")
    )
    parts = [
        f"{environment['cores']} cores of {cpu or environment['machine']}",
        f"{total / 2**30:.0f} GiB" if total else "",
        f"Linux {environment['kernel'].partition('-')[0]}",
        f"transparent huge pages: {_chosen(pages)}" if pages else "",
    ]
    if speeds:
        just, ago = (f"{speeds[name]:.1f} GB/s" for name in ("freed_just_now", "freed_long_ago"))
        goes = "goes back to the host" if memory.goes_back(speeds) else "stays with the machine"
        long = f"{memory.RETURN_SECONDS:.0f} s"
        parts.append(
            f"memory is touched at {just} if it was freed just now, at {ago} if {long} ago: free memory {goes}"
        )
    return "; ".join(filter(None, parts)) + "."


def _chosen(setting: str) -> str:
    """Return the word in brackets, with which files of /sys mark the active setting."""
    return next((word.strip("[]") for word in setting.split() if word.startswith("[")), setting)


def _cpu() -> str | None:
    """Return the model name in /proc/cpuinfo, or None."""
    lines = _CPUS.read_text().splitlines() if _CPUS.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Write a whole file or keep the old one, even if this process is killed.

    Do nothing if the path is None.
    """
    if path is not None:
        new = Path(f"{path}.new")
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(new, path)


def read_json(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))
