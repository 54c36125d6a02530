"""Tests of the page of a load in a browser: its bars, its colours in light and dark, and small screens."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.execution.timeline import Span, Timeline
from automodel_conv.execution.timeline_picture import timeline_page
from automodel_conv.execution.timeline_words import KINDS

BARS = """() => [...document.querySelectorAll("rect")].map(bar => {
  const box = bar.getBoundingClientRect(), picture = bar.closest("svg").getBoundingClientRect();
  return {title: bar.textContent, fill: getComputedStyle(bar).fill, width: box.width,
          inside: box.left >= picture.left && box.right <= picture.right && box.bottom <= picture.bottom};
})"""


@pytest.fixture
def show(tab, tmp_path):
    """Return ``show(html, scheme=, width=)``, which shows a page; the test fails if it requests or reports anything."""
    problems, requests = [], []
    file = tmp_path / "page.html"
    listeners = {
        "pageerror": lambda error: problems.append(str(error)),
        "console": lambda text: problems.append(text.text),
        "request": lambda request: requests.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def shown(html, *, scheme="light", width=1360):
        file.write_text(html, encoding="utf-8")
        tab.set_viewport_size({"width": width, "height": 860})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(file.as_uri())
        return tab

    yield shown
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert problems == []
    assert {*requests} <= {file.as_uri()}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return the report of a real load by two threads."""
    directory = tmp_path_factory.mktemp("load")
    save_file({f"{n}": torch.ones(1 << 20) for n in range(8)}, directory / "model.safetensors")
    return amc.load_state_dict(directory, rules=[], threads=2).report


@pytest.fixture(scope="module")
def every_kind():
    """Return a page with a bar of each kind."""
    spans = tuple(Span("thread 1", kind, float(n), n + 1.0) for n, kind in enumerate(KINDS))
    return timeline_page(Timeline(spans, float(len(spans))), "all kinds", [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_a_load_shows_its_bars_inside_the_picture(show, report, tmp_path, scheme):
    report.to_html(tmp_path / "load.html", title="my load")
    page = show((tmp_path / "load.html").read_text(encoding="utf-8"), scheme=scheme)
    assert page.title() == page.inner_text("h1") == "my load"
    bars = page.evaluate(BARS)
    assert any(bar["title"].startswith("thread 1 read ") for bar in bars)
    assert all(bar["inside"] and bar["width"] > 0 for bar in bars)
    assert "bound the load" in page.inner_text("body")
    assert page.locator("td", has_text="threads, at most").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_kind_has_a_colour_of_its_own_on_the_page(show, every_kind, scheme):
    page = show(every_kind, scheme=scheme)
    colours = [bar["fill"] for bar in page.evaluate(BARS)]
    assert len(set(colours)) == len(colours) == len(KINDS)
    panel = page.evaluate("getComputedStyle(document.querySelector('.picture')).backgroundColor")
    assert panel not in colours
    legend = page.evaluate(
        "[...document.querySelectorAll('.legend i')].map(mark => getComputedStyle(mark).backgroundColor)"
    )
    assert legend == colours


def test_page_is_light_or_dark_as_the_reader_prefers(show, every_kind):
    colours = {}
    for scheme in ("light", "dark"):
        page = show(every_kind, scheme=scheme)
        for part in ("backgroundColor", "color"):
            text = page.evaluate(f"getComputedStyle(document.body).{part}")
            colours[scheme, part] = sum(int(number) for number in text.strip("rgb()").split(","))
    assert colours["light", "backgroundColor"] > 700 > colours["light", "color"]
    assert colours["dark", "backgroundColor"] < 100 < 600 < colours["dark", "color"]


@pytest.mark.parametrize("width", [320, 600, 1360])
def test_page_fits_screens_of_any_width(show, every_kind, width):
    page = show(every_kind, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_readers_of_screens_hear_the_sentences(show, report):
    page = show(timeline_page(report.timeline, "a load", []))
    label = page.get_by_role("img").get_attribute("aria-label")
    assert label is not None
    assert label == " ".join(page.locator("body > p:not(.note)").all_inner_texts())


def test_notebook_shows_the_picture_in_a_frame(show, report):
    page = show(f"<!DOCTYPE html><title>a notebook</title><body>{report._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator("svg").wait_for(timeout=60_000)
    assert frame.locator("rect").count() > 3
    assert page.locator("td", has_text="threads, at most").is_visible()
