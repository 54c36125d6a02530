"""Tests of pages of 100,000 tensors: whatever a user does takes a moment."""

from __future__ import annotations

import itertools
import time

import pytest

from tests.pictures.models import experts_model, published_model

MOST_SECONDS = 10
"""Far more than any step takes, because machines of tests are busy."""

DRAWN = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def scroll_to_middle(page, side):
    page.evaluate(f"{side}.scrollTop = {side}.scrollHeight / 2")


STEPS = {
    "scroll the files to the middle": lambda page: scroll_to_middle(page, "sources"),
    "scroll the buffers to the middle": lambda page: scroll_to_middle(page, "targets"),
    "click a tensor of a file": lambda page: page.locator("#sources .row:not(.file)").nth(14).click(),
    "click a buffer": lambda page: page.locator("#targets .row").nth(12).click(),
    "click an element": lambda page: page.locator("#target-matrix canvas").click(position={"x": 300, "y": 100}),
    "click an element of a file": lambda page: page.locator("#source-matrix canvas").click(position={"x": 99, "y": 99}),
    "search for few": lambda page: page.fill("#search", "layers.77. experts.1"),
    "search for many": lambda page: page.fill("#search", "e"),
    "search for none": lambda page: page.fill("#search", "no such name"),
    "end the search": lambda page: page.fill("#search", ""),
    "choose a rule": lambda page: page.locator(".chip").first.click(),
    "choose no rule": lambda page: page.locator(".chip").first.click(),
    "change the theme": lambda page: page.click("#theme"),
    "close the picture": lambda page: page.keyboard.press("Escape"),
    "jump": lambda page: page.locator("#sources-map").click(position={"x": 5, "y": 200}),
}


@pytest.mark.parametrize("model", [experts_model, published_model], ids=["merged", "as published"])
def test_every_step_takes_a_moment(show, model):
    plan = model(128, 256, 2048, 7168)
    assert len(plan.sources.names) > 98_000
    page = show(plan)
    for name, step in STEPS.items():
        began = time.perf_counter()
        step(page)
        page.evaluate(DRAWN)
        seconds = time.perf_counter() - began
        print(f"{name}: {1000 * seconds:.0f} ms")
        assert seconds < MOST_SECONDS, name
        assert 0 <= page.locator("#sources .row").count() < 200
        assert 0 <= page.locator("#targets .row").count() < 200


@pytest.mark.parametrize("count", [1, 30, 50_000, 500_000])
def test_every_row_can_be_reached(show, count):
    page = show(experts_model(1, 2, 3, 4))
    page.evaluate(f"page.targets.show(Array.from({{ length: {count} }}, (_, n) => page.plan.targets[n % 7]))")
    assert page.evaluate("targets.scrollHeight") <= 8_000_000
    for part in (0, 0.25, 0.5, 1):
        page.evaluate(f"targets.scrollTop = {part} * (targets.scrollHeight - targets.clientHeight)")
        page.evaluate(DRAWN)
        first, stop = page.evaluate("page.targets.visible()")
        assert abs(first - part * count) <= stop - first + 1
        tops = page.evaluate("[...targets.querySelectorAll('.row')].map((row) => row.getBoundingClientRect().top)")
        assert {round(after - before) for before, after in itertools.pairwise(sorted(tops))} <= {24}
        assert len(tops) >= min(count, stop - first)
    assert stop == count
    for row in (count // 3, count - 1, 0):
        page.evaluate(f"page.targets.reveal({row})")
        first, stop = page.evaluate("page.targets.visible()")
        assert first <= row < stop
