"""Options that benchmarks have in common."""

from __future__ import annotations

import argparse


def parser(name: str, description: str | None, *, repetitions: int, room: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--repetitions`` and ``--json``.

    Args:
        name: of the module in this package.
        repetitions: unless told otherwise.
        room: what a benchmark that writes files needs on the disk; it has ``--directory`` then.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--repetitions", type=int, default=repetitions)
    if room is not None:
        made.add_argument("--directory", help=f"where a temporary directory is made; it needs {room}")
    made.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    return made


def add_worker(to: argparse.ArgumentParser, arguments: int | None = None) -> None:
    """Add what a benchmark tells its own processes: ``--worker`` with so many arguments, and ``--repetition``."""
    to.add_argument("--worker", nargs=arguments, help=argparse.SUPPRESS)
    to.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
