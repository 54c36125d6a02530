"""Tests of pages without a browser: what they are joined from, and that texts stay texts."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from automodel_conv.errors import printable
from automodel_conv.pictures.page import document, in_frame, page, table, write_page

ASSETS = files("automodel_conv.pictures") / "assets"
HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!--",
    "]]>",
    "\"'`${1}\\",
    "\u2028\0é",
]


class Outline(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.comments = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def made(title="a title", data=()):
    return page(title, "plan.html", ["plan.css"], ["geometry.js", "rows.js"], data)


def data_in(html):
    (packed,) = re.findall(r'const DATA = "([A-Za-z0-9+/=]*)";', html)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_page_holds_its_template_styles_scripts_and_data():
    html = made(data={"names": ["a", "b"], "value": 1.5})
    assert data_in(html) == {"names": ["a", "b"], "value": 1.5}
    for asset in ("plan.html", "plan.css", "geometry.js", "rows.js"):
        assert (ASSETS / asset).read_text(encoding="utf-8") in html
    assert html.index("class Copies") < html.index("class Rows")
    assert "class Matrix" not in html


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_in_the_data_and_the_title_do_not_become_html(text):
    plain, html = Outline(made("a title", ["a text"])), made(text, [text])
    assert data_in(html) == [text]
    outline = Outline(html)
    assert outline.tags == plain.tags
    assert outline.comments == []
    assert printable(text) in outline.texts


@pytest.mark.parametrize("asset", sorted(asset.name for asset in ASSETS.iterdir()))
def test_assets_refer_to_nothing_outside_of_the_page(asset):
    text = (ASSETS / asset).read_text(encoding="utf-8")
    assert not re.findall(
        r"https?:|//[\w-]+\.\w|@import|url\(|\bsrc=|\bhref=|fetch\(|XMLHttpRequest|import\(|sendBeacon", text
    )
    assert "innerHTML" not in text
    assert "</script" not in text


def test_the_same_data_give_the_same_page():
    assert made(data=[1]) == made(data=[1])
    assert made(data=[1]) != made(data=[2])


def test_a_document_has_no_scripts():
    html = document("a <title>", ["plan.css"], "<p>text</p>")
    assert "a &lt;title&gt;" in html
    assert "<p>text</p>" in html
    assert "<script" not in html


def test_a_title_that_is_not_utf_8_can_be_written(tmp_path):
    write_page(tmp_path / "page.html", document("caf\udce9", [], ""))
    assert "<title>caf\\udce9</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_is_written_as_utf_8(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("longer than the page")
    write_page(file, "→ é")
    assert file.read_bytes() == "→ é".encode()
    with pytest.raises(OSError, match="missing"):
        write_page(tmp_path / "missing" / "page.html", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_frame_holds_a_page_and_a_title(text):
    ((tag, attributes),) = Outline(in_frame(f"<p>{text}</p>", 300, text)).tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == f"<p>{text}</p>"
    assert attributes["title"] == text
    assert "height: 300px" in attributes["style"]


def test_a_table_has_a_row_for_each_row_and_keeps_texts():
    html = table([["<b>", 1], ["two\nlines", 2.5]], ["name", "number"])
    outline = Outline(html)
    assert [tag for tag, _ in outline.tags] == ["table", "tr", "th", "th", "tr", "td", "td", "tr", "td", "td"]
    assert outline.texts == ["name", "number", "<b>", "1", "two\nlines", "2.5"]
    aligned = [attributes["style"].split(";")[0] for tag, attributes in outline.tags if tag == "td"]
    assert aligned == ["text-align: left", "text-align: right"] * 2
    assert "<th" not in table([["a"]])
    assert table([]) == "<table></table>"
