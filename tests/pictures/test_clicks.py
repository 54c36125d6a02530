"""Tests of what a user does on the page of a plan, with a mouse."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.planning.regions import box
from tests.pictures.models import RULES, experts_model

LAYERS, EXPERTS, INTERMEDIATE, HIDDEN = 6, 4, 5, 8
GATE_UP = "model.layers.3.mlp.experts.gate_up_proj"


@pytest.fixture
def plan():
    return experts_model(LAYERS, EXPERTS, INTERMEDIATE, HIDDEN)


def row(page, side, name):
    """Return the row of a tensor, which must be visible."""
    return page.locator(f"#{side} .row", has_text=name).first


def search(page, text):
    page.fill("#search", text)


def names(page, side):
    """Return the names of all rows of a list, also of those that are not drawn."""
    list_of = {"targets": "page.targets.items.map((target) => target.name)"}
    drawn = "page.sources.items.map((item) => item.file ?? page.plan.names[item.row])"
    return page.evaluate(list_of.get(side, drawn))


def sentence(page):
    return page.inner_text("#sentence")


def click_element(page, side, row, column, shape):
    """Click the middle of a cell in the picture of a tensor whose last two dimensions have this shape."""
    canvas = page.locator(f"#{side}-matrix canvas")
    size = canvas.bounding_box()
    x, y = size["width"] * (column + 0.5) / shape[1], size["height"] * (row + 0.5) / shape[0]
    canvas.click(position={"x": x, "y": y})


def test_header_counts_tensors_files_and_bytes(show, plan):
    page = show(plan, title="a small model")
    assert page.title() == page.inner_text("h1") == "a small model"
    written = sum(target.nbytes for target in plan.targets)
    assert page.inner_text("#facts") == (
        f"103 tensors in 4 files → 42 buffers, {written / 1000:.1f} kB; 1 tensor left out"
    )
    assert page.inner_text("#left-count") == "103 tensors"
    assert page.inner_text("#right-count") == "42 tensors"


def test_rows_of_files_are_in_the_order_of_the_files(show, plan):
    page = show(plan)
    rows = names(page, "sources")
    assert [row for row in rows if row.startswith("model-")] == [
        f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)
    ]
    assert [row for row in rows if not row.startswith("model-")] == list(plan.sources.names)
    assert names(page, "targets") == [target.name for target in plan.targets]
    assert "left out" in row(page, "sources", "unused").inner_text()


def test_a_click_on_a_row_shows_its_picture(show, plan):
    page = show(plan)
    assert page.is_hidden("#detail")
    search(page, "layers.3 experts")
    row(page, "targets", GATE_UP).click()
    assert page.is_visible("#detail")
    first = "model-00003-of-00004.safetensors: model.layers.3.mlp.experts.0.gate_proj.weight[0, 0]"
    assert sentence(page) == f"{first} → {GATE_UP}[0, 0, 0]"
    assert page.inner_text("#target-name").split("\n") == [GATE_UP, "BF16 [4, 10, 8] read straight into place"]
    assert page.inner_text("#source-name").split("\n")[1] == "BF16 [5, 8]"
    assert "chosen" in row(page, "targets", GATE_UP).get_attribute("class")
    assert "linked" in row(page, "sources", "layers.3.mlp.experts.0.gate_proj").get_attribute("class")
    assert "linked" not in row(page, "sources", "layers.3.mlp.experts.0.down_proj").get_attribute("class")


@pytest.mark.parametrize(
    ("at", "name", "index", "written"),
    [
        ((1, 7), "gate_proj", [1, 7], "0, 1, 7"),
        ((9, 0), "up_proj", [4, 0], "0, 5 + 4, 0"),
        ((5, 3), "up_proj", [0, 3], "0, 5, 3"),
    ],
)
def test_a_click_on_an_element_names_its_source(show, plan, at, name, index, written):
    page = show(plan)
    search(page, "layers.3 experts")
    row(page, "targets", GATE_UP).click()
    click_element(page, "target", *at, (2 * INTERMEDIATE, HIDDEN))
    assert sentence(page).endswith(f"model.layers.3.mlp.experts.0.{name}.weight{index} → {GATE_UP}[{written}]")
    page.mouse.move(0, 0)  # the clicked element stays
    assert sentence(page).endswith(f"{GATE_UP}[{written}]")


def test_a_click_on_an_element_of_a_source_names_where_it_goes(show, plan):
    page = show(plan)
    search(page, "layers.3 experts")
    row(page, "sources", "layers.3.mlp.experts.2.up_proj").click()
    assert sentence(page).endswith(f"experts.2.up_proj.weight[0, 0] → {GATE_UP}[2, 5, 0]")
    click_element(page, "source", 4, 6, (INTERMEDIATE, HIDDEN))
    assert sentence(page).endswith(f"experts.2.up_proj.weight[4, 6] → {GATE_UP}[2, 5 + 4, 6]")


def test_an_element_under_the_pointer_is_explained_until_the_pointer_leaves(show, plan):
    page = show(plan)
    search(page, "layers.3 experts")
    row(page, "targets", GATE_UP).click()
    canvas = page.locator("#target-matrix canvas")
    canvas.hover(position={"x": 3, "y": 190})
    assert sentence(page).endswith(f"{GATE_UP}[0, 5 + 4, 0]")
    page.locator("h1").hover()
    assert sentence(page).endswith(f"{GATE_UP}[0, 0, 0]")


def test_other_dimensions_are_chosen_by_number(show, plan):
    page = show(plan)
    search(page, "layers.3 experts")
    row(page, "targets", GATE_UP).click()
    page.fill("#target-matrix input[type=number] >> visible=true", "3")
    click_element(page, "target", 6, 2, (2 * INTERMEDIATE, HIDDEN))
    assert sentence(page).endswith(f"experts.3.up_proj.weight[1, 2] → {GATE_UP}[3, 5 + 1, 2]")
    page.select_option("#target-matrix select", "0,2")
    click_element(page, "target", 2, 7, (EXPERTS, HIDDEN))
    assert sentence(page).endswith(f"experts.2.up_proj.weight[1, 7] → {GATE_UP}[2, 5 + 1, 7]")


def test_the_wheel_zooms_and_a_double_click_shows_all(show):
    page = show(experts_model(1, 2, 500, 400))
    row(page, "targets", "gate_up_proj").click()
    canvas = page.locator("#target-matrix canvas")
    canvas.hover(position={"x": 10, "y": 10})
    page.mouse.wheel(0, -5000)
    page.wait_for_function("page.picture.view.height < 10")
    assert page.evaluate("page.picture.view.width") < 10
    canvas.dblclick(position={"x": 10, "y": 10})
    assert page.evaluate("page.picture.view") == {"x": 0, "y": 0, "width": 400, "height": 1000}


def test_search_takes_parts_of_names(show, plan):
    page = show(plan)
    search(page, "LAYERS.3 experts")
    assert names(page, "targets") == [GATE_UP, "model.layers.3.mlp.experts.down_proj"]
    assert all("layers.3.mlp.experts." in name for name in names(page, "sources")[1:])
    assert page.inner_text("#found") == "12 tensors, 2 buffers"
    search(page, "layers.3 up_proj.weight")
    assert names(page, "targets") == [GATE_UP]
    assert names(page, "sources")[1:] == [f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in range(EXPERTS)]
    search(page, "layers.3 experts.gate_up")
    assert names(page, "targets") == [GATE_UP]
    assert len(names(page, "sources")) == 1 + 2 * EXPERTS
    search(page, "unused")
    assert (names(page, "targets"), names(page, "sources")[1:]) == ([], ["unused"])
    search(page, "layers.9")
    assert names(page, "targets") == names(page, "sources") == []
    assert page.inner_text("#found") == "nothing found"
    search(page, "")
    assert len(names(page, "targets")) == len(plan.targets)
    assert page.inner_text("#found") == ""


def test_nothing_is_drawn_beside_lists_without_rows(show, plan):
    page = show(plan)
    painted = "id => document.getElementById(id).getContext('2d').getImageData(0, 0, 14, 40).data.some(Boolean)"
    assert page.evaluate(painted, "sources-map")
    search(page, "no such name")
    assert page.locator("#found").inner_text() == "nothing found"
    assert not page.evaluate(painted, "targets-map")


def test_names_have_room_on_a_phone(show, plan):
    page = show(plan, width=420)
    names = page.locator("#targets .row .name")
    assert names.count() > 1
    assert names.first.bounding_box()["width"] > 100


def test_rules_limit_the_lists(show, plan):
    page = show(plan)
    chips = page.locator(".chip")
    assert sorted(chip.get_attribute("title") for chip in chips.all()) == sorted([*RULES, "(name only)"])
    down = page.locator(".chip", has_text="down_proj.weight -> ")
    down.click()
    assert down.get_attribute("aria-pressed") == "true"
    assert names(page, "targets") == [f"model.layers.{n}.mlp.experts.down_proj" for n in range(LAYERS)]
    assert all("down_proj" in name for name in names(page, "sources") if not name.startswith("model-"))
    search(page, "layers.2")
    assert names(page, "targets") == ["model.layers.2.mlp.experts.down_proj"]
    down.click()
    assert down.get_attribute("aria-pressed") == "false"
    assert len(names(page, "targets")) == 7
    search(page, "")
    assert len(names(page, "sources")) == len(plan.sources.names) + 4


def test_the_theme_changes_and_changes_back(show, plan):
    page = show(plan, scheme="light")
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    page.click("#theme")
    assert page.evaluate(color) != light
    page.click("#theme")
    assert page.evaluate(color) == light
    page = show(plan, scheme="dark")
    assert page.evaluate(color) != light
    page.click("#theme")
    assert page.evaluate(color) == light


@pytest.mark.parametrize("how", ["escape", "button"])
def test_the_picture_closes(show, plan, how):
    page = show(plan)
    row(page, "targets", "layers.0.self_attn.q_proj").click()
    assert page.is_visible("#detail")
    page.keyboard.press("Escape") if how == "escape" else page.click("#close")
    assert page.is_hidden("#detail")
    assert page.locator(".row.chosen, .row.linked").count() == 0


def ranks_of(plan, count):
    """Return ranks that divide the experts, and the elements of all other tensors along their first dimension."""
    return {
        f"rank {rank}": {
            target.name: box(
                target.shape,
                [rank * target.shape[0] // count] + [0] * (len(target.shape) - 1),
                [target.shape[0] // count, *target.shape[1:]],
            )
            for target in plan.targets
        }
        for rank in range(count)
    }


def test_cards_say_which_rank_holds_an_element(show, plan):
    page = show(plan, ranks=ranks_of(plan, 4))
    assert page.inner_text("#facts").endswith("on 4 ranks; 1 tensor left out")
    search(page, "layers.3 experts")
    row(page, "targets", GATE_UP).click()
    cards = page.locator(".rank")
    assert cards.count() == 4
    assert [("holds" in card.get_attribute("class")) for card in cards.all()] == [True, False, False, False]
    page.fill("#target-matrix input[type=number] >> visible=true", "2")
    click_element(page, "target", 6, 2, (2 * INTERMEDIATE, HIDDEN))
    assert [("holds" in card.get_attribute("class")) for card in cards.all()] == [False, False, True, False]
    assert page.inner_text("#held") == "held by rank 2 at [0, 6, 2]"
    assert "[1, 10, 8]" in cards.nth(2).inner_text()
    assert cards.nth(2).inner_text().endswith("here: [0, 6, 2]")
    held = sum(target.nbytes for target in plan.targets) / 4
    assert f"{held / 1000:.1f} kB in all" in cards.nth(0).inner_text()


def test_the_card_of_the_rank_that_holds_an_element_is_scrolled_to(show):
    plan = experts_model(1, 64, 2, 4)
    page = show(plan, ranks=ranks_of(plan, 64))
    row(page, "targets", "gate_up_proj").click()
    page.fill("#target-matrix input[type=number] >> visible=true", "50")
    assert page.inner_text("#held") == "held by rank 50 at [0, 0, 0]"
    cards, card = page.locator("#cards").bounding_box(), page.locator(".rank").nth(50).bounding_box()
    assert cards["x"] <= card["x"]
    assert card["x"] + card["width"] <= cards["x"] + cards["width"]


def test_scales_of_codes_lead_to_the_codes(show, tmp_path):
    pytest.importorskip("transformers", reason="needs the rules of transformers")
    stored = {}
    for expert in range(3):
        for part, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4))):
            codes, scales = torch.ones(shape).to(torch.float8_e4m3fn), torch.ones(-(-shape[0] // 2), shape[1] // 2)
            name = f"model.layers.0.mlp.experts.{expert}.{part}.weight"
            stored |= {name: codes, f"{name}_scale_inv": scales}
    save_file(stored, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    page = show(amc.compile_plan(tmp_path, rules=amc.get_checkpoint_conversion_mapping("qwen3_moe")))
    row(page, "sources", "experts.2.up_proj.weight_scale_inv").click()
    name, target = "model.layers.0.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"
    told = f"model.safetensors: {name}[0, 0] decoded with {name}_scale_inv[0, 0] → {target}[2, 4, 0]"
    assert sentence(page) == told
    search(page, "experts.2.up_proj.weight")
    assert names(page, "sources")[1:] == [f"{name}_scale_inv", name]


def test_browser_that_is_too_old_is_named(browser, plan, tmp_path):
    plan.to_html(tmp_path / "plan.html")
    old = browser.new_page()
    old.add_init_script("delete globalThis.DecompressionStream")
    old.goto((tmp_path / "plan.html").as_uri())
    old.wait_for_function(
        "document.querySelector('#facts').textContent.startsWith('This browser cannot read the page')"
    )
    old.close()
