"""What the benchmarks print, in tables of rich."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure


def show(what: str | Table, err: bool = False) -> None:
    terminal = sys.stderr.isatty() if err else sys.stdout.isatty()
    Console(stderr=err, width=None if terminal else 140, highlight=False).print(what)


def show_environment(found: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(str(load) for load in found["load_average"])
    show(f"Python {found['python']}, {versions}; load average {load}")
    show(measure.about(found))
