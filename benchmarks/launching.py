"""The host's cost of a call of a verb before its first kernel is launched, on a layer of 128 experts.

    python -m benchmarks.launching [--size full|small] [--repetitions N] [--json FILE]

Calls are those of a user, with lists of tensors: gate and up [768, 2048] and down [2048, 768] of Qwen3-30B-A3B. This
needs no GPU: the launch itself does nothing, and the table is staged in ordinary memory and copied on the host, instead
of in pinned memory and on a device. The result therefore excludes the time of CUDA to queue a copy and a launch. All
phases alternate in one process. The table has medians and 20th to 80th percentiles in microseconds. Memory of the
matrices is never touched.

``as_matrices``: checks and addresses. ``plan``: which variant moves which rows. ``upload``: the table. ``start``:
everything from the plan to the launch, including the upload. ``call``: everything, measured as a whole. ``into
stacks``: the same call with all destinations as one tensor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from automodel_conv.kernels import launch
from automodel_conv.kernels.address_table import as_matrices
from automodel_conv.kernels.deinterleave import deinterleave_launches
from automodel_conv.kernels.interleave import interleave_launches
from automodel_conv.kernels.staging import Staging
from automodel_conv.kernels.strided_copy import strided_copy_launches
from automodel_conv.kernels.transpose import transpose_launches
from benchmarks import measure, operations, options
from benchmarks.show import show, show_environment

_LAYERS = {
    "full": operations.Experts("Qwen3-30B-A3B", 128, 768, 2048),
    "small": operations.Experts("small", 4, 16, 32),
}
_PLANS: dict[str, Callable[..., launch.Launches]] = {
    "strided_copy": strided_copy_launches,
    "transpose": transpose_launches,
    "interleave": interleave_launches,
    "deinterleave": deinterleave_launches,
}


# Destinations as stacks [..., R, C].
_STACKS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "concatenate": lambda out: [out.unflatten(1, (2, -1))],
    "interleave rows": lambda out: [out.unflatten(1, (-1, 2)).transpose(1, 2)],
    "split back": lambda out: [out],
    "concatenate transposed": lambda out: [out.unflatten(2, (2, -1)).transpose(1, 2)],
    "transpose down": lambda out: [out],
    "interleave columns": lambda out: [out],
    "deinterleave columns": lambda out: [out[:, 0], out[:, 1]],
}


def _untouched(
    count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, phase_bytes: int = 0
) -> Tensor:
    return torch.empty(count, rows, columns, dtype=dtype, device=device)


def _nothing(*arguments: object) -> None:
    """Replace a launch, or a reason not to launch.

    A mock would take longer than the measured code.
    """


def _phases(name: str, case: operations.Case, stage: Staging) -> dict[str, Callable[[], object]]:
    def gather() -> list[launch.Matrices]:
        return [as_matrices("operand", operand) for operand in case.operands]

    matrices = gather()
    work = _PLANS[case.verb](*matrices)
    stacks = _STACKS[name](case.out)
    into_stacks = (*stacks, *case.operands[len(stacks) :])
    return {
        "as_matrices": gather,
        "plan": lambda: _PLANS[case.verb](*matrices),
        "upload": lambda: stage(work.table).clone(),
        "start": lambda: launch.start(work),
        "call": case.kernel,
        "into stacks": lambda: operations.KERNELS[case.verb](*into_stacks),
    }


def run(layer: operations.Experts, repetitions: int) -> dict[str, Any]:
    """Return lists of seconds by operation and phase, and the number of tensors of a call."""
    blocks = itertools.cycle([torch.zeros(1 << 17, dtype=torch.int64) for _ in range(2)])
    stage = Staging(lambda numbers: next(blocks))
    results: dict[str, Any] = {}
    with (
        mock.patch.object(operations, "random_matrices", _untouched),
        mock.patch.object(launch, "queue", _nothing),
        mock.patch.object(launch, "why_not", _nothing),
        mock.patch.object(launch, "upload", lambda table, device: stage(table).clone()),
    ):
        for name, make in operations.OPERATIONS.items():
            case = make(layer, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
            phases = _phases(name, case, stage)
            seconds: dict[str, list[float]] = {phase: [] for phase in phases}
            for repetition in range(repetitions):
                for phase in measure.shuffled(list(phases), repetition):
                    start = time.perf_counter()
                    phases[phase]()
                    seconds[phase].append(time.perf_counter() - start)
            results[name] = {"tensors": sum(map(len, case.operands)), "seconds": seconds}
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("launching", __doc__, repetitions=1000)
    parser.add_argument("--size", choices=tuple(_LAYERS), default="full")
    given = parser.parse_args(arguments)
    environment = measure.environment()
    layer = _LAYERS[given.size]
    results = run(layer, given.repetitions)
    show_environment(environment)
    columns = list(results["concatenate"]["seconds"])
    table = Table(title=f"a layer of {layer.experts} experts, microseconds", title_justify="left")
    table.add_column("operation")
    for column in ("tensors", *columns):
        table.add_column(column, justify="right")
    for name, measured in results.items():
        spreads = [measure.spread(measured["seconds"][phase]).text(1e6, 0) for phase in columns]
        table.add_row(name, str(measured["tensors"]), *spreads)
    show(table)
    measure.write_json(given.json, {"environment": environment, "layer": layer.name, "calls": results})


if __name__ == "__main__":
    main()
