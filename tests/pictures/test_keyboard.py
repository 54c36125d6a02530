"""Tests of the page of a plan without a mouse, and of what readers of screens say."""

from __future__ import annotations

import pytest

from tests.pictures.models import experts_model
from tests.pictures.test_clicks import GATE_UP, ranks_of, sentence

CONTROLS = """
() => [...document.querySelectorAll("button, input, select, canvas, [tabindex], [role]")]
  .filter((element) => element.checkVisibility() && !element.closest("[aria-hidden=true]"))
  .map((element) => [
    element.outerHTML.slice(0, 120),
    element.ariaLabel || element.labels?.[0]?.textContent || element.textContent.trim() || element.title,
  ])
"""
FOCUSED = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"


@pytest.fixture
def plan():
    return experts_model(6, 4, 5, 8)


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def active(page):
    """Return the text of the row that the keys are at, as the list tells it to readers of screens."""
    return page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))?.textContent ?? null"
    )


def test_tab_reaches_every_control_in_the_order_of_the_page(show, plan):
    page = show(plan, ranks=ranks_of(plan, 2))
    page.fill("#search", "layers.3 experts")
    press(page, "Enter")
    reached = [page.evaluate(FOCUSED)]
    for _ in range(16):
        press(page, "Tab")
        reached.append(page.evaluate(FOCUSED))
    expected = [
        "search",
        "theme",
        "chip",
        "chip",
        "chip",
        "sources",
        "targets",
        "close",
        "CANVAS",
        "SELECT",
        "INPUT",
        "CANVAS",
        "cards",
    ]
    assert reached[: len(expected)] == expected


def test_every_control_has_a_name(show, plan):
    page = show(plan, ranks=ranks_of(plan, 2))
    page.fill("#search", "layers.3 experts")
    press(page, "Enter")
    controls = page.evaluate(CONTROLS)
    assert len(controls) > 30
    silent = {"found": "status"}
    assert [html for html, name in controls if not name and not any(key in html for key in silent)] == []


def test_enter_in_the_search_chooses_the_first_buffer(show, plan):
    page = show(plan)
    page.focus("#search")
    page.keyboard.type("layers.3 experts")
    press(page, "Enter")
    assert sentence(page).endswith(f"{GATE_UP}[0, 0, 0]")
    press(page, "Escape")
    assert page.is_hidden("#detail")


def test_arrows_move_through_a_list_and_enter_chooses(show, plan):
    page = show(plan)
    page.focus("#targets")
    assert active(page) is None
    press(page, "ArrowDown")
    assert active(page).startswith("model.layers.0.mlp.experts.gate_up_proj")
    press(page, "ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    assert sentence(page).endswith("model.layers.0.mlp.experts.down_proj[0, 0, 0]")
    assert page.evaluate("document.querySelector('#targets .chosen').ariaSelected") == "true"
    press(page, "ArrowDown", "Enter")
    assert sentence(page).endswith("model.layers.0.self_attn.q_proj.weight[0, 0]")
    press(page, "End", "Enter")
    assert sentence(page).endswith("model.layers.5.input_layernorm.weight[0]")
    press(page, "ArrowDown", "Home", "ArrowUp", "Enter")
    assert sentence(page).endswith("model.layers.0.mlp.experts.gate_up_proj[0, 0, 0]")


def test_pages_of_a_long_list_are_turned(show):
    page = show(experts_model(40, 8, 2, 2))
    page.focus("#sources")
    press(page, "PageDown", "PageDown")
    assert page.evaluate("sources.scrollTop") > 0
    middle = page.evaluate("page.sources.active")
    press(page, "PageUp")
    assert 0 < page.evaluate("page.sources.active") < middle
    press(page, "End")
    assert active(page).startswith("model.layers.39.input_layernorm.weight")
    first, stop = page.evaluate("page.sources.visible()")
    assert first < page.evaluate("page.sources.active") < stop
    press(page, "Enter")
    assert sentence(page).endswith("model.layers.39.input_layernorm.weight[0]")


def test_rows_say_where_they_are_in_the_whole_list(show, plan):
    page = show(plan)
    press(page, "Escape")
    page.focus("#targets")
    press(page, "End")
    row = page.locator("#targets .row.active")
    assert (row.get_attribute("aria-posinset"), row.get_attribute("aria-setsize")) == ("42", "42")


def test_a_chip_and_the_theme_take_the_keyboard(show, plan):
    page = show(plan)
    page.locator(".chip", has_text="down_proj.weight ->").focus()
    press(page, "Space")
    assert page.evaluate("document.activeElement.ariaPressed") == "true"
    assert page.inner_text("#right-count") == "6 tensors"
    press(page, "Enter")
    assert page.evaluate("document.activeElement.ariaPressed") == "false"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.focus("#theme")
    press(page, "Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_arrows_move_through_the_elements_of_a_picture(show, plan):
    page = show(plan)
    page.fill("#search", "layers.3 experts")
    press(page, "Enter")
    page.focus("#target-matrix canvas")
    press(page, *["ArrowDown"] * 6, "ArrowRight", "ArrowRight", "ArrowLeft")
    assert sentence(page).endswith(f"experts.0.up_proj.weight[1, 1] → {GATE_UP}[0, 5 + 1, 1]")
    press(page, *["ArrowUp"] * 20, *["ArrowRight"] * 20)
    assert sentence(page).endswith(f"experts.0.gate_proj.weight[0, 7] → {GATE_UP}[0, 0, 7]")
    page.focus("#target-matrix input >> visible=true")
    press(page, "ArrowUp", "ArrowUp")
    assert sentence(page).endswith(f"experts.2.gate_proj.weight[0, 7] → {GATE_UP}[2, 0, 7]")
    page.focus("#source-matrix canvas")
    press(page, "ArrowDown")
    assert sentence(page).endswith(f"experts.2.gate_proj.weight[1, 7] → {GATE_UP}[2, 1, 7]")


def test_a_picture_is_zoomed_by_keys_and_follows_the_marked_element(show):
    page = show(experts_model(1, 2, 500, 400))
    page.fill("#search", "gate_up")
    press(page, "Enter")
    page.focus("#target-matrix canvas")
    press(page, *["+"] * 12)
    view = page.evaluate("page.picture.view")
    assert (view["width"], view["height"]) == (4, 4)
    press(page, *["ArrowDown"] * 9)
    view = page.evaluate("page.picture.view")
    assert view["y"] <= 9 < view["y"] + view["height"]
    press(page, *["-"] * 12)
    assert page.evaluate("page.picture.view") == {"x": 0, "y": 0, "width": 400, "height": 1000}


def test_focus_stays_on_the_page_when_the_picture_closes(show, plan):
    page = show(plan)
    page.fill("#search", "layers.3 experts")
    press(page, "Enter")
    page.focus("#target-matrix canvas")
    press(page, "Escape")
    assert page.evaluate(FOCUSED) == "targets"
