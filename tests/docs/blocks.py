"""The code blocks of a page of documentation, with what to do with each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

RUN = ("python", "bash")
SHOWN = ("text", "console", "toml", "yaml", "json", "dockerfile", "diff", "markdown", "ini", "html")
"""Languages of blocks that are not run."""

NEEDS_GPU = "<!-- needs a GPU -->"
_NEEDS = re.compile(r".*<!-- needs (\w+) -->", re.DOTALL)
_TITLE = re.compile(r"""\btitle=(["'])(.+?)\1""")
# Content of admonitions and tabs, which Python-Markdown indents by four spaces.
_CONTAINER = re.compile(r"( *)(?:!!!|\?\?\?\+?|===) ?\S")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    """Number of the first line of the code in the page, from 1."""

    title: str | None
    """File that the block is written to, instead of running it; or None."""

    needs_gpu: bool
    needs_package: str | None
    """Package without which the block is only compiled; or None."""

    expected: str | None
    """Expected output, or None if the page states none."""


class PageError(Exception):
    """A code block that would not be checked as its author meant it."""


def blocks_of(text: str, page: str) -> list[Block]:
    """Return the blocks of a page that run or are written to files, in order.

    Raises:
        PageError: a block has no known language, or is marked as code by its indentation.
    """
    tokens = MarkdownIt("commonmark").parse(_without_containers(text))
    for token in tokens:
        if token.type == "code_block":
            raise PageError(f"{page}:{_line(token)}: code in an indented paragraph. do: put it in a fence")
        if token.type == "fence" and _language(token) not in (*RUN, *SHOWN):
            raise PageError(
                f"{page}:{_line(token)}: unknown language {_language(token)!r}. "
                f"do: one of {', '.join((*RUN, *SHOWN))}; 'text' for anything else"
            )
    return [
        _block(token, before, after)
        for before, token, after in _with_neighbours(tokens)
        if token.type == "fence" and _language(token) in RUN
    ]


def _block(token: Token, before: Token | None, after: Token | None) -> Block:
    title = _TITLE.search(token.info) if _language(token) == "python" else None
    states_output = after is not None and after.type == "fence" and _language(after) == "text"
    mark = before.content.strip() if before is not None and before.type == "html_block" else ""
    package = _NEEDS.fullmatch(mark)
    return Block(
        language=_language(token),
        code=token.content,
        line=_line(token) + 1,
        title=title[2] if title else None,
        needs_gpu=mark.endswith(NEEDS_GPU),
        needs_package=package[1] if package else None,
        expected=after.content if states_output and not title and after is not None else None,
    )


def _with_neighbours(tokens: list[Token]) -> Iterator[tuple[Token | None, Token, Token | None]]:
    padded = [None, *tokens, None]
    for before, (token, after) in zip(padded, pairwise(padded[1:]), strict=False):
        if token is not None:
            yield before, token, after


def _language(token: Token) -> str:
    return token.info.partition(" ")[0]


def _line(token: Token) -> int:
    """Return the number of the line on which a token begins, from 1."""
    return token.map[0] + 1 if token.map else 0


def _without_containers(text: str) -> str:
    """Remove the indentation of the content of admonitions and tabs, inner ones too; lines keep their numbers."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if match := _CONTAINER.match(line):
            indent = match[1] + 4 * " "
            for inner in range(number + 1, len(lines)):
                if lines[inner].strip() and not lines[inner].startswith(indent):
                    break
                lines[inner] = lines[inner].removeprefix(indent)
    return "\n".join(lines)
