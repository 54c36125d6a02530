"""Join a template, styles, scripts and data to one page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from automodel_conv.errors import printable

FilePath: TypeAlias = "str | PathLike[str]"

_ASSETS = files("automodel_conv.pictures") / "assets"


def page(title: str, template: str, styles: Sequence[str], scripts: Sequence[str], data: object) -> str:
    """Return an HTML page with its styles, scripts and data inside.

    The data is compressed JSON. Scripts read it as ``DATA``, a text in base64.

    Args:
        title: title of the page.
        template: name of the asset with the body of the page.
        styles: names of the assets with style sheets.
        scripts: names of the assets with scripts, in the order in which they run.
        data: value to show, as ``json`` accepts it.
    """
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 6, mtime=0)
    script = "\n".join([f'const DATA = "{base64.b64encode(packed).decode()}";', *map(_asset, scripts)])
    return document(title, styles, f"{_asset(template)}<script>\n{script}</script>")


def document(title: str, styles: Sequence[str], body: str) -> str:
    """Return an HTML page with its styles inside.

    Args:
        title: title of the page.
        styles: names of the assets with style sheets.
        body: HTML of the body.
    """
    style = "\n".join(map(_asset, styles))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(printable(title))}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def write_page(file: FilePath, html: str) -> None:
    """Write a page to a file; an existing file is replaced."""
    Path(file).write_text(html, encoding="utf-8")


def in_frame(html: str, height: int, title: str) -> str:
    """Return a frame with a page inside, for the output of a notebook.

    Args:
        html: the page.
        height: height of the frame in pixels.
        title: what the frame shows, for readers of screens.
    """
    style = f"width: 100%; height: {height}px; border: 1px solid #8884; border-radius: 6px"
    return f'<iframe srcdoc="{escape(html)}" title="{escape(title)}" style="{style}" loading="lazy"></iframe>'


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Return a table of texts as HTML; the first column is aligned to the left, all others to the right."""
    cells = [[("th", text) for text in header]] if header else []
    cells += [[("td", text) for text in row] for row in rows]
    lines = []
    for row in cells:
        line = ""
        for column, (tag, text) in enumerate(row):
            style = f"text-align: {'right' if column else 'left'}; white-space: pre-line"
            line += f'<{tag} style="{style}">{escape(str(text))}</{tag}>'
        lines.append(f"<tr>{line}</tr>")
    return f"<table>{''.join(lines)}</table>"
