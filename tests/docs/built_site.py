"""The files of the built site: links, anchors, and what a browser loads to show a page."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

SITE_URL = "https://automodel-conv.github.io/automodel_conv/"
REPOSITORY = "https://github.com/automodel-conv/automodel_conv"

_LOADED = {"src", "srcset", "data", "poster", "background"}
_LOADING_LINKS = {"stylesheet", "icon", "shortcut icon", "preload", "prefetch", "preconnect", "dns-prefetch"}
_LOADING_LINKS |= {"modulepreload", "manifest", "apple-touch-icon"}
_LOADING_TAGS = {"image", "use", "feimage"}
_IN_CSS = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Found(NamedTuple):
    """Something that a page names, and where."""

    line: int
    target: str


class Page(HTMLParser):
    """Ids, links and loaded files of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[Found] = []
        self.loads: list[Found] = []
        self.components: set[str] = set()
        self.classes: set[str] = set()
        self.images_without_text: list[Found] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        line = self.getpos()[0]
        self.ids |= {given[name] for name in ("id", "name") if name in given and (name == "id" or tag == "a")}
        self.classes |= {*given.get("class", "").split()}
        self.components |= {given.get("data-md-component", "")}
        loads = [given[name] for name in _LOADED & given.keys()]
        if tag == "link":
            loads += [given.get("href", "")] if given.get("rel", "") in _LOADING_LINKS else []
        elif tag in _LOADING_TAGS:
            loads += [given[name] for name in ("href", "xlink:href") if name in given]
        elif "href" in given:
            self.links.append(Found(line, given["href"]))
        if tag == "img" and not given.get("alt"):
            self.images_without_text.append(Found(line, given.get("src", "")))
        loads += loaded_by_css(given.get("style", ""))
        self.loads += [Found(line, part.split()[0]) for load in loads for part in load.split(",") if part.strip()]


def loaded_by_css(text: str) -> list[str]:
    """Return the targets of ``url()`` and ``@import``."""
    return [first or second for first, second in _IN_CSS.findall(text)]


def is_remote(target: str) -> bool:
    """Return whether a browser asks a host for a target, other than the one that serves the page."""
    parts = urlsplit(target)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


class Site:
    """A built site in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def pages(self) -> Mapping[str, Page]:
        """All pages by path, such as ``reference/loading/index.html``."""
        paths = sorted(self.root.rglob("*.html"))
        return {path.relative_to(self.root).as_posix(): Page(path.read_text("utf-8")) for path in paths}

    def broken_links(self) -> Iterator[str]:
        """Yield links within the site to a page, a file or an anchor that does not exist."""
        for name, page in self.pages.items():
            for line, target in page.links:
                if not is_remote(target) and (problem := self.problem_of(name, target)):
                    yield f"{name}:{line}: {target}: {problem}"

    def problem_of(self, page: str, target: str) -> str:
        """Return what is wrong with a link from a page of the site; empty if nothing is."""
        parts = urlsplit(target)
        prefix = urlsplit(SITE_URL).path
        path = unquote(parts.path)
        if path.startswith(prefix):
            path = path.removeprefix(prefix) or "."
        elif path.startswith("/"):
            return "outside of the site"
        else:
            path = posixpath.join(posixpath.dirname(page), path) if path else page
        path = posixpath.normpath(path)
        if (self.root / path).is_dir():
            path = posixpath.normpath(posixpath.join(path, "index.html"))
        if not (self.root / path).is_file():
            return "no such page"
        anchor = unquote(parts.fragment)
        if anchor and path in self.pages and anchor not in self.pages[path].ids and anchor != "__top":
            return "no such anchor"
        return ""

    def remote_loads(self) -> Iterator[str]:
        """Yield what HTML and CSS load from other hosts when a page is viewed."""
        for name, page in self.pages.items():
            yield from (f"{name}:{line}: {target}" for line, target in page.loads if is_remote(target))
        for path in self.root.rglob("*.css"):
            targets = loaded_by_css(path.read_text("utf-8"))
            yield from (f"{path.name}: {target}" for target in targets if is_remote(target))
        for path in self.root.rglob("*.svg"):
            targets = [load.target for load in Page(path.read_text("utf-8")).loads]
            yield from (f"{path.name}: {target}" for target in targets if is_remote(target))
