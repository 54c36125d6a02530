"""Measure saves from the device to files, and a load on a stream other than the default one.

python -m benchmarks.gpu.round_trip    (a worker; a cell is one of these)
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open

import automodel_conv as amc
from automodel_conv.files import system
from benchmarks.gpu import checkpoints, loading
from benchmarks.gpu.kernels import a_cell
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.worker import Channel, serve
from benchmarks.operations import Mismatch


def save(root: str, device: torch.device) -> dict[str, Any]:
    """Save a model on the device, with grouped experts, to per-expert files, and compare them with its source.

    All earlier writes are on the disk before. ``sync_s`` is the time that the writing threads waited for the disk,
    summed over the threads. With ``--directory /dev/shm`` it is zero.

    Raises:
        Mismatch: a tensor differs; with its name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, saved = os.path.join(root, checkpoints.SHORT), os.path.join(root, "saved")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    amc.load_model(model, source, device=device)
    try:
        if device.type == "cuda":  # times are meaningless elsewhere
            os.sync()
        with _timed_sync() as sync_s:
            taken = seconds(lambda: amc.save_checkpoint(model, saved), device)
        compare(saved, source)
        nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        return {"seconds": taken, "nbytes": nbytes, "sync_s": sum(sync_s)}
    finally:
        shutil.rmtree(saved, ignore_errors=True)


@contextmanager
def _timed_sync() -> Iterator[list[float]]:
    """Record the seconds of each call of the package that waits until a file is on the disk."""
    taken: list[float] = []

    def timed(descriptor: int, sync: Callable[[int], None] = system.sync) -> None:
        start = time.perf_counter()
        sync(descriptor)
        taken.append(time.perf_counter() - start)

    with mock.patch.object(system, "sync", timed):
        yield taken


def compare(saved: str, source: str) -> None:
    """Compare all tensors of two directories, byte by byte.

    Raises:
        Mismatch: a tensor differs; with its name.
    """
    places = [{name: path for path in _files(root) for name in _names(path)} for root in (saved, source)]
    if places[0].keys() != places[1].keys():
        raise Mismatch(f"other names than those loaded: {sorted(places[0].keys() ^ places[1].keys())[:3]}")
    for path in _files(source):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                with safe_open(places[0][name], "pt") as other:
                    tensor, wanted = other.get_tensor(name), file.get_tensor(name)
                if tensor.dtype != wanted.dtype or not torch.equal(tensor.view(torch.int16), wanted.view(torch.int16)):
                    raise Mismatch(f"{name} is not what was loaded")


def _files(root: str) -> list[Path]:
    return sorted(Path(root).glob("*.safetensors"))


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return [*file.keys()]


def side_stream(root: str, device: torch.device) -> dict[str, Any]:
    """Compare a load on another stream with a load on the default stream.

    Raises:
        Mismatch: the tensors differ.
    """
    directory = os.path.join(root, checkpoints.SHORT)
    wanted = loading.digest(loading.load_ours(directory, device, layout="nemo")[0])
    with _on_side_stream(device):
        digests: list[str] = []
        taken = seconds(
            lambda: digests.append(loading.digest(loading.load_ours(directory, device, layout="nemo")[0])), device
        )
    if digests[0] != wanted:
        raise Mismatch("a load on a side stream does not produce the tensors of one on the default stream")
    return {"seconds": taken}


def _on_side_stream(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


CELLS = {"save from the device": save, "load on a side stream": side_stream}


def work(order: Mapping[str, Any], channel: Channel) -> None:
    device = torch.device(order["device"])
    for cell in order["cells"]:
        channel.begin(cell)
        with a_cell(cell, device, channel):
            channel.row(cell, **CELLS[cell](order["root"], device))


if __name__ == "__main__":
    serve(work)
