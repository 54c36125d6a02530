"""Forecasts of refits between 256 ranks of a trainer and 64 of an engine, as ``automodel-conv refit-plan`` makes them.

    python -m benchmarks.refit_forecast [--size full|small] [--json FILE]
    python -m benchmarks.refit_forecast --from FILE              the table of docs/performance.md from that JSON

Nothing is sent, and no rank exists: models are built from their published sizes on the meta device, and the plans of
all ranks are computed. All numbers except the seconds are exact and equal on every machine. Only the seconds of the
forecast itself, without imports and the model, are measured, once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.filesize import decimal

from automodel_conv.cli.engine_mesh import parse_engine_mesh
from automodel_conv.cli.forecast import parse_mesh
from automodel_conv.cli.refit_plan import refit_plan
from automodel_conv.refit import DEFAULT_BUCKET_BYTES
from benchmarks import measure
from benchmarks.shapes import DEEPSEEK_V3, QWEN3_235B, SMALL, Shape, meta_model


class Meshes(NamedTuple):
    """The ranks of both sides, as the command line writes them."""

    trainer: str
    engine: str


LARGE = (
    Meshes("fsdp=32,ep=8", "tp=8,ep=64"),
    Meshes("replicate=2,fsdp=16,ep=8", "tp=8,ep=64"),
)
SIZES: dict[str, tuple[tuple[Shape, ...], tuple[Meshes, ...]]] = {
    "full": ((QWEN3_235B, DEEPSEEK_V3), LARGE),
    "small": ((SMALL,), (Meshes("fsdp=2", "tp=1,ep=2"), Meshes("ep=2", "ep=4"))),
}
_COLUMNS = (
    *("model", "trainer", "engine", "sent in all", "by the busiest sender", "to the busiest receiver"),
    *("by the busiest link", "imbalance", "messages", "rounds", "extra memory of a rank"),
)


def run(size: str) -> list[dict[str, Any]]:
    """Return the forecast of each model and each pair of meshes, with the seconds that it takes."""
    shapes, meshes = SIZES[size]
    return [_row(shape, each) for shape in shapes for each in meshes]


def _row(shape: Shape, meshes: Meshes) -> dict[str, Any]:
    model = meta_model(shape)
    started = time.perf_counter()
    plan = refit_plan(model, parse_mesh(meshes.trainer), parse_engine_mesh(meshes.engine), DEFAULT_BUCKET_BYTES)
    seconds = time.perf_counter() - started
    forecast = plan.forecast
    return {
        "model": shape.name,
        **meshes._asdict(),
        "bytes_sent": sum(forecast.bytes_sent.values()),
        "most_bytes_sent": max(forecast.bytes_sent.values()),
        "most_bytes_received": max(forecast.bytes_received.values()),
        "most_bytes_of_link": max(forecast.links.values()),
        "imbalance": forecast.imbalance,
        "messages": forecast.messages,
        "rounds": forecast.rounds,
        "peak_extra_bytes": forecast.peak_extra_bytes,
        "seconds": seconds,
    }


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """Return the table of docs/performance.md."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        sizes = ("bytes_sent", "most_bytes_sent", "most_bytes_received", "most_bytes_of_link")
        cells = [
            row["model"],
            *(f"`{row[side]}`" for side in Meshes._fields),
            *(decimal(row[size]) for size in sizes),
            f"{row['imbalance']:.2f}",
            f"{row['messages']:,}",
            str(row["rounds"]),
            decimal(row["peak_extra_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.refit_forecast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--json", metavar="FILE", help="write all forecasts and the environment")
    parser.add_argument("--from", dest="source", metavar="FILE", help="print the table of such a file")
    given = parser.parse_args(arguments)
    if given.source is not None:
        sys.stdout.write(markdown(measure.read_json(given.source)["rows"]))
        return
    result = {"environment": measure.environment(), "rows": run(given.size)}
    sys.stdout.write(markdown(result["rows"]))
    measure.write_json(given.json, result)


if __name__ == "__main__":
    main()
