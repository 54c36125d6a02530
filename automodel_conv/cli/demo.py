"""A comparison of transformers and this package: both load the same checkpoint.

One process imports transformers (``demo_process``). It starts a new process for every step: one that writes the
checkpoint, then one for each load. This module starts the first process, shows its progress and collects its results.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from automodel_conv.errors import ConversionError, UnsupportedError, message, size_text
from automodel_conv.files.write_errors import write_errors
from automodel_conv.pictures.page import FilePath, write_page

METHODS = ("transformers", "automodel_conv")
RUNS = 3


@dataclass(frozen=True)
class DemoModel:
    """The sizes of a Qwen3-MoE model."""

    layers: int
    experts: int
    hidden_size: int
    intermediate_size: int
    shard_size: str


BIG = DemoModel(layers=2, experts=64, hidden_size=2048, intermediate_size=640, shard_size="300MB")
TINY = DemoModel(layers=2, experts=3, hidden_size=64, intermediate_size=32, shard_size="20KB")


@dataclass(frozen=True)
class DemoLoad:
    """Loads with one method: median time, peak memory above the level before the load, and a digest of every tensor."""

    seconds: float
    anonymous_bytes: int | None
    resident_bytes: int | None
    digests: Mapping[str, str]


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    The demo has removed its files.
    """

    versions: Mapping[str, str]
    """Versions of the two packages."""
    file_bytes: int
    loads: Mapping[str, DemoLoad]
    different: tuple[str, ...]
    """Names of the tensors that are not equal in every byte."""


def run_demo(
    model: DemoModel = BIG,
    directory: str | None = None,
    show: Callable[[str], None] = lambda line: None,
    html: FilePath | None = None,
) -> DemoResult:
    """Write a checkpoint with transformers, load it with both packages, and compare all bytes of all tensors.

    Args:
        model: sizes of the model.
        directory: where to create a temporary directory, which is removed; None: the system's default.
        show: called with each line of progress.
        html: file for the page of the plan, which stays; None: no page.

    Raises:
        UnsupportedError: transformers is not installed.
        WriteError: the temporary directory cannot be created, or the page cannot be written.
        ConversionError: a step failed; the error has the end of its output.
    """
    parent = tempfile.gettempdir() if directory is None else directory
    with write_errors(parent):
        temporary = tempfile.TemporaryDirectory(prefix="automodel-conv-demo-", dir=parent)
    with temporary as root, closing(_events(model, root, RUNS)) as events:
        show("importing PyTorch and transformers ...")
        versions = next(events)
        show(f"writing a checkpoint of {model.layers} layers with {model.experts} experts each ...")
        written = next(events)
        show(
            f"{written['tensors']} tensors in {written['files']} files, {size_text(written['bytes'])}, "
            f"written with transformers in {written['seconds']:.0f} s to {written['directory']}"
        )
        if html is not None:
            with write_errors(str(html), "the page"):
                write_page(html, written["page"])
            show(f"its plan, to look at in a browser: {html}")
        show(f"loading it {RUNS} times with each package, every time in a new process ...")
        runs: dict[str, list[DemoLoad]] = {method: [] for method in METHODS}
        for event in events:
            load = DemoLoad(**event["load"])
            runs[event["method"]].append(load)
            show(f"  {event['method']:14} {load.seconds:6.2f} s")
    loads = {method: _merged(of_method) for method, of_method in runs.items()}
    first, second = (loads[method].digests for method in METHODS)
    different = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return DemoResult(versions, written["bytes"], loads, tuple(different))


def _merged(runs: Sequence[DemoLoad]) -> DemoLoad:
    """Merge the runs of one method into one; a tensor's digest joins those of all runs."""
    names = {name: None for run in runs for name in run.digests}
    return DemoLoad(
        statistics.median(run.seconds for run in runs),
        max((run.anonymous_bytes for run in runs if run.anonymous_bytes is not None), default=None),
        max((run.resident_bytes for run in runs if run.resident_bytes is not None), default=None),
        {name: " ".join(run.digests.get(name, "none") for run in runs) for name in names},
    )


def _events(model: DemoModel, root: str, runs: int) -> Generator[dict[str, Any], None, None]:
    """Run the steps in another process, and yield the JSON object that it writes after each.

    Its output is shown only if it fails. Packages that transformers imports may print, as torchao does if it was built
    for another release of torch.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "automodel_conv.cli.demo_process", json.dumps(asdict(model)), root]
    with tempfile.TemporaryFile("w+", errors="replace") as log, open(reader) as events:
        with open(writer):
            process = subprocess.Popen(
                [*command, str(runs), str(writer)],
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            for line in events:
                event = json.loads(line)
                if "unsupported" in event:
                    raise UnsupportedError(
                        message(event["unsupported"], do="pip install 'automodel-conv[transformers]'")
                    )
                yield event
        except BaseException:  # a signal or an error of the caller too: no process must write to a removed directory
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            process.wait()
        if process.returncode:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            output = f"exit status {process.returncode}\n{log.read()}"
            do = "free memory and disk space: it needs 4 GB of memory and 1 GB in the temporary directory"
            raise ConversionError(message("a step of the demo failed", found=output, do=do))
