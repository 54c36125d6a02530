"""Benchmark saves of a grouped model and conversions on disk: seconds, GB/s, memory, against transformers and ``cp``.

    python -m benchmarks.saving [--layers N] [--smoke] [--repetitions N] [--threads N] [--shard-size SIZE]
                                [--method NAME ...] [--memory ready|as-found ...] [--directory DIR] [--json FILE]
    python -m benchmarks.saving --table FILE       the tables again from that JSON

The checkpoint is that of ``benchmarks.peers``: N layers with the experts of Qwen3-30B-A3B (2 are 2.4 GB), a tensor
per expert and projection. A second checkpoint has the same tensors grouped, ``[E, 2I, H]``. All files that are written
have at most ``--shard-size`` of data, except those of ``cp``, which are the source's.

save        A model that ``from_pretrained`` has loaded is saved to per-expert files; only the save is timed.
            transformers: ``save_pretrained``. ours: ``save_checkpoint``.
group       From per-expert files to grouped ones, from disk to disk.
            transformers: ``from_pretrained``, then ``save_pretrained(save_original_format=False)``.
            ours: ``convert_checkpoint``.
ungroup     From grouped files to per-expert ones.
            transformers: ``from_pretrained``, then ``save_pretrained``, without its record that the files were grouped:
            it reverts only its own conversions.
transpose   From per-expert files to ``[E, H, 2I]``: ``convert_checkpoint(layout="nemo")``.
cp          Within group and ungroup, and for comparison with transpose: ``cp`` of the files that they read, as the roof
            of a conversion that only regroups.

This package ends when all bytes and names are on the disk (fsync); transformers and cp end when they are in the page
cache. For a fair comparison, both are also measured followed by fsync of all their files and of their directory
("fsync"). The default is ``verify=False``; "verified" reads every file back and compares it with the source.

Every run is a process of its own that first does the same with a tiny checkpoint, so that imports and one-time setup
are not timed. Its sources are in the page cache, no data of earlier runs waits to be written, and free memory is in one
of two states, made ready or as found, see ``benchmarks/memory.py``. Memory is the peak above the level at the start of
the timing. By then the imports are done, and for save the model is loaded. It is not measured for ``cp``. CPU time is
that of the process and of ``cp``, without the kernel's later work to write to the disk.

In the first round each run also computes a digest of the tensors in its files, by name, dtype, shape and bytes. torch
transposes transposed tensors back for it. No figure is printed unless all per-expert results agree with each other and
with the files at the start, and all grouped results agree with each other.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory
from benchmarks import measure, memory, options
from benchmarks.shapes import SMALL, Shape, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

PER_EXPERT, GROUPED = "per-expert", "grouped"
TITLES = ("seconds", "s of CPU", "GB/s", "ours is", "x cp, fsync", "anonymous MiB", "resident MiB")
GROUPS = ("save", "group", "ungroup", "transpose")
_TRANSPOSED = {"gate_and_up_projs": "gate_up_proj", "down_projs": "down_proj"}
# Small enough that even the tiny checkpoint has several files.
TINY_SHARD = "64KB"


class Setting(NamedTuple):
    """The paths of the checkpoints of one size, by form, and how files are written."""

    directory: str
    threads: int
    shard_size: str

    def files(self, form: str) -> str:
        return os.path.join(self.directory, form)


Run = Callable[[str], object]
"""Writes a checkpoint to a new directory. Its result is kept until the timing is over."""
Prepare = Callable[[Setting], Run]
"""Called before the timing."""


class Method(NamedTuple):
    group: str
    prepare: Prepare
    makes: str


def save_with_transformers(setting: Setting) -> Run:
    model = _loaded(setting.files(PER_EXPERT))
    return lambda out: model.save_pretrained(out, max_shard_size=setting.shard_size)


def save_with_ours(setting: Setting) -> Run:
    model = _loaded(setting.files(PER_EXPERT))
    return lambda out: amc.save_checkpoint(model, out, max_shard_size=setting.shard_size, threads=setting.threads)


def convert_with_transformers(setting: Setting, source: str) -> Run:
    def run(out: str) -> object:
        model = _loaded(setting.files(source))
        back = source == GROUPED
        if back:
            model._weight_conversions = None  # none: the files were already grouped
        model.save_pretrained(out, save_original_format=back, max_shard_size=setting.shard_size)
        return model

    return run


def convert_with_ours(setting: Setting, source: str, layout: str, verify: bool) -> Run:
    return lambda out: amc.convert_checkpoint(
        setting.files(source),
        out,
        layout=layout,
        max_shard_size=setting.shard_size,
        verify=verify,
        threads=setting.threads,
    )


def copy_with_cp(setting: Setting, source: str) -> Run:
    return lambda out: subprocess.run(["cp", "-R", setting.files(source), out], check=True)


def synced(prepare: Prepare) -> Prepare:
    """Add an fsync of all output to a method."""

    def prepared(setting: Setting) -> Run:
        run = prepare(setting)

        def run_and_sync(out: str) -> object:
            result = run(out)
            for path in (*Path(out).iterdir(), Path(out)):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            return result

        return run_and_sync

    return prepared


def _methods() -> dict[str, Method]:
    methods = {
        "save: transformers": Method("save", save_with_transformers, PER_EXPERT),
        "save: transformers, fsync": Method("save", synced(save_with_transformers), PER_EXPERT),
        "save: ours": Method("save", save_with_ours, PER_EXPERT),
    }
    for group, source, output, layout in (
        ("group", PER_EXPERT, GROUPED, "transformers"),
        ("ungroup", GROUPED, PER_EXPERT, "per_expert"),
        ("transpose", PER_EXPERT, GROUPED, "nemo"),
    ):
        if group != "transpose":
            copy, convert = partial(copy_with_cp, source=source), partial(convert_with_transformers, source=source)
            methods[f"{group}: cp"] = Method(group, copy, source)
            methods[f"{group}: cp, fsync"] = Method(group, synced(copy), source)
            methods[f"{group}: transformers"] = Method(group, convert, output)
            methods[f"{group}: transformers, fsync"] = Method(group, synced(convert), output)
        for name, verify in (("ours", False), ("ours, verified", True)):
            ours = partial(convert_with_ours, source=source, layout=layout, verify=verify)
            methods[f"{group}: {name}"] = Method(group, ours, output)
    return methods


METHODS: Mapping[str, Method] = _methods()


def work(name: str, directory: str, threads: int, shard_size: str, state: str, repetition: int) -> dict[str, Any]:
    """Perform one run in this process.

    Args:
        state: state of free memory.
    """
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    method = METHODS[name]
    out = os.path.join(directory, "out")
    tiny = Setting(os.path.join(directory, "tiny"), threads, TINY_SHARD)
    big = Setting(os.path.join(directory, "big"), threads, shard_size)
    method.prepare(tiny)(out)
    shutil.rmtree(out)
    result = timed(method.prepare(big), out, [big.files(form) for form in (PER_EXPERT, GROUPED)], state)
    if "cp" in name:
        result |= {"anonymous_bytes": None, "resident_bytes": None}
    result["digest"] = digest_of(out) if repetition == 0 else None
    shutil.rmtree(out)
    return result


def timed(run: Run, out: str, sources: Sequence[str], state: str) -> dict[str, Any]:
    """Return the seconds, the processor's seconds and the peak memory of a run.

    Args:
        out: the directory that it writes.
        sources: the directories that it may read. They are read into the page cache before. Memory is made ready for
            the size of the first one.
        state: state of free memory.
    """
    os.sync()  # includes the files of a warm-up
    for source in sources:  # the page cache may evict pages that were read before the wait
        measure.read_through(source)
    memory.prepare(state, measure.file_bytes(sources[0]))
    with PeakMemory() as peak:
        start, start_cpu = time.perf_counter(), _cpu_seconds()
        written = run(out)
        seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - start_cpu
    del written
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "anonymous_bytes": peak.anonymous_bytes,
        "resident_bytes": peak.resident_bytes,
    }


def digest_of(directory: str) -> str:
    """Return one digest of all tensors in the files, as safetensors reads them, without transposition."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            stem, _, leaf = name.rpartition(".")
            if leaf in _TRANSPOSED:
                name, tensor = f"{stem}.{_TRANSPOSED[leaf]}", tensor.transpose(1, 2).contiguous()
            tensors[name] = tensor
    return measure.digest(tensors)


def _loaded(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def _cpu_seconds() -> float:
    """Return the processor time of this process and of the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_checkpoints(shape: Shape, root: str, threads: int, shard_size: str) -> None:
    """Write the checkpoint and a tiny one, each per expert and grouped."""
    for size, wanted, most_bytes in (("big", shape, shard_size), ("tiny", SMALL, TINY_SHARD)):
        per_expert, grouped = (os.path.join(root, size, form) for form in (PER_EXPERT, GROUPED))
        write_checkpoint(wanted, per_expert)
        amc.convert_checkpoint(per_expert, grouped, layout="transformers", max_shard_size=most_bytes, threads=threads)


def run(
    shape: Shape,
    methods: list[str],
    states: list[str],
    repetitions: int,
    threads: int,
    shard_size: str,
    directory: str | None,
) -> dict[str, Any]:
    """Return all runs, by state of free memory and method, and the bytes of the files.

    Raises:
        RuntimeError: the digests of two methods differ, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-saving-", dir=directory) as root:
        show(f"  writing {shape.name} to {root}", err=True)
        write_checkpoints(shape, root, threads, shard_size)
        big = os.path.join(root, "big")

        def run_all(state: str) -> dict[str, list[dict[str, Any]]]:
            worker = ["-m", "benchmarks.saving", "--worker"]
            commands = {method: [*worker, method, root, str(threads), shard_size, state] for method in methods}

            def before() -> None:
                os.sync()
                memory.wait(state)

            return measure.run_interleaved(commands, repetitions, before)

        runs = {state: run_all(state) for state in states}
        at_start = digest_of(os.path.join(big, PER_EXPERT))
        file_bytes = measure.file_bytes(os.path.join(big, PER_EXPERT))
    for form, known in ((PER_EXPERT, {"the files at the start": at_start}), (GROUPED, {})):
        digests = known | {
            f"{name}, {state}": by_method[name][0]["digest"]
            for state, by_method in runs.items()
            for name in methods
            if METHODS[name].makes == form
        }
        if len(set(digests.values())) > 1:
            raise RuntimeError(f"the methods do not produce the same tensors: {digests}")
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "threads": threads,
        "shard_size": shard_size,
        "runs": runs,
    }


def table(result: Mapping[str, Any], state: str) -> Table:
    """Return the table of the runs in one state of free memory."""
    file_bytes, runs = result["file_bytes"], result["runs"][state]
    shown = Table(
        title=f"{result['shape']}: {file_bytes / 1e9:.2f} GB of files, {result['threads']} threads, "
        f"sources in the page cache, {memory.MEMORY[state]}, {len(next(iter(runs.values())))} runs each: "
        "median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("method")
    for title in TITLES:
        shown.add_column(title, justify="right")
    seconds = {name: statistics.median(run["seconds"] for run in method_runs) for name, method_runs in runs.items()}
    for group in GROUPS:
        ours = seconds.get(f"{group}: ours")
        roof = seconds.get(f"{'group' if group == 'transpose' else group}: cp, fsync")
        for name in (name for name in runs if METHODS[name].group == group):
            shown.add_row(name, *cells(runs[name], file_bytes, ours, roof))
        shown.add_section()
    return shown


def cells(runs: Sequence[Mapping[str, Any]], file_bytes: int, ours: float | None, roof: float | None) -> list[str]:
    """Return the cells below ``TITLES`` for the runs of a method.

    Args:
        ours: the median of this package, if it was measured.
        roof: the median of ``cp``, if it was measured.
    """
    seconds = statistics.median(run["seconds"] for run in runs)
    return [
        measure.spread([run["seconds"] for run in runs]).text(),
        f"{statistics.median(run['cpu_seconds'] for run in runs):.2f}",
        f"{file_bytes / 1e9 / seconds:.2f}",
        f"{seconds / ours:.2f}x" if ours else "",
        f"{seconds / roof:.2f}" if roof else "",
        *(_peak(runs, kind, file_bytes) for kind in ("anonymous_bytes", "resident_bytes")),
    ]


def _peak(runs: Sequence[Mapping[str, Any]], kind: str, file_bytes: int) -> str:
    peaks = [run[kind] for run in runs if run[kind] is not None]
    return f"{max(peaks) / 2**20:.0f} ({max(peaks) / file_bytes:.2f}x)" if peaks else "-"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("saving", __doc__, repetitions=5, room="three times the files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--threads", type=int, default=measure.cores())
    parser.add_argument("--shard-size", default="1GB", help="size of the output files")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--memory", action="append", choices=memory.MEMORY, help="default: both")
    parser.add_argument("--table", metavar="FILE", help="only print the tables of a result file")
    options.add_worker(parser, 5)
    given = parser.parse_args(arguments)
    if given.worker:
        method, directory, threads, shard_size, state = given.worker
        result = work(method, directory, int(threads), shard_size, state, given.repetition)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if given.table:
        result = measure.read_json(given.table)
        _show(result)
        return
    environment = measure.environment(touch=not given.smoke)
    shape, shard_size = (SMALL, TINY_SHARD) if given.smoke else (qwen3_30b(given.layers), given.shard_size)
    methods = given.method or list(METHODS)
    states = given.memory or list(memory.MEMORY)
    results = run(shape, methods, states, given.repetitions, given.threads, shard_size, given.directory)
    environment["file_system"] = file_system(given.directory)
    result = {"environment": environment, **results}
    _show(result)
    measure.write_json(given.json, result)


def _show(result: Mapping[str, Any]) -> None:
    show_environment(result["environment"])
    for state in result["runs"]:
        show(table(result, state))


def file_system(directory: str | None) -> str | None:
    """Return the type of the file system that was written to."""
    at = str(Path(directory or tempfile.gettempdir()).resolve())
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return None
    mounts = [line.split()[1:3] for line in lines]
    over = [(point, kind) for point, kind in mounts if os.path.commonpath([point, at]) == point]
    return max(over, key=lambda mount: len(mount[0]), default=("", None))[1]


if __name__ == "__main__":
    main()
