"""Measure loads from files in the page cache to tensors on the device, of this package and of others.

    python -m benchmarks.gpu.loading    (a worker; a cell is a load of a checkpoint in one way)

A process first loads a tiny checkpoint in the same way, so that imports, the device's context and the compilation of
kernels are not timed. It then pins as much memory as the load will and frees it, which is timed separately. The time of
a load runs from the call until the device is idle: the first load, and some repetitions in the same process. Memory is
the peak of torch's allocator during the first. A cold load is the first of its process and compiles its kernels.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import automodel_conv as amc
from automodel_conv.execution.device import ring_of
from benchmarks.gpu import checkpoints
from benchmarks.gpu.kernels import a_cell
from benchmarks.gpu.timing import pinned, seconds
from benchmarks.gpu.worker import Channel, serve

_MIB = 1 << 20
_AGAIN = 2
_BLOCK = 128
_PIECE_ELEMENTS = 16 << 20
_ODD = 0x9E3779B1

Loaded = tuple[dict[str, Tensor], dict[str, Any]]
Load = Callable[[str, torch.device], Loaded]


def load_ours(
    directory: str,
    device: torch.device,
    *,
    layout: str = "transformers",
    threads: int | None = None,
    scratch_bytes: int | None = None,
) -> Loaded:
    loaded = amc.load_state_dict(directory, layout=layout, device=device, threads=threads, scratch_bytes=scratch_bytes)
    names = {
        name: name.replace("gate_and_up_projs", "gate_up_proj").replace("down_projs", "down_proj") for name in loaded
    }
    detail = {
        **loaded.report.seconds,
        "copied_by_kernels": loaded.report.copied_by_kernels,
        "copied_by_torch": loaded.report.copied_by_torch,
        "without_kernels": loaded.report.without_kernels,
    }
    return {names[name]: tensor for name, tensor in loaded.items()}, detail


def load_transformers(directory: str, device: torch.device) -> Loaded:
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_accelerate_available, logging

    logging.disable_progress_bar()
    if is_accelerate_available():
        model = AutoModelForCausalLM.from_pretrained(directory, device_map=str(device))
        return model.state_dict(), {"how": "device_map"}
    model = AutoModelForCausalLM.from_pretrained(directory).to(device)
    return model.state_dict(), {"how": "to the CPU, then to the device: device_map needs accelerate"}


def load_safetensors(directory: str, device: torch.device, *, transposed: bool) -> Loaded:
    """Load with the usual code: files by ``load_file``, experts by stack and cat; FP8 is decoded per expert first."""
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        stored |= load_file(path, device=str(device))
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        stored[name.removesuffix("_scale_inv")] = _product(stored[name.removesuffix("_scale_inv")], stored.pop(name))
    tensors = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for prefix in sorted({name.partition(".experts.")[0] for name in stored if ".experts." in name}):
        count = len([name for name in stored if name.startswith(f"{prefix}.experts.") and ".down_proj." in name])
        gate, up, down = (
            torch.stack([stored.pop(f"{prefix}.experts.{e}.{part}.weight") for e in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        both = torch.cat([gate, up], 1)
        del gate, up
        tensors[f"{prefix}.experts.gate_up_proj"] = both.transpose(1, 2).contiguous() if transposed else both
        tensors[f"{prefix}.experts.down_proj"] = down.transpose(1, 2).contiguous() if transposed else down
    return tensors, {}


def _product(codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = codes.shape
    wide = scales.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
    return (codes.float() * wide).to(torch.bfloat16)


class Loading(NamedTuple):
    """A load to be timed.

    ``scratch_bytes``: pinned memory that it uses, 0 for none. ``group``: loads of one group share a process.
    """

    checkpoint: str
    load: Load
    transposed: bool = False
    scratch_bytes: int = 0
    is_cold: bool = False
    group: str = ""

    @property
    def warm_up(self) -> str:
        return checkpoints.WARM_UP_FP8 if self.checkpoint == checkpoints.FP8 else checkpoints.WARM_UP

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the checkpoints that it needs."""
        return (self.checkpoint,) if self.is_cold else (self.warm_up, self.checkpoint)


THREADS = (8, 4, 16)
SCRATCH_MIB = (64, 128, 256)
PLAIN = "load_file, stack, cat"


def loadings(smoke: bool) -> dict[str, Loading]:
    """Return all loads by name, the most informative first.

    The first of the loads that produce the same tensors is the reference for the others.
    """
    short, long, fp8 = checkpoints.SHORT, checkpoints.LONG, checkpoints.FP8
    ring = ring_of(None, None).nbytes
    plain = partial(load_safetensors, transposed=False)
    turned = partial(load_safetensors, transposed=True)
    nemo = partial(load_ours, layout="nemo")
    made = {
        PLAIN: Loading(short, plain, group="plain"),
        f"{PLAIN}, transpose": Loading(short, turned, transposed=True, group="plain"),
        f"fp8: {PLAIN}": Loading(fp8, plain, group="plain"),
        "ours": Loading(short, load_ours, scratch_bytes=ring),
        "fp8: ours": Loading(fp8, load_ours, scratch_bytes=ring),
        "ours, nemo": Loading(short, nemo, transposed=True, scratch_bytes=ring),
        "ours, long": Loading(long, load_ours, scratch_bytes=ring),
    }
    for mib in SCRATCH_MIB[:1] if smoke else SCRATCH_MIB:
        for threads in THREADS[:2] if smoke else THREADS:
            load = partial(load_ours, threads=threads, scratch_bytes=mib * _MIB)
            made[f"ours, {threads} threads, {mib} MiB"] = Loading(long, load, scratch_bytes=mib * _MIB, group="grid")
    made |= {
        "ours, nemo, long": Loading(long, nemo, transposed=True, scratch_bytes=ring),
        "from_pretrained": Loading(short, load_transformers),
        # Transposed, so that the load compiles a kernel.
        "ours, nemo, cold": Loading(short, nemo, transposed=True, is_cold=True),
    }
    if smoke:  # starting a process for each takes most of the time
        made = {name: one if one.is_cold else one._replace(group="all") for name, one in made.items()}
    return made


def timed(loading: Loading, root: str, device: torch.device) -> dict[str, Any]:
    """Time loads in this process, and compute a digest of the first one's tensors."""
    pinned_s = None
    if not loading.is_cold:
        loading.load(os.path.join(root, loading.warm_up), device)
        pinned_s = _pin(loading.scratch_bytes, device)
        if device.type == "cuda":
            # A cold process has no cache to empty, and torch refuses to before CUDA is initialized.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    taken, (tensors, detail) = _once(loading, root, device)
    row = {
        "checkpoint": loading.checkpoint,
        "transposed": loading.transposed,
        "seconds": taken,
        "pinned_s": pinned_s,
        "detail": detail,
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "digest": digest(tensors),
        "again_s": [],
    }
    del tensors
    for _ in range(0 if loading.is_cold else _AGAIN):
        gc.collect()  # models have reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row["again_s"].append(_once(loading, root, device)[0])
    return row


def _once(loading: Loading, root: str, device: torch.device) -> tuple[float, Loaded]:
    made: list[Loaded] = []
    directory = os.path.join(root, loading.checkpoint)
    taken = seconds(lambda: made.append(loading.load(directory, device)), device)
    return taken, made[0]


def _pin(nbytes: int, device: torch.device) -> float | None:
    """Return the seconds to allocate pinned memory.

    torch keeps it for the next allocation of the same size.
    """
    return seconds(lambda: pinned(nbytes, device), device) if nbytes and device.type == "cuda" else None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and all bytes with their positions, summed quickly on the tensors' device."""
    result = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for piece in tensor.contiguous().view(-1).view(torch.int16).split(_PIECE_ELEMENTS):
            place = torch.arange(1, len(piece) + 1, device=piece.device)
            result.update(f" {(piece.long() * (place * _ODD | 1)).sum().item()}".encode())
    return result.hexdigest()


def mark_unequal(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of loads with other tensors than the first load of their kind, each with the error."""
    first: dict[tuple[str, bool], dict[str, Any]] = {}
    marked = []
    for row in rows:
        if "digest" in row:
            of = first.setdefault((row["checkpoint"], row["transposed"]), row)
            if row["digest"] != of["digest"]:
                marked.append({**row, "wrong": {"load": f"not the tensors that {of['cell']!r} made"}})
    return marked


def work(order: Mapping[str, Any], channel: Channel) -> None:
    device = torch.device(order["device"])
    known = loadings(order["smoke"])
    for cell in order["cells"]:
        channel.begin(cell)
        with a_cell(cell, device, channel):
            channel.row(cell, **timed(known[cell], order["root"], device))


if __name__ == "__main__":
    serve(work)
