"""The cost of names and headers: microseconds per tensor of a checkpoint, without any tensor data.

    python -m benchmarks.planning [--json FILE] [--repetitions N] [--directory DIR]
                                  [--size full|many|small]

Checkpoints have the names, shapes, headers and number of files of real ones. Their files are sparse. The stages of each
checkpoint and repetition alternate in one process, in a different order each time:

open           ``open_checkpoint``: index and all headers, read and checked.
rules          ours: transformers' rule objects of the model (``get_model_conversion_mapping``),
               copied and examined. Part of ``plan``, and also timed separately.
plan           ours: ``compile_plan(checkpoint, model)``, from names, dtypes and shapes to a
               validated plan.
upstream open  transformers' own code: it reads the index, opens each file with safetensors, and creates
               a slice object per tensor; loop and calls are those of ``_load_pretrained_model``.
upstream plan  transformers' ``convert_and_load_state_dict_in_model`` on these slices until it
               converts the first tensor: names sorted and renamed, a rule object and a deferred
               read per tensor. The first ``convert`` raises and the thread pool is off
               (HF_DEACTIVATE_ASYNC_LOAD=1), so no data is read. Its rule objects are created
               outside of the timing.

The model is on the meta device and is built outside of the timings, because both sides need it. Garbage is collected
before each timing. The time of the process on its cores is reported in addition to the time on the clock.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from rich.table import Table
from torch import nn

import automodel_conv as amc
from automodel_conv.upstream.registry import model_rules
from automodel_conv.upstream.rules import RuleSet
from benchmarks import measure, options
from benchmarks.shapes import (
    DEEPSEEK_V3,
    HALF_A_MILLION,
    ONE_LAYER,
    QWEN3_235B,
    SMALL,
    Shape,
    meta_model,
    write_sparse_checkpoint,
)
from benchmarks.show import show, show_environment

SIZES = {
    "full": (QWEN3_235B, DEEPSEEK_V3, HALF_A_MILLION, ONE_LAYER),
    "many": (HALF_A_MILLION, ONE_LAYER),
    "small": (SMALL,),
}
# With more keys transformers takes about a minute, so it runs once.
_ONCE_ABOVE_KEYS = 100_000


class _Reached(Exception):
    """Raised when transformers has processed all names and is about to convert the first tensor."""


def upstream_open(directory: str) -> dict[str, Any]:
    from safetensors import safe_open

    with open(os.path.join(directory, "model.safetensors.index.json"), encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    slices = {}
    for shard in shards:
        pointer = safe_open(os.path.join(directory, shard), framework="pt", device="cpu")
        for name in pointer.keys():
            slices[name] = pointer.get_slice(name)
    return slices


def upstream_load_config(model: nn.Module) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), dtype=model.dtype)


def upstream_plan(model: nn.Module, slices: dict[str, Any], load_config: Any) -> None:
    """Run transformers' mapping until it would convert the first tensor.

    Raises:
        RuntimeError: transformers converted nothing, so that nothing was measured.
    """
    from transformers import core_model_loading as core

    classes = (core.WeightRenaming, core.WeightConverter)
    stock = [cls.convert for cls in classes]

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    for cls in classes:
        cls.convert = stop
    try:
        load = core.convert_and_load_state_dict_in_model
        older = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}  # before 5.17
        load(model, slices, load_config, **older)
    except _Reached:
        return
    finally:
        for cls, convert in zip(classes, stock, strict=True):
            cls.convert = convert
    raise RuntimeError("upstream converted no tensor")


def run_shape(shape: Shape, directory: str, repetitions: int) -> dict[str, Any]:
    """Return lists of seconds by stage, for the clock and for the process."""
    write_sparse_checkpoint(shape, directory)
    model = meta_model(shape)
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint, model)
    slices = upstream_open(directory)
    if len(plan.used_sources) != shape.keys or slices.keys() != set(checkpoint.names):
        raise RuntimeError(f"{shape.name}: the plan does not use all {shape.keys} tensors")
    del plan
    load_configs: list[Any] = []
    stages: dict[str, Callable[[], Any]] = {
        "open": lambda: amc.open_checkpoint(directory),
        "upstream open": lambda: upstream_open(directory),
        "rules": lambda: RuleSet(model_rules(model), model),
        "plan": lambda: amc.compile_plan(checkpoint, model),
        "upstream plan": lambda: upstream_plan(model, slices, load_configs.pop()),
    }
    wall: dict[str, list[float]] = {stage: [] for stage in stages}
    cpu: dict[str, list[float]] = {stage: [] for stage in stages}
    for repetition in range(repetitions):
        for stage in measure.shuffled(list(stages), repetition):
            if stage == "upstream plan":
                if repetition and shape.keys > _ONCE_ABOVE_KEYS:
                    continue
                load_configs.append(upstream_load_config(model))
            gc.collect()
            start, start_cpu = time.perf_counter(), time.process_time()
            made = stages[stage]()
            stop, stop_cpu = time.perf_counter(), time.process_time()
            del made
            wall[stage].append(stop - start)
            cpu[stage].append(stop_cpu - start_cpu)
    return {
        "shape": shape.name,
        "source": shape.source,
        "keys": shape.keys,
        "files": shape.files,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
    }


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="microseconds per tensor: median (20th-80th percentile)", title_justify="left")
    shown.add_column("checkpoint")
    shown.add_column("stage")
    for title in ("seconds", "us per tensor", "us of CPU", "upstream / ours"):
        shown.add_column(title, justify="right")
    for result in results:
        median = {stage: statistics.median(times) for stage, times in result["wall_seconds"].items()}
        label = f"{result['shape']}: {result['keys']:,} tensors, {result['files']} files"
        for stage, times in result["wall_seconds"].items():
            ours = stage.removeprefix("upstream ")
            shown.add_row(
                label,
                stage,
                f"{median[stage]:.3f}",
                measure.spread(times).text(1e6 / result["keys"], 1),
                measure.spread(result["cpu_seconds"][stage]).text(1e6 / result["keys"], 1),
                f"{median[stage] / median[ours]:.1f}x" if ours != stage else "",
            )
            label = ""
        both = median["open"] + median["plan"]
        upstream = median["upstream open"] + median["upstream plan"]
        per_key = 1e6 / result["keys"]
        shown.add_row("", "open + plan", f"{both:.3f}", f"{both * per_key:.1f}")
        shown.add_row(
            "",
            "upstream, both",
            f"{upstream:.3f}",
            f"{upstream * per_key:.1f}",
            "",
            f"{upstream / both:.1f}x",
        )
        shown.add_section()
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("planning", __doc__, repetitions=7, room="200 MB")
    parser.add_argument("--size", choices=SIZES, default="full")
    given = parser.parse_args(arguments)

    from transformers.utils import logging

    logging.disable_progress_bar()
    environment = measure.environment()
    results = []
    for shape in SIZES[given.size]:
        with (
            tempfile.TemporaryDirectory(dir=given.directory) as directory,
            mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
        ):
            show(f"  {shape.name}: {shape.keys:,} tensors", err=True)
            results.append(run_shape(shape, directory, given.repetitions))
    show_environment(environment)
    show(table(results))
    measure.write_json(given.json, {"environment": environment, "results": results})


if __name__ == "__main__":
    main()
