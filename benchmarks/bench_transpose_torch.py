"""CPU transposes against plain copies: ``python -m benchmarks.bench_transpose_torch``.

GB/s counts payload: bytes of the source matrices by wall time. Every line's ways take turns in one
run; the median is printed, with its ratio to ``copy_`` of the same bytes into the same buffer size
without a transposition, under the same number of threads. Memory is touched before timing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.kernels.strided_copy import strided_copy_torch

ROUNDS = 7
PAYLOAD_BYTES = 64 << 20

# I, H: Qwen3-30B-A3B, Qwen3-235B-A22B, DeepSeek-V3, and a shape that nothing divides.
SHAPES = [(768, 2048), (1536, 4096), (2048, 7168), (767, 2047)]


class Case(NamedTuple):
    """Buffers of one measurement, and what each expert pair does with them under each name."""

    name: str
    pairs: int
    nbytes: int
    ways: dict[str, Callable[[int], object]]


def case(intermediate: int, hidden: int, src_dtype: torch.dtype, dst_dtype: torch.dtype) -> Case:
    """Gate and up of each expert into its [H, 2I], halves and interleaved."""
    pair_bytes = 2 * intermediate * hidden * src_dtype.itemsize
    pairs = max(2, PAYLOAD_BYTES // pair_bytes // 2 * 2)
    shape = (pairs, 2, intermediate, hidden)
    src = torch.randint(-100, 100, shape, dtype=torch.int16).to(src_dtype)
    dst = torch.ones(pairs, hidden, 2 * intermediate, dtype=dst_dtype)
    grouped = dst.view(pairs, 2, intermediate, hidden)
    halves = dst.view(pairs, hidden, 2, intermediate).permute(0, 2, 3, 1)
    interleaved = dst.view(pairs, hidden, intermediate, 2).permute(0, 3, 2, 1)

    def copy(into: Tensor) -> Callable[[int], object]:
        return lambda pair: into[pair].copy_(src[pair])

    def ours(into: Tensor) -> Callable[[int], object]:
        return lambda pair: strided_copy_torch(list(into[pair]), list(src[pair]))

    for into in (halves, interleaved):
        dst.fill_(1)
        ours(into)(0)
        if not torch.equal(into[0], src[0].to(dst_dtype)):
            raise AssertionError("a wrong transpose is not worth timing")
    arrow = "" if src_dtype == dst_dtype else f" -> {str(dst_dtype)[6:]}"
    return Case(
        f"I={intermediate} H={hidden} {str(src_dtype)[6:]}{arrow}",
        pairs,
        pairs * pair_bytes,
        {
            "plain copy_": copy(grouped),
            "copy_ to [H, 2I]": copy(halves),
            "ours to [H, 2I]": ours(halves),
            "copy_ interleaved": copy(interleaved),
            "ours interleaved": ours(interleaved),
        },
    )


def gb_per_s(case: Case, threads: int) -> dict[str, float]:
    """The median rate of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    # Without the initializer every thread of the pool would bring intra-op threads of its own.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(ROUNDS):
            for way, run in case.ways.items():
                start = time.perf_counter()
                list(pool.map(run, range(case.pairs)))
                seconds[way].append(time.perf_counter() - start)
    return {way: case.nbytes / statistics.median(taken) / 1e9 for way, taken in seconds.items()}


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, GB/s of payload")
    cases = [(*shape, torch.bfloat16, torch.bfloat16) for shape in SHAPES]
    cases += [
        (768, 2048, torch.uint8, torch.uint8),
        (768, 2048, torch.float32, torch.float32),
        (768, 2048, torch.bfloat16, torch.float32),
        (768, 2048, torch.float32, torch.bfloat16),
    ]
    for arguments in cases:
        measured = case(*arguments)
        for threads in (1, 2):
            rates = gb_per_s(measured, threads)
            plain = rates["plain copy_"]
            print(f"{measured.name}, {threads} thread{'s' * (threads > 1)}")
            for way, rate in rates.items():
                print(f"    {way:20}{rate:7.2f}  {rate / plain:5.2f} of plain", flush=True)


if __name__ == "__main__":
    main()
