"""Hooks of mkdocs: root files as pages, and links out of docs/.

``INCLUDED`` lists the pages that are files at the top of the repository. Links in any page to files of the repository
that are not in docs/ lead to the repository, so that the same text works there and on the site. Pictures from
``benchmarks/results`` are copied into the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_PAGES = {file: page for page, file in INCLUDED.items()}
_FENCE = re.compile(r"^ *(```|~~~)")
_TARGET = re.compile(r"""(?P<before>\]\(|\b(?:src|srcset|href)=["'])(?P<target>[^)\s"'#:]+)(?P<after>[#)\s"'])""")
_PICTURES = ("benchmarks/results",)


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the pictures of the repository that pages show."""
    for folder in _PICTURES:
        for path in sorted((ROOT / folder).glob("*.svg")):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **kwargs: Any) -> str:
    """Return the text of a page, with links that work on the site."""
    included = INCLUDED.get(page.file.src_uri)
    if included is not None:
        markdown = (ROOT / included).read_text(encoding="utf-8")
    source = included or posixpath.join("docs", page.file.src_uri)
    lines, in_fence = [], False
    for line in markdown.split("\n"):
        in_fence ^= _FENCE.match(line) is not None
        lines.append(line if in_fence else _TARGET.sub(lambda link: _linked(link, source, page, config, files), line))
    return "\n".join(lines)


def _linked(link: re.Match[str], source: str, page: Any, config: Any, files: Files) -> str:
    """Return a link to a page of the site, a copied picture, or a file in the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
    on_site = _PAGES.get(path, path.removeprefix("docs/"))
    if on_site != path or files.get_file_from_path(path) is not None:
        target = posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or ".")
    elif (ROOT / path).exists():
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        target = f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"
    else:
        return link[0]  # mkdocs reports it
    return link["before"] + target + link["after"]
