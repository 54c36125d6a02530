"""Tests of pages of checkpoints whose names are meant to do harm: they stay names."""

from __future__ import annotations

import pytest

from automodel_conv.planning.copies import Places, SourceTable
from tests.planning.plans import plan_of, targets_of

HEBREW = "\u05d0\u05d1\u05d2.\u05d3\u05d4"
NAMES = [
    "</script><script>globalThis.harm = 1</script>",
    "<img src=x onerror='globalThis.harm = 1'>",
    '"><svg onload="globalThis.harm = 1">',
    "' onclick='globalThis.harm = 1",
    "${globalThis.harm = 1}`",
    "\\u003cimg src=x onerror=globalThis.harm=1\\u003e",
    "javascript:globalThis.harm=1",
    "__proto__",
    "constructor",
    "weight\u202egpj.exe",
    HEBREW,
    "👩‍👩‍👧.🇺🇳.weight",
    "a\tb\nc\0d",
    " ",
    "x" * 5000,
]


WRITTEN = {
    "weight\u202egpj.exe": "weight\\u202egpj.exe",
    "a\tb\nc\0d": "a\\u0009b\\u000ac\\u0000d",
    HEBREW: f"\u2068{HEBREW}\u2069",
}
"""Names that are shown in another way: control characters are written out, and the direction of writing is isolated."""


def written(name):
    return WRITTEN.get(name, name)


def plan_with(names):
    places = Places((f"/data/{names[0]}",), [0] * len(names), [8 * n for n in range(len(names))])
    sources = SourceTable(names, ["BF16"] * len(names), [(2, 2)] * len(names), places=places)
    targets = [t for number, name in enumerate(names) for t in targets_of(sources, [[name]], [], [name], rule=number)]
    return plan_of(sources, targets, rules=tuple(names))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_stay_names(show, scheme):
    plan = plan_with(NAMES)
    page = show(plan, title=NAMES[1], ranks={NAMES[1]: {}, NAMES[2]: {}}, scheme=scheme)
    assert page.title() == NAMES[1]
    assert page.evaluate("page.plan.names") == NAMES
    for number in range(len(NAMES)):
        page.evaluate("(number) => page.choose(number)", number)
        assert page.evaluate("document.querySelector('#sentence').textContent").count(written(NAMES[number])) >= 2
    texts = page.evaluate("[...document.querySelectorAll('#targets .name')].map((name) => name.textContent)")
    assert {*texts} == {*map(written, NAMES)}
    page.fill("#search", "<img")
    assert page.evaluate("page.targets.items.length") == 1
    assert page.evaluate("globalThis.harm") is None
    assert page.evaluate("document.querySelectorAll('script, img, svg, iframe, object, link').length") == 1
    assert page.evaluate("document.querySelectorAll('[onclick], [onerror], [onload]').length") == 0


def test_letters_from_right_to_left_turn_only_their_own_name(show):
    page = show(plan_with([HEBREW, "next.weight"]))
    page.evaluate("page.choose(0)")
    boxes = [page.locator(f"#targets .row:first-child .{part}").bounding_box() for part in ("name", "kind", "size")]
    assert [box["x"] for box in boxes] == sorted(box["x"] for box in boxes)
    name = f"\u2068{HEBREW}\u2069"
    assert page.evaluate("document.querySelector('#sentence').textContent") == f"{name}: {name}[0, 0] → {name}[0, 0]"


def test_a_long_name_leaves_room_for_the_rest(show):
    page = show(plan_with(["long." * 300 + "weight"]))
    page.locator("#targets .row").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.is_visible("#close")
    for part in ("name", "kind", "size"):
        box = page.locator(f"#targets .row .{part}").bounding_box()
        assert box["width"] > 10
