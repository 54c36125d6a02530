"""Benchmark expert-parallel loads by several processes, and the planning of one rank.

    python -m benchmarks.sharded [--layers N] [--smoke] [--repetitions N] [--threads N] [--method NAME ...]
                                 [--directory DIR] [--json FILE] [--table FILE]

The results are seconds, bytes read and peak memory per rank. The checkpoint is that of ``benchmarks.peers``: N layers
with the experts of Qwen3-30B-A3B (2 are 2.4 GB), a tensor per expert and projection. Four processes that communicate
over gloo load it. Each ends with a quarter of the experts, ``[E/4, 2I, H]`` and ``[E/4, H, I]``, and with all of every
other tensor.

ours          ``load_model``, into a model of DTensors on the meta device: experts ``Shard(0)``, others
              ``Replicate()``.
ours, dcp     ``dcp.load`` with ``HuggingFaceReader``, into the same model with memory of its own.
dcp           ``dcp.load`` with torch's ``HuggingFaceStorageReader``, into views of grouped buffers of the rank's
              shards, for the per-expert names of the rank's own experts only.
transformers  ``from_pretrained`` with expert parallelism, all else replicated (``DistributedConfig``).

The time runs from the call, buffers included, until the rank has all its bytes. All ranks begin together, and the time
of a run is that of its slowest rank. The model on the meta device, or the shapes of the buffers, exist before; only
``from_pretrained`` builds its model within the time. The buffers of both rows of dcp are advised to use huge pages, as
those of this package are. Every rank has ``--threads`` threads, if the method has such a setting (transformers uses its
own number).

All ranks of a run are forked from one process that has imported everything. Each first loads a tiny checkpoint in the
same way. Then one of them touches memory of twice the size of the files and frees it, see ``benchmarks.peers``. The
page cache is warm.

Bytes read are counted in three ways, since no single one fits all:

counted       At this package's own calls of ``preadv``, without headers and config.json. Exact; only ours.
called        The system's count for all reading calls of the process (rchar of /proc/self/io). It includes headers, and
              1 MB a second of the measurement itself, but not reads through mmap.
mapped        Pages of files that came into the process's memory (rises of RssFile, sampled every 3 ms): reads through
              mmap. It includes the pages around a wanted one that the system maps too.

Read is the counted bytes, or else called and mapped together: an estimate. Amplification is read / owned. Memory is the
peak above the level at the start of the timing, of the rank with the most.

In the first round each rank also computes a digest of its tensors, by name, dtype, shape and bytes. No figure is
printed unless every rank's digest is the same for all methods.

Planning is measured separately, in one process, on sparse headers of half a million tensors: reading and checking them
(open), names to plan (plan), the part of one rank of 64 (shard), and its reads and their order (schedule).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.compiling.decoded import quantization_of
from automodel_conv.distributed.placements import local_of
from automodel_conv.execution.host import DEFAULT_SCRATCH_BYTES, bytes_of_slot
from automodel_conv.files import system
from automodel_conv.planning.sharding import placed
from automodel_conv.schedule.host import schedule
from benchmarks import measure, options
from benchmarks.grouped import advise_huge_pages, grouped_shapes, per_expert
from benchmarks.shapes import (
    HALF_A_MILLION,
    SMALL,
    Shape,
    meta_model,
    qwen3_30b,
    write_checkpoint,
    write_sparse_checkpoint,
)
from benchmarks.show import show, show_environment

RANKS = 4
_TIMEOUT_S = 300

Run = Callable[[], dict[str, Tensor]]
"""The timed function. It returns the rank's parts under the model's names."""


def prepare_ours(directory: str, threads: int) -> Run:
    model = _sharded_model(directory)

    def run() -> dict[str, Tensor]:
        amc.load_model(model, directory, threads=threads)
        return _parts_of(model)

    return run


def prepare_our_reader(directory: str, threads: int) -> Run:
    import torch.distributed.checkpoint as dcp

    from automodel_conv.integrations.dcp import HuggingFaceReader

    model = _sharded_model(directory)

    def run() -> dict[str, Tensor]:
        model.to_empty(device="cpu")
        parts = _parts_of(model)
        for part in parts.values():
            advise_huge_pages(part)
        dcp.load(model.state_dict(), storage_reader=HuggingFaceReader(directory, threads=threads))
        return parts

    return run


def prepare_dcp(directory: str, threads: int) -> Run:
    import torch.distributed.checkpoint as dcp

    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        views: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            if ".experts." in name:
                shape = (shape[0] // RANKS, *shape[1:])
            parts[name] = torch.empty(shape, dtype=torch.bfloat16)
            advise_huge_pages(parts[name])
            views |= per_expert(name, parts[name], first=dist.get_rank() * shape[0])
        dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(directory, thread_count=threads))
        return parts

    return run


def prepare_transformers(directory: str, threads: int) -> Run:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    how: dict[str, Any] = {"tp_size": RANKS} if "tp_size" in known else {}
    if "ep_size" in known:
        with torch.device("meta"):
            tensor_parallel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).tp_plan
        # An empty plan is refused together with tp_size, so every entry is replaced.
        how |= {"ep_size": RANKS, "tp_plan": dict.fromkeys(tensor_parallel, "replicated_with_grad_allreduce")}
    else:
        how |= {"enable_expert_parallel": True}

    def run() -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**how))
        return _parts_of(model)

    return run


METHODS: Mapping[str, Callable[[str, int], Run]] = {
    "ours": prepare_ours,
    "ours, dcp": prepare_our_reader,
    "dcp": prepare_dcp,
    "transformers": prepare_transformers,
}


def _sharded_model(directory: str) -> nn.Module:
    """Return the model on the meta device, of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            placements = [Shard(0) if path.endswith(".experts") else Replicate()]
            if parameter is not None:
                shard = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
                module._parameters[leaf] = nn.Parameter(shard)
    return model


def _parts_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: local_of(tensor) for name, tensor in model.state_dict().items()}


class _Counted:
    """Count bytes: ``with _Counted() as counted: ...``; then ``counted.nbytes``, of all reads at the file module."""

    def __enter__(self) -> _Counted:
        self._calls: list[int] = []
        self._stock = stock = system.preadv

        def preadv(fd: int, views: list[memoryview], offset: int) -> int:
            done = stock(fd, views, offset)
            self._calls.append(done)  # atomic, since several threads read
            return done

        system.preadv = preadv
        return self

    def __exit__(self, *args: object) -> None:
        system.preadv = self._stock

    @property
    def nbytes(self) -> int:
        return sum(self._calls)


def work(method: str, directory: str, warm_up: str, threads: int, repetition: int) -> dict[str, Any]:
    """Perform one rank's run in this process, which is in the group already."""
    prepare = METHODS[method]
    prepare(warm_up, threads)()
    with _Counted() as headers:
        quantization_of(amc.open_checkpoint(directory))
    start = time.perf_counter()
    run = prepare(directory, threads)
    seconds_before = time.perf_counter() - start
    if dist.get_rank() == 0:
        ready_memory(2 * sum(file.stat().st_size for file in os.scandir(directory)))
    with PeakMemory() as peak, _Counted() as counted:
        dist.barrier()
        start, start_cpu, start_called = time.perf_counter(), time.process_time(), _called_bytes()
        start_faults = resource.getrusage(resource.RUSAGE_SELF)
        parts = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        faults = resource.getrusage(resource.RUSAGE_SELF)
        called_bytes = _called_bytes() - start_called
    ours = counted.nbytes > 0
    return {
        "seconds": seconds,
        "seconds_before": seconds_before,
        "cpu_seconds": cpu_seconds,
        "owned_bytes": sum(tensor.nbytes for tensor in parts.values()),
        "counted_bytes": counted.nbytes - headers.nbytes if ours else None,
        "header_bytes": headers.nbytes,
        "called_bytes": called_bytes,
        "mapped_bytes": peak.mapped_bytes,
        "minor_faults": faults.ru_minflt - start_faults.ru_minflt,
        "major_faults": faults.ru_majflt - start_faults.ru_majflt,
        "anonymous_bytes": peak.anonymous_bytes,
        "resident_bytes": peak.resident_bytes,
        "digest": measure.digest(parts) if repetition == 0 else None,
    }


def _called_bytes() -> int:
    with open("/proc/self/io", encoding="ascii") as io:
        return int(next(line for line in io if line.startswith("rchar:")).split()[1])


def divided(job: Callable[[], dict[str, Any]], ranks: int = RANKS) -> list[dict[str, Any]]:
    """Fork a group of ``ranks`` processes and return the result of ``job`` on each rank.

    Raises:
        RuntimeError: a rank failed; with the end of its output. The others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as directory:
        left = {_fork(job, rank, ranks, Path(directory)): rank for rank in range(ranks)}
        failed = None
        while left:
            pid, status = os.wait()
            rank = left.pop(pid)
            if status and failed is None:
                failed = rank
                for other in left:
                    os.kill(other, 9)
        if failed is not None:
            raise RuntimeError(f"rank {failed} failed:\n{Path(directory, f'{failed}.err').read_text()[-4000:]}")
        return [measure.read_json(os.path.join(directory, f"{rank}.json")) for rank in range(ranks)]


def _fork(job: Callable[[], dict[str, Any]], rank: int, ranks: int, directory: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        printed = os.open(directory / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}  # transformers reads these
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
        measure.write_json(str(directory / f"{rank}.json"), job())
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(method: str, directory: str, warm_up: str, threads: int, repetition: int) -> dict[str, Any]:
    """Perform one run on all ranks."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM  # noqa: F401  before the fork
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ranks = divided(lambda: work(method, directory, warm_up, threads, repetition))
    return {"seconds": max(rank["seconds"] for rank in ranks), "ranks": ranks}


def run(shape: Shape, methods: list[str], repetitions: int, threads: int, directory: str | None) -> dict[str, Any]:
    """Return all runs, and the bytes of the files.

    Raises:
        RuntimeError: the digests of two methods differ, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-sharded-", dir=directory) as root:
        big, warm_up = os.path.join(root, "big"), os.path.join(root, "warm-up")
        show(f"  writing {shape.name} to {big}", err=True)
        write_checkpoint(shape, big)
        write_checkpoint(SMALL, warm_up)
        commands = {
            method: ["-m", "benchmarks.sharded", "--worker", method, big, warm_up, str(threads)] for method in methods
        }
        runs = measure.run_interleaved(commands, repetitions, lambda: measure.read_through(big))
        file_bytes = sum(path.stat().st_size for path in Path(big).glob("*.safetensors"))
    digests = {method: [rank["digest"] for rank in runs[method][0]["ranks"]] for method in methods}
    if any(digest != digests[methods[0]] for digest in digests.values()):
        raise RuntimeError(f"the methods do not produce the same tensors: {digests}")
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": file_bytes,
        "ranks": RANKS,
        "threads": threads,
        "runs": runs,
    }


def run_planning(shape: Shape, ranks: int, repetitions: int, directory: str | None) -> dict[str, Any]:
    """Return the seconds, by stage, that one of many ranks needs before it reads the first byte."""
    from torch.distributed.tensor import Replicate, Shard

    seconds: dict[str, list[float]] = {stage: [] for stage in ("open", "plan", "shard", "schedule")}
    with tempfile.TemporaryDirectory(prefix="benchmark-sharded-", dir=directory) as root:
        show(f"  planning {shape.name}: {shape.keys:,} tensors", err=True)
        write_sparse_checkpoint(shape, root)
        model = meta_model(shape)
        for repetition in range(repetitions + 1):  # the first repetition does not count
            gc.collect()
            laps = [time.perf_counter()]
            checkpoint = amc.open_checkpoint(root)
            laps.append(time.perf_counter())
            plan = amc.compile_plan(checkpoint, model)
            laps.append(time.perf_counter())
            rank = repetition % ranks
            placements = {t.name: [Shard(0) if ".experts." in t.name else Replicate()] for t in plan.targets}
            mine = plan.shard({t.name: placed(t.shape, (ranks,), (rank,), placements[t.name]) for t in plan.targets})
            laps.append(time.perf_counter())
            copies = [target.copies for target in mine.targets]
            threads = measure.cores()
            slots = bytes_of_slot(threads, DEFAULT_SCRATCH_BYTES)
            jobs = schedule(mine.targets, copies, checkpoint, {}, threads=threads, slot_bytes=slots)
            laps.append(time.perf_counter())
            if sum(job.reads.total_bytes for job in jobs) != mine.bytes_written:
                raise RuntimeError("the rank would not read what it owns")
            for stage, start, stop in zip(seconds, laps, laps[1:], strict=False):
                if repetition:
                    seconds[stage].append(stop - start)
            del checkpoint, plan, mine, copies, jobs
    return {
        "shape": shape.name,
        "source": shape.source,
        "keys": shape.keys,
        "files": shape.files,
        "ranks": ranks,
        "seconds": seconds,
    }


def table(result: Mapping[str, Any]) -> Table:
    file_bytes, runs = result["file_bytes"], result["runs"]
    shown = Table(
        title=f"{result['shape']}: {file_bytes / 1e9:.2f} GB of files, {result['ranks']} ranks over gloo, threads of "
        f"each: {result['threads']}, warm page cache, {len(next(iter(runs.values())))} runs each: "
        "median (20th-80th percentile) of the slowest rank; bytes of the rank that has most",
        title_justify="left",
    )
    shown.add_column("method")
    for title in (
        "seconds",
        "s of CPU",
        "GB/s",
        "ours is",
        "counted MB",
        "called MB",
        "mapped MB",
        "read / owned",
        "anonymous MB",
        "of owned",
    ):
        shown.add_column(title, justify="right")
    seconds = {method: statistics.median(run["seconds"] for run in method_runs) for method, method_runs in runs.items()}
    for method, method_runs in runs.items():
        ranks = [rank for run in method_runs for rank in run["ranks"]]
        owned = sum(rank["owned_bytes"] for rank in method_runs[0]["ranks"])
        anonymous = max(rank["anonymous_bytes"] or 0 for rank in ranks)
        shown.add_row(
            method,
            measure.spread([run["seconds"] for run in method_runs]).text(),
            f"{statistics.median(sum(rank['cpu_seconds'] for rank in run['ranks']) for run in method_runs):.2f}",
            f"{owned / 1e9 / seconds[method]:.2f}",
            f"{seconds[method] / seconds['ours']:.2f}x" if "ours" in seconds else "",
            *(_most(ranks, f"{way}_bytes") for way in ("counted", "called", "mapped")),
            f"{max(_read_bytes(rank) / rank['owned_bytes'] for rank in ranks):.3f}",
            f"{anonymous / 1e6:.1f}",
            f"{max((rank['anonymous_bytes'] or 0) / rank['owned_bytes'] for rank in ranks):.3f}x",
        )
    return shown


def _most(ranks: list[dict[str, Any]], key: str) -> str:
    found = [rank[key] for rank in ranks if rank[key] is not None]
    return f"{max(found) / 1e6:.1f}" if found else "-"


def _read_bytes(rank: Mapping[str, Any]) -> int:
    if rank["counted_bytes"] is not None:
        return rank["counted_bytes"]
    return rank["called_bytes"] + (rank["mapped_bytes"] or 0)


def planning_table(result: Mapping[str, Any]) -> Table:
    seconds = result["seconds"]
    shown = Table(
        title=f"{result['shape']}: {result['keys']:,} tensors, {result['files']} files, one rank of "
        f"{result['ranks']} (expert parallel): median (20th-80th percentile)",
        title_justify="left",
    )
    for title in ("stage", "seconds", "us per tensor"):
        shown.add_column(title, justify="left" if title == "stage" else "right")
    rows = dict(seconds) | {"together": [sum(laps) for laps in zip(*seconds.values(), strict=True)]}
    for stage, values in rows.items():
        times = measure.spread(values)
        shown.add_row(stage, times.text(digits=3), times.text(1e6 / result["keys"], 2))
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("sharded", __doc__, repetitions=5, room="the size of the files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--threads", type=int, default=max(1, measure.cores() // RANKS), help="threads of each rank")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--table", metavar="FILE", help="only print the tables of a result file")
    options.add_worker(parser, 4)
    given = parser.parse_args(arguments)
    if given.worker:
        method, directory, warm_up, threads = given.worker
        result = run_ranks(method, directory, warm_up, int(threads), given.repetition)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if given.table:
        result = measure.read_json(given.table)
    else:
        shape, planned, ranks = (SMALL, SMALL, 4) if given.smoke else (qwen3_30b(given.layers), HALF_A_MILLION, 64)
        methods = given.method or list(METHODS)
        environment = measure.environment()
        loads = run(shape, methods, given.repetitions, given.threads, given.directory)
        planning = run_planning(planned, ranks, given.repetitions, given.directory)
        result = {"environment": environment, "loads": loads, "planning": planning}
        measure.write_json(given.json, result)
    show_environment(result["environment"])
    show(table(result["loads"]))
    show(planning_table(result["planning"]))


if __name__ == "__main__":
    main()
