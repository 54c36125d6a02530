"""The process that ``benchmarks/executing.py`` times.

It runs on any checkout, through public functions.

    PYTHONPATH=CHECKOUT python benchmarks/executing_worker.py CASE FILE LAYERS ROUNDS

It opens and plans, allocates all memory, and loads once, compared bit by bit with the floor. Then rounds of a load and
the floor alternate. It prints JSON: seconds of the processor in this thread, by part.

The floor is the cost of the bytes: ``os.preadv`` of the same file in pieces, straight into place if bytes only move, or
into a scratch from which numpy copies to their places.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import automodel_conv as amc

EXPERTS, SIDE = 128, 32
PARTS = ("gate_proj", "up_proj", "down_proj")
_PIECE_EXPERTS = EXPERTS * 2  # 1.5 MiB, which stay in the cache from the read to the copy
_PREFIX = "model.layers.{}.mlp.experts"


def write_file(path: str, layers: int) -> None:
    """Write one file of ``layers`` x 128 experts x 3 matrices [32, 32] in bfloat16, in the order of the model."""
    names = [
        f"{_PREFIX.format(layer)}.{e}.{part}.weight"
        for layer in range(layers)
        for e in range(EXPERTS)
        for part in PARTS
    ]
    nbytes = SIDE * SIDE * 2
    header = {
        name: {"dtype": "BF16", "shape": [SIDE, SIDE], "data_offsets": [at * nbytes, (at + 1) * nbytes]}
        for at, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(np.random.default_rng(0).bytes(len(names) * nbytes))


def _rules() -> list[Any]:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    gate, up, down = (f"mlp.experts.*.{part}.weight" for part in PARTS)
    return [
        WeightConverter([gate, up], "mlp.experts.gate_up_proj", [MergeModulelist(0), Concatenate(1)]),
        WeightConverter(down, "mlp.experts.down_proj", [MergeModulelist(0)]),
    ]


# The planning options of each case.
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "each its own": lambda: {"rules": []},
    "grouped": lambda: {"rules": _rules()},
    "grouped, transposed": lambda: {"rules": _rules(), "layout": "nemo"},
}


class Floor:
    """The same bytes by ``os.preadv`` and numpy, in memory of its own."""

    def __init__(self, case: str, path: str, layers: int):
        self._fd = os.open(path, os.O_RDONLY)
        count = layers * EXPERTS
        self._start = os.fstat(self._fd).st_size - count * len(PARTS) * SIDE * SIDE * 2
        scratch = np.zeros((_PIECE_EXPERTS, len(PARTS), SIDE, SIDE), np.int16)
        wide = (SIDE, 2 * SIDE) if "transposed" in case else (2 * SIDE, SIDE)
        self.in_order = np.zeros((count, len(PARTS), SIDE, SIDE), np.int16)
        self.gate_up, self.down = np.zeros((count, *wide), np.int16), np.zeros((count, SIDE, SIDE), np.int16)
        self._case, self._scratch = case, scratch

    def run(self) -> None:
        for first in range(0, len(self.in_order), _PIECE_EXPERTS):
            piece = slice(first, first + _PIECE_EXPERTS)
            if self._case == "each its own":
                self._read(self.in_order[piece], first)
            else:
                read = self._read(self._scratch[: len(self.in_order[piece])], first)
                self._copy(read, self.gate_up[piece], self.down[piece])

    def _read(self, into: np.ndarray, first: int) -> np.ndarray:
        view, offset = memoryview(into).cast("B"), self._start + first * into[0].nbytes
        done = 0
        while done < len(view):
            done += os.preadv(self._fd, [view[done:]], offset + done)
        return into

    def _copy(self, read: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> None:
        if self._case == "grouped":
            gate_up.reshape(-1, 2, SIDE, SIDE)[:] = read[:, :2]
            down[:] = read[:, 2]
        else:
            gate_up.reshape(-1, SIDE, 2, SIDE)[:] = read[:, :2].transpose(0, 3, 1, 2)
            down[:] = read[:, 2].transpose(0, 2, 1)

    def expected(self, name: str) -> np.ndarray:
        """Return the correct value of a target of the plan."""
        layer, _, rest = name.removeprefix("model.layers.").partition(".mlp.experts.")
        first = int(layer) * EXPERTS
        if self._case == "each its own":
            expert, part, _ = rest.split(".")
            return self.in_order[first + int(expert), PARTS.index(part)]
        return (self.down if "down" in rest else self.gate_up)[first : first + EXPERTS]


def module_of(plan: Any) -> nn.Module:
    """Return a module with the targets of a plan as parameters, in memory that has been touched."""
    root = nn.Module()
    for target in plan.targets:
        *path, leaf = target.name.split(".")
        at = root
        for name in path:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        poison = torch.full(target.shape, -1, dtype=torch.int16).view(torch.bfloat16)
        at.register_parameter(leaf, nn.Parameter(poison, requires_grad=False))
    return root


@contextmanager
def _schedule_timed(seconds: list[float]) -> Iterator[None]:
    """Add up the seconds of scheduling, if the checkout has it under this name."""
    try:
        from automodel_conv.execution import host
    except ImportError:
        yield
        return
    stock = host.schedule

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        jobs = stock(*args, **kwargs)
        seconds.append(time.thread_time() - start)
        return jobs

    with mock.patch.object(host, "schedule", timed):
        yield


def work(case: str, path: str, layers: int, rounds: int) -> dict[str, Any]:
    """Run all rounds of a case in this process.

    Raises:
        RuntimeError: the load and the floor do not produce the same bytes.
    """
    plan = amc.compile_plan(path, **CASES[case]())
    model, floor = module_of(plan), Floor(case, path, layers)
    seconds: dict[str, list[float]] = {"load": [], "schedule": [], "floor": []}

    def load() -> float:
        return amc.load_model(model, path, plan=plan, threads=1).seconds["read"]

    def bytes_only() -> float:
        start = time.thread_time()
        floor.run()
        return time.thread_time() - start

    with ExitStack() as stack:
        # A report's seconds are differences of this clock. Here it is the processor time of this thread, which reads.
        stack.enter_context(mock.patch.object(time, "perf_counter", time.thread_time))
        load(), bytes_only()
        for name, tensor in model.state_dict().items():
            if not np.array_equal(tensor.view(torch.int16).numpy(), floor.expected(name)):
                raise RuntimeError(f"{case}: {name} is not what the floor makes")
        stack.enter_context(_schedule_timed(seconds["schedule"]))
        for number in range(rounds):
            for kind in ("load", "floor") if number % 2 else ("floor", "load"):
                gc.collect()
                seconds[kind].append(load() if kind == "load" else bytes_only())
    return {"package": os.path.dirname(amc.__file__), "tensors": layers * EXPERTS * len(PARTS), "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("path")
    parser.add_argument("layers", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--repetition", type=int, default=0, help="passed by the parent process; no effect")
    options = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(work(options.case, options.path, options.layers, options.rounds)) + "\n")


if __name__ == "__main__":
    main()
