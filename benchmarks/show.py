"""Print results of benchmarks, as tables of rich."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure


def show(what: str | Table, err: bool = False) -> None:
    """Print a text or a table, 140 columns wide if the output is no terminal."""
    terminal = sys.stderr.isatty() if err else sys.stdout.isatty()
    Console(stderr=err, width=None if terminal else 140, highlight=False).print(what)


def show_environment(environment: Mapping[str, Any]) -> None:
    """Print the versions, the load average and the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    load = ", ".join(str(load) for load in environment["load_average"])
    show(f"Python {environment['python']}, {versions}; load average {load}")
    show(measure.about(environment))
