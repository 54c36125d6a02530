"""A count of what ``launch`` compiles on a driver without a GPU, and a check that it is the code checked elsewhere.

Run as a module: ``python -m tests.machine_code.launched``.
"""

from __future__ import annotations

import json
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from automodel_conv.kernels import launch
from tests.machine_code.compiled import compiled
from tests.machine_code.planted import VARIANT

INTEGERS = ((1, 1, 1, 1), (16, 32, 48, 64), (3, 5, 7, 0), (2**30, 2**27, 2**18, 2**19))


class NoGpu:
    """The part of a driver that Triton needs to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(NoGpu())  # type: ignore[arg-type]
    run, compilations = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        compilations.append(run(self, *args, grid=grid, warmup=True, **options))

    table = torch.zeros(8, dtype=torch.int64)
    with mock.patch.object(JITFunction, "run", compile_only):
        for start in (0, 1, 2):  # tables at several alignments
            for integers in INTEGERS:
                launch.queue(VARIANT, (1, 1), table[start:], integers)
    checked = compiled(VARIANT.kernel.function, VARIANT.kernel.constants(VARIANT), 90)
    report = {
        "launches": len(compilations),
        "compilations": len(set(map(id, compilations))),
        "as checked": compilations[0].asm["cubin"] == checked,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
