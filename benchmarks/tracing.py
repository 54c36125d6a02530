"""The cost of a trace: microseconds per tensor of a checkpoint, without any tensor data.

    python -m benchmarks.tracing [--json FILE] [--repetitions N] [--directory DIR] [--size full|small]

Checkpoints have the names, shapes, headers and number of files of real ones. Their files are sparse. Two loaders fill
the same model: ``engine`` copies tensors into views of parameters, as an engine's ``load_weights`` does; ``adapter``
stacks, concatenates and transposes the tensors of a dict, as an adapter's ``from_hf`` does. The stages of each loader
alternate in one process, in a different order each time:

loader  the loading code itself, on tensors without data, without a trace
trace   ``trace_loader``: the loading code under a trace, the composition of its copies, the proof
kept    the trace from the cache: the digest of names, shapes, dtypes and targets, and the plan from its file, proved

Garbage is collected before each timing.
"""

from __future__ import annotations

import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import automodel_conv as amc
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.loading_code.kept_traces import digest_of, keep_trace, kept_trace
from automodel_conv.planning.copies import SourceTable
from automodel_conv.tracing import trace_loader
from automodel_conv.types import LoaderCalls
from benchmarks import measure, options
from benchmarks.shapes import (
    DEEPSEEK_V3,
    QWEN3_30B,
    SMALL,
    TWO_LAYERS,
    Shape,
    checkpoint_tensors,
    meta_model,
    write_sparse_checkpoint,
)
from benchmarks.show import show, show_environment

SIZES = {"full": (TWO_LAYERS, QWEN3_30B, DEEPSEEK_V3), "small": (SMALL,)}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Loader(NamedTuple):
    """Loading code, what it fills, and what it is called with."""

    load: Callable[[Any], Any]
    targets: Mapping[str, Tensor] | None
    calls: LoaderCalls


def engine(shapes: Mapping[str, torch.Size]) -> Loader:
    """Return a loader that copies each tensor into a view of a parameter, which it finds by name."""
    parameters: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        named = {"gate_up_proj": f"{path}.w13_weight", "down_proj": f"{path}.w2_weight"}.get(leaf, name)
        parameters[named] = torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            match = _EXPERT.fullmatch(name)
            if match is None:
                parameters[name].copy_(weight)
                continue
            path, expert, part = match.groups()
            if part == "down_proj":
                parameters[f"{path}.w2_weight"][int(expert)].copy_(weight)
            else:
                rows = weight.shape[0]
                start = 0 if part == "gate_proj" else rows
                parameters[f"{path}.w13_weight"][int(expert)].narrow(0, start, rows).copy_(weight)

    return Loader(load_weights, parameters, "pairs")


def adapter(shapes: Mapping[str, torch.Size]) -> Loader:
    """Return a loader that returns grouped experts of shape [E, H, 2I] and [E, I, H]."""

    def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        native = {}
        for name, shape in shapes.items():
            path, _, leaf = name.rpartition(".")
            if leaf not in ("gate_up_proj", "down_proj"):
                native[name] = tensors[name]
                continue
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            stacked = [
                torch.stack([tensors[f"{path}.{expert}.{part}.weight"].t() for expert in range(shape[0])])
                for part in parts
            ]
            native[name] = torch.cat(stacked, dim=-1)
        return native

    return Loader(from_hf, None, "dict")


def run_shape(shape: Shape, directory: str, repetitions: int) -> dict[str, Any]:
    """Return lists of seconds by loader and stage."""
    write_sparse_checkpoint(shape, directory)
    model = meta_model(shape)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    specs = checkpoint_tensors(shape, model)
    checkpoint = amc.open_checkpoint(directory)
    given = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
    seconds: dict[str, dict[str, list[float]]] = {}
    for make in (engine, adapter):
        stages = _stages(make(shapes), checkpoint, directory, given)
        timed = seconds[make.__name__] = {stage: [] for stage in stages}
        for repetition in range(repetitions):
            for stage in measure.shuffled(list(stages), repetition):
                gc.collect()
                start = time.perf_counter()
                made = stages[stage]()
                timed[stage].append(time.perf_counter() - start)
                del made
    return {"shape": shape.name, "source": shape.source, "keys": shape.keys, "seconds": seconds}


def _stages(
    loader: Loader, checkpoint: amc.Checkpoint, directory: str, given: Mapping[str, Tensor]
) -> dict[str, Callable[[], Any]]:
    """Return the stages by name; keep the trace in a directory.

    Raises:
        RuntimeError: the plan does not use all tensors, or the trace is not kept.
    """
    load, targets, calls = loader
    sources = SourceTable.from_checkpoint(checkpoint)
    trace = traced(load, sources, targets, calls, lambda rows: [])
    if trace.computed or trace.plan.unused_sources:
        raise RuntimeError(f"the plan of {load.__name__} does not use all {len(given)} tensors")
    keep_trace(directory, digest_of(load, sources, targets, calls, "benchmark"), targets, trace)

    def kept() -> Any:
        read = kept_trace(directory, digest_of(load, sources, targets, calls, "benchmark"), targets)
        if read is None:
            raise RuntimeError(f"the trace of {load.__name__} was not kept")
        return read

    return {
        "loader": lambda: load(iter(given.items()) if calls == "pairs" else dict(given)),
        "trace": lambda: trace_loader(load, checkpoint, targets, calls=calls),
        "kept": kept,
    }


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="microseconds per tensor: median (20th-80th percentile)", title_justify="left")
    shown.add_column("checkpoint")
    shown.add_column("loader")
    for title in ("loader alone", "trace", "trace, seconds", "kept"):
        shown.add_column(title, justify="right")
    for result in results:
        label, scale = f"{result['shape']}: {result['keys']:,} tensors", 1e6 / result["keys"]
        for loader, timed in result["seconds"].items():
            alone, trace, kept = (measure.spread(timed[stage]).text(scale, 1) for stage in ("loader", "trace", "kept"))
            shown.add_row(label, loader, alone, trace, f"{statistics.median(timed['trace']):.2f}", kept)
            label = ""
        shown.add_section()
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("tracing", __doc__, repetitions=7, room="200 MB")
    parser.add_argument("--size", choices=SIZES, default="full")
    given = parser.parse_args(arguments)
    environment = measure.environment()
    results = []
    for shape in SIZES[given.size]:
        with tempfile.TemporaryDirectory(dir=given.directory) as directory:
            show(f"  {shape.name}: {shape.keys:,} tensors", err=True)
            results.append(run_shape(shape, directory, given.repetitions))
    show_environment(environment)
    show(table(results))
    measure.write_json(given.json, {"environment": environment, "results": results})


if __name__ == "__main__":
    main()
