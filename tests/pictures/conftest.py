"""Fixtures that show pages in a headless browser."""

from __future__ import annotations

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Return a running browser; without an installed one, tests are skipped.

    It ends with each file of tests, because the loop of playwright lets no other loop run in this thread.
    """
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def tab(browser):
    """Return a page of the browser, which the tests of a file share: a new one takes longer than most tests."""
    return browser.new_page()


@pytest.fixture
def show(tab, tmp_path):
    """Return ``show(plan, title=, ranks=, scheme=, width=)``, which shows the page of a plan instead of the last one.

    The test fails if a page requests anything, or if a script fails.
    """
    problems, requests = [], []
    listeners = {
        "pageerror": lambda error: problems.append(str(error)),
        "console": lambda text: problems.append(text.text),
        "request": lambda request: requests.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def opened(plan, *, title="a plan", ranks=None, scheme="light", width=1360):
        file = tmp_path / "plan.html"
        plan.to_html(file, title=title, ranks=ranks)
        tab.set_viewport_size({"width": width, "height": 860})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(file.as_uri())
        tab.wait_for_selector("body[data-ready]", timeout=60_000)
        return tab

    yield opened
    tab.mouse.move(0, 0)
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert problems == []
    assert {*requests} <= {(tmp_path / "plan.html").as_uri()}
