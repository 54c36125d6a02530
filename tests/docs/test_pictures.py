"""Tests of the pictures of the pages: each committed SVG file is what its program draws."""

import re
from pathlib import Path

import pytest

from automodel_conv.planning.boxes import Piece, run_of
from automodel_conv.upstream.registry import transformers_available

pytestmark = pytest.mark.skipif(not transformers_available(), reason="the pictures draw plans of transformers' models")

if transformers_available():
    from docs.pictures import draw, svg

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"


@pytest.fixture(scope="module")
def drawn():
    return dict(draw.draw_all())


def test_committed_pictures_equal_what_the_program_draws(drawn):
    stale = [name for name, text in drawn.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    assert not stale, f"run python -m docs.pictures.draw: {stale}"


def test_both_themes_differ_only_in_colors(drawn):
    without_colors = {name: re.sub(r"#[0-9a-f]{6}", "#", text) for name, text in drawn.items()}
    for name in draw.PICTURES:
        assert without_colors[f"{name}-light.svg"] == without_colors[f"{name}-dark.svg"], name
        assert drawn[f"{name}-light.svg"] != drawn[f"{name}-dark.svg"], name


def test_backgrounds_are_transparent(drawn):
    for name, text in drawn.items():
        width, height = re.search(r'width="(\d+)" height="(\d+)"', text).groups()
        assert f'<rect x="0" y="0" width="{width}" height="{height}"' not in text, name


def test_copies_of_a_target_cover_it_once():
    for layout in ("transformers", "nemo"):
        plan, target = draw._gate_and_up(layout)
        copies = draw.copies_of(plan, target)
        _, height, width = target.shape
        for expert in range(draw.EXPERTS):
            areas = [c.target.height * c.target.width for c in copies if c.expert == expert]
            assert sum(areas) == height * width


def test_a_transposed_copy_has_its_first_row_in_a_column():
    rectangles = {}
    for layout in ("transformers", "nemo"):
        plan, target = draw._gate_and_up(layout)
        rectangles[layout] = next(copy.first_row for copy in draw.copies_of(plan, target))
    assert (rectangles["transformers"].height, rectangles["transformers"].width) == (1, draw.COLUMNS)
    assert (rectangles["nemo"].height, rectangles["nemo"].width) == (draw.COLUMNS, 1)


def test_a_piece_that_is_no_rectangle_is_not_drawn():
    with pytest.raises(ValueError, match="not a rectangle"):
        draw._rectangle(Piece(0, run_of(5), 0, 0), None, (1, 2, 4), on_target=True)


def test_words_are_escaped():
    drawing = svg.Drawing(10, 10, "a < b", svg.THEMES[0])
    drawing.words(0, 0, "[E, 2I] & more")
    assert "a &lt; b" in drawing.text()
    assert "&amp; more" in drawing.text()
