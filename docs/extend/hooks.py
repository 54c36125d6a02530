"""Hooks of mkdocs: root files as pages, and links out of docs/.

``INCLUDED`` lists the pages that are files at the top of the repository. Links in any page to files of the repository
that are not in docs/ lead to the repository, so that the same text works there and on the site. Pictures from
``benchmarks/results`` are copied into the site. A line ``<!-- options of load -->`` becomes the usage and the options
of that command, and ``<!-- fields of LoadResult -->`` a table of the fields of that object in the JSON of commands.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

ROOT = Path(__file__).parents[2]
INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_PAGES = {file: page for page, file in INCLUDED.items()}
_FENCE = re.compile(r"^ *(```|~~~)")
_TARGET = re.compile(r"""(?P<before>\]\(|\b(?:src|srcset|href)=["'])(?P<target>[^)\s"'#:]+)(?P<after>[#)\s"'])""")
_OPTIONS = re.compile(r"^<!-- options of ([\w-]+(?: [\w-]+)*) -->$", re.MULTILINE)
_FIELDS = re.compile(r"^<!-- fields of (\w+) -->$", re.MULTILINE)
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
    markdown = _OPTIONS.sub(lambda marker: _options_of(marker[1]), markdown)
    markdown = _FIELDS.sub(lambda marker: _fields_of(marker[1]), markdown)
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


def _fields_of(name: str) -> str:
    """Return a table of the fields of an object."""
    _find_the_package()
    from docs.extend.cli_schema import fields_of

    return fields_of(name)


def _find_the_package() -> None:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def _options_of(command: str) -> str:
    """Return usage, arguments and options of a command, without the heading and the text above them."""
    _find_the_package()
    from automodel_conv.cli.app import app

    group: Any = get_command(app)
    context, prefix = typer.Context(group, info_name="automodel-conv"), "automodel-conv"
    *groups, name = command.split()
    for part in groups:
        group, prefix = group.commands[part], f"{prefix} {part}"
    text = get_docs_for_click(obj=group.commands[name], ctx=context, call_prefix=prefix)
    return text[text.index("**Usage**") :]
