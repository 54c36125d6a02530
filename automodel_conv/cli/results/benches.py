"""The results of ``bench`` and ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from automodel_conv.cli.results.loads import Pages, pages_of
from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.cli.bench import Bench
    from automodel_conv.cli.demo import DemoResult
    from automodel_conv.cli.remote_bench import RemoteBench


class LocalBench(Result, frozen=True, tag_field="kind", tag="local"):
    """The result of ``bench`` for files on this machine; medians if there are several runs."""

    files: int
    """Number of files."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of all tensors that a load reads."""
    sample_nbytes: int
    """Bytes of the sample, the tensors that were timed."""
    sample_targets: int
    """Number of targets in the sample."""
    scratch_nbytes: int
    """Bytes of the sample that are transposed, interleaved, cast or decoded."""
    open_seconds: float
    """Time to open the checkpoint."""
    plan_seconds: float
    """Time to compile the plan, without imports."""
    cached: float | None
    """Share of the sample in the page cache before the first read; null if the system cannot report it."""
    dropped: bool
    """Whether the system was asked to drop the files from the page cache first (`--cold`)."""
    first_seconds: float
    """Time of the first read of the sample."""
    roof_seconds: Mapping[int, float]
    """Time of a read of the same bytes without placing them, by number of threads."""
    roof_has_huge_pages: bool
    """Whether huge pages are faster with most numbers of threads."""
    load_seconds: Mapping[int, float]
    """Time of a load of the sample, by number of threads."""
    default_threads: int
    """Number of threads of a load by default."""
    threads: int
    """Number of threads of the fastest load."""
    share_of_roof: float
    """Time of the fastest read divided by the time of the fastest load."""
    pages: Pages
    """New memory of the last load by page size."""
    touch_gb_per_s: float
    """10^9 bytes that one thread writes per second to new memory in huge pages."""
    touch_small_gb_per_s: float
    """The same in small pages."""
    huge_pages: str | None
    """The system's setting for huge pages: `always`, `madvise` or `never`; null if it has none."""
    memory_bytes: int
    """Memory of the machine."""
    advice: tuple[str, ...]
    """What limits loads, and how to make them faster."""


class RemoteBenchResult(Result, frozen=True, tag_field="kind", tag="remote"):
    """The result of ``bench`` for files that are not on this machine."""

    files: int
    """Number of files."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of all tensors that a load reads."""
    open_seconds: float
    """Time to open the checkpoint."""
    plan_seconds: float
    """Time to compile the plan, without imports."""
    wait_seconds: float
    """Time from a request for a few bytes to its answer."""
    gb_per_s: Mapping[int, float]
    """10^9 bytes per second of ranges that are read and thrown away, by number of connections."""
    connections: int
    """Number of connections of the load."""
    load_bytes: int
    """Bytes that the load read."""
    load_seconds: float
    """Time of the load, without opening and planning."""
    load_gb_per_s: float
    """10^9 bytes per second of the load."""
    bound: Literal["machine", "latency", "link"]
    """What bounds the load."""
    retries: int
    """Number of requests that were repeated."""
    advice: tuple[str, ...]
    """What limits loads, and how to make them faster."""


class DemoLoads(msgspec.Struct, frozen=True):
    """Loads with one package."""

    seconds: float
    """Median time of a load."""
    anonymous_bytes: int | None
    """Peak of allocated memory above the level before the load; null if the system does not report it."""
    resident_bytes: int | None
    """Peak of resident memory, which includes pages of mapped files; null if the system does not report it."""


class Demo(Result, frozen=True):
    """The result of ``demo``."""

    versions: Mapping[str, str]
    """Versions of the two packages, by name."""
    file_bytes: int
    """Bytes of the files."""
    runs: int
    """Number of loads with each package."""
    loads: Mapping[str, DemoLoads]
    """Loads by package."""
    different: tuple[str, ...]
    """Names of tensors that are not equal in every byte; the status is 1 if there is one."""

    @property
    def status(self) -> int:
        return 1 if self.different else 0


def local_bench(bench: Bench) -> LocalBench:
    """Return the result of a measurement of files on this machine."""
    from automodel_conv.cli.bench import advice

    return filled(LocalBench, bench, pages=pages_of(bench.pages), advice=tuple(advice(bench)))


def remote_bench_result(bench: RemoteBench) -> RemoteBenchResult:
    """Return the result of a measurement of files that are not on this machine."""
    from automodel_conv.cli.remote_bench import remote_advice

    return filled(RemoteBenchResult, bench, advice=(remote_advice(bench),))


def demo_result(demo: DemoResult) -> Demo:
    """Return the result of the demo."""
    from automodel_conv.cli.demo import RUNS

    loads = {method: filled(DemoLoads, load) for method, load in demo.loads.items()}
    return filled(Demo, demo, runs=RUNS, loads=loads)
