"""Pages of the names below a folder, as object stores list them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote


class Page(NamedTuple):
    entries: list[tuple[str, bool]]
    """Names in the order of their bytes, and whether they are common prefixes."""
    next: str | None
    """Token of the next page."""
    most: int
    encode: Callable[[str], str]
    """Names as the answer has them."""


def keys_of(folder: Path) -> list[str]:
    """Return the relative names of all files, in the order of their bytes."""
    keys = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(keys, key=str.encode)


def list_page(folder: Path, query: Mapping[str, str]) -> Page:
    """Return the page that a query of ListObjectsV2 asks for."""
    most = min(int(query.get("max-keys") or 1000), 1000)
    after = base64.urlsafe_b64decode(query.get("continuation-token", "")).decode()
    prefix, delimiter, start = query.get("prefix", ""), query.get("delimiter", ""), query.get("start-after", "")
    keys = [key for key in keys_of(folder) if key.startswith(prefix) and key.encode() > start.encode()]
    entries = dict(_entry(key, prefix, delimiter) for key in keys)
    rest = [entry for entry in entries.items() if entry[0].encode() > after.encode()]
    page = rest[:most]
    more = base64.urlsafe_b64encode(page[-1][0].encode()).decode() if page and len(rest) > most else None
    return Page(page, more, most, quote if query.get("encoding-type") == "url" else str)


def _entry(key: str, prefix: str, delimiter: str) -> tuple[str, bool]:
    end = key.find(delimiter, len(prefix)) if delimiter else -1
    return (key, False) if end < 0 else (key[: end + len(delimiter)], True)
