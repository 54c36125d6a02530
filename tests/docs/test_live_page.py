"""Tests of the live page and of the screenshots: the committed page is what its program writes, and files are small."""

import base64
import gzip
import json
import re
import struct
from pathlib import Path

import pytest

from automodel_conv.upstream.registry import transformers_available

pytestmark = pytest.mark.skipif(not transformers_available(), reason="the pages show plans of transformers' models")

if transformers_available():
    from docs.pictures import pages

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
_DATA = re.compile(r'const DATA = "([^"]*)";')


def parts(page):
    """Return the text of a page without its data, and the data; other releases of zlib compress to other bytes."""
    [data] = _DATA.findall(page)
    return _DATA.sub("", page), json.loads(gzip.decompress(base64.b64decode(data)))


def size_of(png):
    """Return the width and the height that the header of a PNG file states."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_committed_page_equals_what_the_program_writes():
    committed = parts((FOLDER / pages.LIVE).read_text(encoding="utf-8"))
    assert committed == parts(pages.live_page()), "run python -m docs.pictures.pages"


def test_live_page_shows_experts_in_another_layout():
    _, data = parts(pages.live_page())
    assert len(data["names"]) == pages.FOUR_LAYERS.keys
    assert "strided" in data["ways"]


def test_every_screenshot_is_there_for_both_themes():
    names = [*(shot.name for shot in pages.SCREENSHOTS), pages.TIMELINE]
    assert {f"{name}-{theme}.png" for name in names for theme in pages.THEMES} == {
        file.name for file in FOLDER.glob("*.png")
    }
    for name in names:
        light, dark = ((FOLDER / f"{name}-{theme}.png").read_bytes() for theme in pages.THEMES)
        assert size_of(light) == size_of(dark)
        assert size_of(light)[0] == pages.WIDTH * pages.PIXELS_PER_UNIT
        assert light != dark
        assert max(len(light), len(dark)) <= pages.MOST_BYTES
