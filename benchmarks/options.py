"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse


def parser(name: str, description: str | None, *, repetitions: int, room: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with ``--repetitions`` and ``--json``.

    Args:
        name: name of the module in this package.
        repetitions: default of ``--repetitions``.
        room: disk space that the benchmark needs, in words. The parser then has ``--directory``.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--repetitions", type=int, default=repetitions)
    if room is not None:
        result.add_argument("--directory", help=f"parent of the temporary directory; it needs {room}")
    result.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    return result


def add_worker(to: argparse.ArgumentParser, arguments: int | None = None) -> None:
    """Add ``--worker``, with ``arguments`` arguments, and ``--repetition``: options for a benchmark's own processes."""
    to.add_argument("--worker", nargs=arguments, help=argparse.SUPPRESS)
    to.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
