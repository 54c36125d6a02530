"""Measure the candidates of ``benchmarks.gpu.candidates`` against the kernels as they are.

    python -m benchmarks.gpu.sweep    (a worker; a cell is a candidate at an operation on a layer)

A first stage compiles all candidates, in several processes at once, into Triton's cache, by a call on a small part of a
layer. The second stage times them one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.candidates import CANDIDATES, Candidate, patched
from benchmarks.gpu.timing import median_ms, seconds
from benchmarks.gpu.worker import Channel, serve
from benchmarks.operations import Experts

LAYERS = kernels.LAYERS[:2]
# Sizes for the compilation: the same alignments and row lengths as a whole layer.
_LITTLE = {"experts": 1, "intermediate": 128}


class Cell(NamedTuple):
    layer: Experts
    operation: str
    candidate: Candidate


def cells(smoke: bool) -> dict[str, Cell]:
    """Return all cells by name.

    Candidates at the same operation on the same layer follow one another.

    A candidate that needs a process of its own is tried on the first layer only, since the process takes most of the
    time.

    Args:
        smoke: try each candidate at one operation only, and only one candidate that needs a process of its own.
    """
    alone = [candidate for candidate in CANDIDATES if candidate.own_process][: 1 if smoke else None]
    layers = kernels.SMOKE_LAYERS[:1] if smoke else LAYERS
    return {
        f"{layer.name}: {operation}: {candidate.name}": Cell(layer, operation, candidate)
        for layer in layers
        for operation in dict.fromkeys(name for candidate in CANDIDATES for name in candidate.operations)
        for candidate in CANDIDATES
        if operation in candidate.operations[: 1 if smoke else None]
        and (not candidate.own_process or (candidate in alone and layer is layers[0]))
    }


def work(order: Mapping[str, Any], channel: Channel) -> None:
    device = torch.device(order["device"])
    known = cells(order["smoke"])
    made = _Buffers(device)
    for name in order["cells"]:
        channel.begin(name)
        with kernels.a_cell(name, device, channel):
            cell = known[name]
            if order["compiles_only"]:
                channel.row(name, seconds=_compile(cell, device, order["smoke"]))
            else:
                without = order["without"].get(name)
                channel.row(name, **_row(cell), **made.measure(cell, channel, without))


def _compile(cell: Cell, device: torch.device, smoke: bool) -> float:
    """Return the seconds of the first call."""
    layer = cell.layer if smoke else cell.layer._replace(**_LITTLE)
    case = kernels.make_case(cell.operation, layer, device)
    with patched(cell.candidate):
        return seconds(kernels.ways(case)["ours"](), device)


def _row(cell: Cell) -> dict[str, Any]:
    return {**kernels.described(cell.layer), "operation": cell.operation, "candidate": cell.candidate.name}


class _Buffers:
    """Buffers of one operation on one layer, and the time of ``copy_`` of the same bytes, for all its candidates."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of: tuple[Experts, str] | None = None

    def measure(self, cell: Cell, channel: Channel, without: Mapping[str, str] | None) -> dict[str, Any]:
        attempts = kernels.Attempts(self._device, channel, without or {})
        if self._of != (cell.layer, cell.operation):
            self._of = self._case = None
            self._case = kernels.make_case(cell.operation, cell.layer, self._device)
            self._roof = median_ms(kernels.copy(self._case.bytes_moved, self._device), self._device)
            self._of = cell.layer, cell.operation
        case, ms = self._case, {"copy_": self._roof}
        if attempts.is_sound("ours"):
            with attempts.of("ours"), patched(cell.candidate):
                ours = kernels.ways(case)["ours"]()
                case.verify(cell.candidate.name, ours)
                ms["ours"] = median_ms(ours, self._device)
        problems = {"wrong": attempts.wrong, "failed": attempts.failed}
        return {"bytes_moved": case.bytes_moved, "ms": ms, **problems}


if __name__ == "__main__":
    serve(work)
