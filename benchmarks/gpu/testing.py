"""Run ``tests/gpu`` in several processes at once, each a worker with a share of the tests.

    python -m benchmarks.gpu.testing    (a worker; a cell is a test, or a file that cannot be collected)

If a test leaves the device broken, the worker ends, and another one runs the remaining tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.gpu.worker import TEXT_CHARACTERS, Channel, serve

# Adjacent tests launch the same kernels, which each process compiles or loads again.
_RUN = 12


class Reporter:
    """A plugin of pytest that selects this worker's share and reports the result of each test."""

    def __init__(self, order: Mapping[str, Any], channel: Channel):
        self._order = order
        self._channel = channel
        self._failed: dict[str, str] = {}
        self._skipped: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)  # after the selection by -m
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        share, of = self._order["share"]
        wanted, done = self._order["cells"], set(self._order["done"])
        if wanted is None:
            taken = [item for n, item in enumerate(items) if n // _RUN % of == share]
            mine = [item for item in taken if item.nodeid not in done]
        else:
            mine = [item for item in items if item.nodeid in set(wanted)]
        items[:] = mine
        if wanted is None:
            self._channel.cells([item.nodeid for item in mine])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._channel.row(report.nodeid or "collection", error=_short(str(report.longrepr)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._channel.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0) + report.duration
        if report.failed:
            self._failed[name] = _short(report.longreprtext)
        elif report.skipped:
            self._skipped[name] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        row: dict[str, Any] = {"seconds": round(self._seconds[nodeid], 2)}
        if nodeid in self._failed:
            row["error"] = self._failed[nodeid]
        elif nodeid in self._skipped:
            row["skipped"] = self._skipped[nodeid][:200]
        self._channel.row(nodeid, **row)
        if nodeid in self._failed:
            self._end_if_broken()

    def _end_if_broken(self) -> None:
        import torch

        from benchmarks.gpu.timing import why_broken

        if why := why_broken(torch.device(self._order["device"])):
            self._channel.broken(why)


def _short(text: str) -> str:
    """Return the end of a text, where pytest reports the failure."""
    return text[-TEXT_CHARACTERS:]


def work(order: Mapping[str, Any], channel: Channel) -> None:
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    # Tests that need most of the device's memory run separately, later.
    arguments += ["-m", "gpu" if order["huge"] else "not gpu", order["tests"]]
    code = pytest.main(arguments, plugins=[Reporter(order, channel)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")


if __name__ == "__main__":
    serve(work)
