"""Write the live page of the documentation, and take the screenshots of pages.

    python -m docs.pictures.pages [--to DIR] [--live]

``plan.html`` is the page of a small plan; ``tests/docs/test_live_page.py`` compares it with the committed file. The
screenshots show the pages of Qwen3-30B-A3B, as ``automodel-conv plan --html`` writes them, and the timeline of a load
of one of its layers; the tensors of the files are holes. Each is a PNG file for a light and one for a dark page. They
need Chromium, ``playwright`` and ``pillow``, and look a little different on another machine. ``--live`` writes only the
live page.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import automodel_conv as amc
from automodel_conv.cli.forecast import forecast, regions_by_rank
from benchmarks.shapes import SMALL, write_sparse_checkpoint
from docs.pictures.draw import QWEN3_30B

FOLDER = Path(__file__).parent
LIVE = "plan.html"
THEMES = ("light", "dark")
WIDTH, PIXELS_PER_UNIT = 1320, 1.5
MOST_BYTES = 150_000
"""Bytes of a screenshot at most."""

FOUR_LAYERS = replace(
    SMALL,
    name="four layers of eight experts",
    config={
        **SMALL.config,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "hidden_size": 96,
        "moe_intermediate_size": 40,
    },
    keys=4 * (8 * 3 + 9) + 3,
    files=3,
)

ONE_LAYER = replace(
    QWEN3_30B,
    name="one layer of Qwen3-30B-A3B",
    config={**QWEN3_30B.config, "num_hidden_layers": 1, "vocab_size": 32_000},
    keys=128 * 3 + 9 + 3,
    files=4,
)
TIMELINE = "timeline"
TIMELINE_HEIGHT = 400
"""Height of the window for the timeline, without the table below."""

_EXPERTS = "model.layers.0.mlp.experts"
_CHOOSE = """
([target, source, element]) => {
  const {plan} = page;
  page.choose(plan.targets.find((other) => other.name === target).row, plan.names.indexOf(source));
  page.explain(element, true);
  return document.getElementById("sentence").textContent;
}
"""
_FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Screenshot(NamedTuple):
    """A page of Qwen3-30B-A3B with a chosen element."""

    name: str
    layout: str | None
    mesh: dict[str, int]
    target: str
    source: str
    index: tuple[int, int, int]
    """Index of the element in the target."""
    sentence: str
    """A part of what the page says about the element."""
    height: int
    """Height of the window."""


SCREENSHOTS = (
    Screenshot(
        "plan",
        "nemo",
        {},
        f"{_EXPERTS}.gate_and_up_projs",
        f"{_EXPERTS}.17.up_proj.weight",
        (17, 1000, 768 + 300),
        "experts.17.up_proj.weight[300, 1000]",
        800,
    ),
    Screenshot(
        "plan-ranks",
        None,
        {"ep": 2, "fsdp": 2},
        f"{_EXPERTS}.gate_up_proj",
        f"{_EXPERTS}.17.up_proj.weight",
        (17, 768 + 300, 1000),
        "experts.17.up_proj.weight[300, 1000]",
        900,
    ),
)


def live_page() -> str:
    """Return the page of a small plan: a Qwen3-MoE model in the layout of NeMo AutoModel."""
    with tempfile.TemporaryDirectory() as directory:
        write_sparse_checkpoint(FOUR_LAYERS, directory)
        plan = amc.compile_plan(directory, layout="nemo")
        file = Path(directory, LIVE)
        plan.to_html(file, title="A small Qwen3-MoE model, in the layout of NeMo AutoModel")
        return file.read_text(encoding="utf-8")


def pages_of(directory: str) -> Iterator[tuple[Screenshot, Path]]:
    """Yield each screenshot with its page, from a checkpoint in a directory."""
    checkpoint = amc.open_checkpoint(directory)
    for shot in SCREENSHOTS:
        plan = amc.compile_plan(checkpoint, layout=shot.layout)
        ranks = regions_by_rank(plan, forecast(checkpoint, plan, shot.mesh), shot.mesh) if shot.mesh else None
        file = Path(directory, f"{shot.name}.html")
        plan.to_html(file, title="Qwen/Qwen3-30B-A3B", ranks=ranks)
        yield shot, file


@contextmanager
def _browser() -> Iterator[Any]:
    """Yield a headless Chromium: that of the system, or else playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def load_page(directory: str) -> Path:
    """Load a checkpoint in a directory to the layout of NeMo AutoModel, and return the page of the fastest load."""
    reports = [amc.load_state_dict(directory, layout="nemo", threads=4).report for _ in range(4)]
    file = Path(directory, f"{TIMELINE}.html")
    min(reports, key=lambda report: report.seconds["read"]).to_html(file)
    return file


def _open(browser: Any, page: Path, theme: str, height: int) -> Any:
    window = {"width": WIDTH, "height": height}
    tab = browser.new_page(viewport=window, color_scheme=theme, device_scale_factor=PIXELS_PER_UNIT)
    tab.goto(page.as_uri())
    return tab


def _choose(tab: Any, shot: Screenshot) -> None:
    """Choose the element of a screenshot in the page of a plan.

    Raises:
        ValueError: the page says something else about the element.
    """
    tab.wait_for_selector("body[data-ready]")
    shape = tab.evaluate("(name) => page.plan.targets.find((other) => other.name === name).shape", shot.target)
    element = (shot.index[0] * shape[1] + shot.index[1]) * shape[2] + shot.index[2]
    sentence = tab.evaluate(_CHOOSE, [shot.target, shot.source, element])
    if shot.sentence not in sentence:
        raise ValueError(f"{shot.name}: the page says {sentence!r}, which does not have {shot.sentence!r}")
    tab.evaluate(_FRAME)


def _save_screenshot(tab: Any, file: Path) -> None:
    """Write the screenshot of the part of a page that its window shows.

    Raises:
        ValueError: the file would be too large.
    """
    content = _with_few_colors(tab.screenshot())
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file.name} has {len(content)} bytes, and {MOST_BYTES} at most are allowed")
    file.write_bytes(content)
    tab.close()


def _with_few_colors(png: bytes) -> bytes:
    """Return a PNG file with the 256 colors that are nearest to those of another one, a third of its size."""
    from PIL import Image

    small = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    few = image.quantize(256, kmeans=4, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.pictures.pages", description="Make the pages of plans.")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR", help="directory for the files")
    parser.add_argument("--live", action="store_true", help="write the live page and take no screenshots")
    options = parser.parse_args(arguments)
    (options.to / LIVE).write_text(live_page(), encoding="utf-8")
    if options.live:
        return
    with tempfile.TemporaryDirectory() as directory, _browser() as browser:
        write_sparse_checkpoint(QWEN3_30B, directory)
        for shot, page in pages_of(directory):
            for theme in THEMES:
                tab = _open(browser, page, theme, shot.height)
                _choose(tab, shot)
                _save_screenshot(tab, options.to / f"{shot.name}-{theme}.png")
    with tempfile.TemporaryDirectory() as directory, _browser() as browser:
        write_sparse_checkpoint(ONE_LAYER, directory)
        page = load_page(directory)
        for theme in THEMES:
            _save_screenshot(_open(browser, page, theme, TIMELINE_HEIGHT), options.to / f"{TIMELINE}-{theme}.png")


if __name__ == "__main__":
    main()
