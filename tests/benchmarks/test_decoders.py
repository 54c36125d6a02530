"""Tests of candidate decoders: they write the same bytes as torch in the interpreter, and compile without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import measure
from benchmarks.gpu.candidates import CANDIDATES, DECODERS, patched
from benchmarks.gpu.decoders import KERNELS
from benchmarks.operations import Experts
from benchmarks.quantized import QUANTIZED

CPU = torch.device("cpu")
# More than one tile in each direction, the last ones partial, and blocks of scales that begin within tiles.
SIZE = Experts("small", 1, 72, 336)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_candidates_write_the_same_bytes_as_torch(kind):
    case = QUANTIZED[kind](SIZE, CPU)
    for candidate in CANDIDATES:
        if kind in candidate.operations:
            with patched(candidate):
                case.verify(candidate.name, case.ways()["ours"])


def test_table_has_every_decoder():
    assert set(DECODERS) == set(KERNELS)


COMPILED = """
import json
from automodel_conv.kernels.dequantize import DEQUANTIZE_TILES, DequantizeConstants
from automodel_conv.kernels.variants import Variant
from benchmarks.gpu.decoders import KERNELS
from tests.machine_code.compiled import compiled, read

variants = {
    (bits, is_transposed): Variant(
        DEQUANTIZE_TILES, "uint8", "uint16", bits, 8, *((32, 16 * bits) if is_transposed else (16, 32 * bits)),
        details=DequantizeConstants(bits, row, True, is_transposed, False),
    )
    for bits, row in ((8, "int32"), (4, "uint8"))
    for is_transposed in (False, True)
}
made = {
    (name, *key): compiled(instead.kernel, DEQUANTIZE_TILES.constants(variant) | instead.constants, 90)
    for name, instead in KERNELS.items()
    for key, variant in variants.items()
}
codes = read([*made.values()], 90)
print(json.dumps([(key, code.local, code.barriers, code.instructions, code.stores) for key, code in zip(made, codes)]))
"""


def test_candidates_compile_for_a_gpu_without_spills_and_with_wide_stores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=measure.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (name, bits, is_transposed), local, barriers, instructions, stores in json.loads(done.stdout):
        assert (local, stores) == (0, {"16": 4}), (name, bits, is_transposed, instructions)
        if name != "in two dimensions":
            assert barriers == is_transposed, (name, bits, is_transposed)
