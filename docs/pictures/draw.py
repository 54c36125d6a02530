"""Draw the pictures of the documentation from plans, schedules and measurements.

    python -m docs.pictures.draw [--to DIR]

Each picture is an SVG file for a light and one for a dark page. The same code draws the same bytes, and
``tests/docs/test_pictures.py`` compares them with the committed files. Plans are compiled of checkpoints that consist
of headers only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.tensor import Shard

import automodel_conv as amc
from automodel_conv.execution.host import DEFAULT_SCRATCH_BYTES, bytes_of_slot
from automodel_conv.planning.boxes import Piece
from automodel_conv.planning.copies import Target
from automodel_conv.planning.sharding import placed
from automodel_conv.schedule.host import schedule
from automodel_conv.schedule.jobs import Job, ReadInPlace
from benchmarks import measure
from benchmarks.peers.roofs import LOADS
from benchmarks.shapes import SMALL, Shape, write_sparse_checkpoint
from docs.pictures.svg import ON_COLOR, THEMES, Drawing, Theme

FOLDER = Path(__file__).parent
WIDTH = 800
EXPERTS, ROWS, COLUMNS = 4, 256, 640
"""Experts of the drawn layer, and rows and columns of their gate and up matrices: intermediate and hidden size."""

_EXPERT_COLORS = (("#9ecae9", "#cfe6f6"), ("#f6b26b", "#fbdcb6"), ("#8fd0a5", "#cdebd6"), ("#d7a6d9", "#efd9f0"))
"""Colors of gate and up, for each expert."""
_RANK_COLORS = ("#56b4e9", "#e69f00", "#3fb68b", "#cc79a7")

ONE_LAYER = replace(
    SMALL,
    name="a layer of four experts",
    config={
        **SMALL.config,
        "num_hidden_layers": 1,
        "num_experts": EXPERTS,
        "hidden_size": COLUMNS,
        "moe_intermediate_size": ROWS,
    },
    keys=EXPERTS * 3 + 9 + 3,
    files=1,
)
QWEN3_30B = Shape(
    "Qwen3-30B-A3B",
    "config.json and model.safetensors.index.json of Qwen/Qwen3-30B-A3B",
    "qwen3_moe",
    {
        "num_hidden_layers": 48,
        "num_experts": 128,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    keys=18_867,
    files=16,
)
THREADS = 8
SLOT_BYTES = bytes_of_slot(THREADS, DEFAULT_SCRATCH_BYTES)
"""Scratch of a job."""


@contextmanager
def _headers_of(shape: Shape) -> Iterator[str]:
    """Yield a checkpoint of this shape that has headers and no data."""
    with tempfile.TemporaryDirectory() as directory:
        write_sparse_checkpoint(shape, directory)
        yield directory


class Rectangle(NamedTuple):
    """Elements of a matrix: its first row and column, and the numbers of rows and columns."""

    top: int
    left: int
    height: int
    width: int


class DrawnCopy(NamedTuple):
    """One copy of a plan, from a source to one expert of a target."""

    expert: int
    projection: str
    source: Rectangle
    first_row: Rectangle
    """Row 0 of the source, in the target."""
    target: Rectangle


def _rectangle(piece: Piece, numel: int | None, shape: Sequence[int], on_target: bool) -> tuple[int, Rectangle]:
    """Return the matrix of a tensor and the rectangle in it that a piece reads or writes.

    Args:
        numel: number of the piece's first elements to consider, in the order of the source; None for all.

    Raises:
        ValueError: the elements are not a rectangle of one matrix.
    """
    box = piece.box
    read, written = np.array([piece.source_offset]), np.array([piece.target_offset])
    for count, source_stride, target_stride in zip(*box, strict=True):
        steps = np.arange(count)
        read = (read[:, None] + steps * source_stride).reshape(-1)
        written = (written[:, None] + steps * target_stride).reshape(-1)
    elements = (written if on_target else read)[np.argsort(read)][:numel]
    matrix, row, column = np.unravel_index(elements, (prod(shape[:-2]), *shape[-2:]))
    top, left = int(row.min()), int(column.min())
    height, width = int(row.max()) - top + 1, int(column.max()) - left + 1
    if len({*matrix.tolist()}) > 1 or height * width != len(elements):
        raise ValueError(f"the elements of {piece} are not a rectangle of one matrix")
    return int(matrix[0]), Rectangle(top, left, height, width)


def copies_of(plan: amc.CopyPlan, target: Target) -> list[DrawnCopy]:
    """Return the copies of a target whose sources are matrices of experts."""
    copies = []
    for piece in (piece for copy in target.copies for piece in copy.pieces()):
        row = target.sources[piece.source]
        shape = plan.sources.shapes[row]
        name = plan.sources.names[row].split(".")
        _, source = _rectangle(piece, None, shape, on_target=False)
        expert, written = _rectangle(piece, None, target.shape, on_target=True)
        _, first_row = _rectangle(piece, shape[-1], target.shape, on_target=True)
        copies.append(DrawnCopy(expert, name[-2].removesuffix("_proj"), source, first_row, written))
    return copies


@cache
def _gate_and_up(layout: str) -> tuple[amc.CopyPlan, Target]:
    with _headers_of(ONE_LAYER) as directory:
        plan = amc.compile_plan(directory, layout=layout)
    [target] = (target for target in plan.targets if "gate" in target.name.rpartition(".")[2])
    return plan, target


def draw_copies(theme: Theme) -> str:
    """Draw the copies from the files to ``gate_up_proj``, in the layouts of transformers and NeMo AutoModel."""
    drawing = Drawing(WIDTH, 482, "Every copy of gate and up, from the files to two layouts", theme)
    scale, top, step = 1 / 8, 76, 94
    places = {"transformers": 420.0, "nemo": 640.0}
    drawing.words(40, 22, "In the files", 15, bold=True)
    drawing.words(40, 40, "a tensor for each expert and projection", 13, theme.muted)
    drawing.words(40, 56, f"gate_proj, up_proj [{ROWS}, {COLUMNS}]", 13, theme.muted)
    for layout, x in places.items():
        plan, target = _gate_and_up(layout)
        drawing.words(x, 22, f'Layout "{layout}"', 15, bold=True)
        drawing.words(x, 40, target.name.rpartition(".")[2], 13, theme.muted)
        drawing.words(x, 56, str(list(target.shape)), 13, theme.muted)
        for copy in copies_of(plan, target):
            y = top + step * copy.expert
            _draw_matrix(drawing, copy, copy.target, copy.first_row, x, y, scale)
        for expert in range(EXPERTS):
            y = top + step * expert
            _, height, width = target.shape
            drawing.rectangle(x, y, width * scale, height * scale, "none", theme.ink)
            drawing.words(x + width * scale + 8, y + 14, f"[{expert}]", 12, theme.muted)
        steps = len(copies_of(plan, target))
        ways = {
            "read": ("runs of bytes,", "read straight into place"),
            "strided": ("transposed copies,", "through scratch"),
        }
        first, second = ways[plan.execution_of(target)]
        drawing.words(x, top + step * EXPERTS + 4, f"{steps} {first}", 13)
        drawing.words(x, top + step * EXPERTS + 20, second, 13)
    plan, target = _gate_and_up("transformers")
    for copy in copies_of(plan, target):
        x, y = {"gate": 100.0, "up": 210.0}[copy.projection], top + step * copy.expert
        row_0 = Rectangle(0, 0, 1, copy.source.width)
        _draw_matrix(drawing, copy, copy.source, row_0, x, y, scale)
    for expert in range(EXPERTS):
        y = top + step * expert
        drawing.words(40, y + 20, f"expert {expert}", 13)
        drawing.arrow(310, y + 16, 400, y + 16)
    drawing.words(40, top + step * EXPERTS + 4, "Each rectangle is one copy of the plan.", 13)
    drawing.words(40, top + step * EXPERTS + 20, "The dark edge is row 0 of the tensor in the file.", 13)
    return drawing.text()


def _draw_matrix(
    drawing: Drawing, copy: DrawnCopy, part: Rectangle, row_0: Rectangle, x: float, y: float, scale: float
) -> None:
    """Draw a rectangle of elements at a place in the picture, with its name and with row 0 of the source."""
    left, top = x + part.left * scale, y + part.top * scale
    width, height = part.width * scale, part.height * scale
    color = _EXPERT_COLORS[copy.expert][copy.projection == "up"]
    drawing.rectangle(left, top, width, height, color, "#ffffff")
    stands = row_0.height > row_0.width
    edge = (3, height) if stands else (width, 3)
    drawing.rectangle(x + row_0.left * scale, y + row_0.top * scale, *edge, ON_COLOR)
    name = f"{copy.projection} {copy.expert}"
    middle = (left + width / 2 + (1 if stands else 0), top + height / 2)
    drawing.words(middle[0], middle[1] + (0 if stands else 5), name, 13, ON_COLOR, "middle", upright=stands)


def draw_ranks(theme: Theme) -> str:
    """Draw the bytes of a file that each rank of a mesh reads: expert parallel by two, sharded by two."""
    mesh = (2, 2)
    with _headers_of(ONE_LAYER) as directory:
        plan = amc.compile_plan(directory)
        checkpoint = amc.open_checkpoint(directory)
    experts = [target for target in plan.targets if ".experts." in target.name]
    rows = sorted({row for target in experts for row in target.sources}, key=lambda row: checkpoint.offsets[row])
    start, stop = checkpoint.offsets[rows[0]], checkpoint.offsets[rows[-1]] + checkpoint.nbytes[rows[-1]]
    left, top = 132.0, 70.0
    scale = (WIDTH - left - 8) / (stop - start)

    drawing = Drawing(WIDTH, 298, "The bytes of a file that each of four ranks reads", theme)
    drawing.words(8, 22, "One file, four ranks: experts over 2, each of their tensors over 2 (FSDP)", 15, bold=True)
    drawing.words(8, top + 20, "the file", 13)
    for row in rows:
        x = left + (checkpoint.offsets[row] - start) * scale
        width = checkpoint.nbytes[row] * scale
        *_, expert, projection, _ = checkpoint.names[row].split(".")
        drawing.rectangle(x, top, width, 30, theme.panel, theme.lines)
        drawing.words(x + width / 2, top + 20, projection.removesuffix("_proj"), 13, anchor="middle")
        if projection == "down_proj":
            drawing.words(x + 1, top - 10, f"expert {expert}", 13, theme.muted)
    total = 0
    for number, (coordinate, jobs) in enumerate(_jobs_of_ranks(plan, checkpoint, experts, mesh).items()):
        y = top + 52 + 36 * number
        drawing.words(8, y + 17, f"rank ep {coordinate[0]}, fsdp {coordinate[1]}", 13)
        drawing.line(left, y + 13, WIDTH - 8, y + 13)
        for job in jobs:
            for call in job.reads.calls():
                first, last = int(call.offset_bytes[0]), int(call.stop_bytes[-1])
                drawing.rectangle(
                    left + (first - start) * scale, y, (last - first) * scale, 26, _RANK_COLORS[number], "#ffffff"
                )
                total += last - first
    if total != stop - start:
        raise ValueError(f"the ranks read {total} bytes of {stop - start}")
    y = top + 52 + 36 * 4 + 14
    drawing.words(
        8, y, "No byte is read twice. gate and up are one parameter [E, 2I, H], so half of its rows are gate.", 12
    )
    return drawing.text()


def _jobs_of_ranks(
    plan: amc.CopyPlan, checkpoint: amc.Checkpoint, targets: Sequence[Target], mesh: tuple[int, int]
) -> dict[tuple[int, int], list[Job]]:
    """Return the jobs of each rank, by its coordinate: experts over the first dimension of the mesh, rows over both."""
    jobs = {}
    for coordinate in np.ndindex(mesh):
        regions = {target.name: placed(target.shape, mesh, coordinate, (Shard(0), Shard(1))) for target in targets}
        part = plan.shard(regions)
        held = [part.target(target.name) for target in targets]
        jobs[coordinate] = _host_jobs(held, checkpoint)
    return jobs


def _host_jobs(targets: Sequence[Target], checkpoint: amc.Checkpoint) -> list[Job]:
    copies = [target.copies for target in targets]
    return schedule(targets, copies, checkpoint, {}, threads=THREADS, slot_bytes=SLOT_BYTES)


def draw_stages(theme: Theme) -> str:
    """Draw the stages of a load, with the numbers of Qwen3-30B-A3B."""
    drawing = Drawing(WIDTH, 346, "The stages of a load, with the numbers of Qwen3-30B-A3B", theme)
    drawing.words(8, 22, "Qwen3-30B-A3B: from headers to memory", 15, bold=True)
    width, height, gap = 240.0, 120.0, 32.0
    for number, (title, *lines) in enumerate(_stages()):
        x, y = 8 + (number % 3) * (width + gap), 44 + (number // 3) * (height + 46)
        drawing.rectangle(x, y, width, height, theme.panel, theme.lines, 6)
        drawing.words(x + 12, y + 24, f"{number + 1}  {title}", 15, bold=True)
        for line_number, line in enumerate(lines):
            drawing.words(x + 12, y + 48 + 19 * line_number, line, 13)
        if number % 3 < 2:
            drawing.arrow(x + width, y + height / 2, x + width + gap, y + height / 2)
        elif number == 2:
            below = y + height + 23
            drawing.line(x + width / 2, y + height, x + width / 2, below, width=1.5)
            drawing.line(x + width / 2, below, 8 + width / 2, below, width=1.5)
            drawing.arrow(8 + width / 2, below, 8 + width / 2, below + 23)
    return drawing.text()


@cache
def _stages() -> tuple[tuple[str, ...], ...]:
    """Return the title and the lines of each stage."""
    jobs, through_scratch = {}, {}
    with _headers_of(QWEN3_30B) as directory:
        header_bytes = sum(_header_bytes(path) for path in Path(directory).glob("*.safetensors"))
        checkpoint = amc.open_checkpoint(directory)
        for layout in ("transformers", "nemo"):
            plan = amc.compile_plan(directory, layout=layout)
            jobs[layout] = _host_jobs(plan.targets, checkpoint)
            moved = [job for job in jobs[layout] if not isinstance(job, ReadInPlace)]
            through_scratch[layout] = sum(job.reads.total_bytes for job in moved)
    copies = sum(len(copy.ordinals) for target in plan.targets for copy in target.copies)
    elements = sum(prod(target.shape) for target in plan.targets)
    most = max(job.reads.total_bytes for job in jobs["transformers"])
    if through_scratch["transformers"]:
        raise ValueError("a load in transformers' layout needs scratch")
    return (
        (
            "Headers",
            f"{len(checkpoint.names):,} tensors, {QWEN3_30B.files} files",
            f"{header_bytes / 1e6:.1f} MB are read",
            "no tensor data",
        ),
        ("Plan", f"{len(plan.targets)} targets to fill", f"{copies:,} strided copies", "integers and strings only"),
        (
            "Proof",
            f"{elements / 1e9:.1f} billion elements,",
            "each is written exactly once,",
            "no read leaves its source",
        ),
        (
            "Jobs",
            f"transformers: {len(jobs['transformers']):,} jobs,",
            f"at most {most / (1 << 20):.0f} MiB, all in place",
            f"nemo: {len(jobs['nemo']):,} jobs, and",
            f"{through_scratch['nemo'] / 1e9:.0f} GB through scratch",
        ),
        (
            "Threads",
            "read straight into place, or",
            "into scratch, then copied;",
            f"{THREADS} threads share at most",
            f"{DEFAULT_SCRATCH_BYTES >> 20} MiB of scratch",
        ),
        (
            "Memory",
            f"{plan.bytes_written / 1e9:.1f} GB of parameters",
            f"from {plan.bytes_read / 1e9:.1f} GB of files,",
            "no second copy of them",
        ),
    )


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


_LOADS = {
    "transformers-as-it-comes": "transformers from_pretrained",
    "transformers": "the same, with huge pages",
    "nemo": "NeMo AutoModel",
    "fastsafetensors": "fastsafetensors, copy_",
    "runai": "Run:ai Model Streamer, copy_",
    "safetensors-stack": "safetensors, stack and cat",
    "dcp": "torch DCP into views",
    "safetensors-copy": "safetensors, copy_",
    "ours": "automodel_conv",
}
"""Methods of ``benchmarks.peers`` and their names in the picture."""


def draw_loading(theme: Theme) -> str:
    """Draw the seconds and the peak memory of loads, as ``benchmarks/results/peers-2-cores.json`` has them."""
    result = measure.read_json(str(measure.RESULTS / "peers-2-cores.json"))
    panels = {"[E, 2I, H]": (222.0, 'layout "transformers"'), "[E, H, 2I]": (452.0, 'layout "nemo", transposed')}
    width = 206.0
    rows = {(row["method"], row["layout"]): row["runs"] for row in result["rows"]}
    slowest = max(
        _seconds(runs).p80 for (method, layout), runs in rows.items() if method in _LOADS and layout in panels
    )
    scale = (width - 40) / slowest
    roof = min(_seconds(rows[method, ""]).median for method in LOADS)
    bottom = 88 + 29 * len(_LOADS)
    drawing = Drawing(WIDTH, 392, "Seconds of a load by this package and by others", theme)
    drawing.words(8, 20, f"Seconds to load {result['file_bytes'] / 1e9:.2f} GB: {result['shape']}", 15, bold=True)
    machine = f"{result['environment']['cores']} cores of {result['environment']['cpu']}, shared virtual machine"
    what = f"{machine}; files in the page cache; medians of 3 runs, 20th to 80th percentile"
    drawing.words(8, 38, what, 12, theme.muted)
    for x, title in panels.values():
        drawing.words(x, 68, title, 13, bold=True)
        drawing.line(x, 80, x, bottom)
        drawing.line(x + roof * scale, 80, x + roof * scale, bottom, theme.ink, dashes="3 3")
    drawing.words(WIDTH - 8, 68, "peak memory", 13, bold=True, anchor="end")
    notes = (
        f"Dashed: preadv of the same bytes into new memory, {roof:.2f} s.",
        "Peak memory: resident, times the size of the files, mapped files included; the larger of both layouts.",
    )
    for number, note in enumerate(notes):
        drawing.words(8, bottom + 18 + 16 * number, note, 12, theme.muted)
    for number, (method, name) in enumerate(_LOADS.items()):
        y = 86 + 29 * number
        bold = method == "ours"
        drawing.words(212, y + 14, name, 13, anchor="end", bold=bold)
        for layout, (x, _) in panels.items():
            seconds = _seconds(rows[method, layout])
            drawing.rectangle(x, y, seconds.median * scale, 20, theme.highlight if bold else theme.bar, radius=2)
            drawing.line(x + seconds.p20 * scale, y + 10, x + seconds.p80 * scale, y + 10, theme.ink, 1.5)
            end = max(seconds.median, seconds.p80, roof) * scale
            drawing.words(x + end + 6, y + 15, f"{seconds.median:.2f}", 13, bold=bold)
        peak = max(_resident(rows[method, layout]) for layout in panels) / result["file_bytes"]
        drawing.words(WIDTH - 8, y + 14, f"{peak:.2f}x", 13, anchor="end", bold=bold)
    return drawing.text()


def _seconds(runs: Sequence[Mapping[str, Any]]) -> measure.Spread:
    return measure.spread([run["seconds"] for run in runs])


def _resident(runs: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(run["resident_bytes"] for run in runs)


PICTURES: Mapping[str, Callable[[Theme], str]] = {
    "copies": draw_copies,
    "ranks": draw_ranks,
    "stages": draw_stages,
    "loading": draw_loading,
}


def draw_all() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each SVG file."""
    for name, draw in PICTURES.items():
        for theme in THEMES:
            yield f"{name}-{theme.name}.svg", draw(theme)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.pictures.draw", description="Draw the pictures of the pages.")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR", help="directory for the files")
    options = parser.parse_args(arguments)
    for name, text in draw_all():
        (options.to / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
