"""Benchmark every verb and its twin: ``pytest benchmarks/ --benchmark-only``.

A GPU runs both. Without one, only the twins run: kernels would run in Triton's interpreter, where times are
meaningless. ``extra_info`` has the bytes moved (read and written), their rate, and the rate of ``copy_`` for the same
number of bytes on the same device in the same run. Results are verified before they are timed. On a CPU all of torch's
threads work. The loader's own threads have one each, which ``OMP_NUM_THREADS=1`` reproduces.
"""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch

from benchmarks.operations import OPERATIONS, Experts, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("kernel", "twin") if DEVICE.type == "cuda" else ("twin",)
# Experts of Qwen3-30B-A3B. A GPU gets a whole layer, which is far larger than its cache.
SIZE = Experts("Qwen3-30B-A3B", 128 if DEVICE.type == "cuda" else 12, 768, 2048)
ROUNDS = 20 if DEVICE.type == "cuda" else 7

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
DTYPES = {
    "bf16": (BF16, BF16),
    "f32": (F32, F32),
    "u8": (U8, U8),
    "bf16 to f32": (F32, BF16),
    "f32 to bf16": (BF16, F32),
}


@functools.cache
def copy_gb_per_s(bytes_moved: int) -> float:
    """Return the rate of ``copy_`` for half of the bytes, each of which is read and written."""
    src = torch.randint(0, 256, (bytes_moved // 2,), dtype=torch.uint8, device=DEVICE)
    dst = torch.empty_like(src)
    seconds = []
    for _ in range(ROUNDS + 2):
        synchronize(DEVICE)
        start = time.perf_counter()
        dst.copy_(src)
        synchronize(DEVICE)
        seconds.append(time.perf_counter() - start)
    return bytes_moved / statistics.median(seconds[2:]) / 1e9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def bench_verb(benchmark, operation, dtypes, way):
    case = OPERATIONS[operation](SIZE, *DTYPES[dtypes], DEVICE)
    run = getattr(case, way)
    case.verify(f"{operation}, {dtypes}, {way}", run)

    # A call returns when its work is queued, so the wait after it is part of the measurement. The verification waits
    # before the first round. The warm-up rounds leave memory in the state that the measured rounds see.
    def call() -> None:
        run()
        synchronize(DEVICE)

    benchmark.group = operation
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    roof = copy_gb_per_s(case.bytes_moved)
    rate = case.bytes_moved / benchmark.stats.stats.median / 1e9
    benchmark.extra_info |= {
        "bytes_moved": case.bytes_moved,
        "gb_per_s": rate,
        "copy_gb_per_s": roof,
        "copy_fraction": rate / roof,
    }
