"""Answers with the bytes of a file: ranges, conditions, and the headers that identify its version.

Source: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

from tests.loopback_messages import Answer, Asked, Span

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def file_below(folder: Path, name: str) -> Path | None:
    """Return a file of a folder by its relative name, or None if there is none."""
    path = folder / name
    return path if ".." not in path.parts and folder in path.parents and path.is_file() else None


def etag_of(status: os.stat_result) -> str:
    """Return the quoted ETag of a file's version: other content, or the same written again, has another one."""
    return f'"{status.st_mtime_ns:016x}{status.st_ino & 0xFFFFFFFF:08x}{status.st_size:08x}"'


def file_answer(
    asked: Asked, path: Path, headers: Mapping[str, str] | None = None, *, ranges: bool = True, validators: bool = True
) -> Answer:
    """Return the answer to GET or HEAD of a file that exists."""
    file = path.open("rb", buffering=0)
    status = os.fstat(file.fileno())
    etag, modified = etag_of(status), formatdate(status.st_mtime, usegmt=True)
    headers = dict(headers or {})
    if validators:
        headers = {"ETag": etag, "Last-Modified": modified} | headers
    if ranges:
        headers["Accept-Ranges"] = "bytes"
    refusal = _unmet(asked.headers, headers.get("ETag"), status.st_mtime)
    if refusal is not None:
        file.close()
        return Answer(refusal, headers)
    span = _span(asked.headers, headers, status.st_size) if ranges else None
    if span is None:
        return Answer(200, headers, Span(file, 0, status.st_size))
    if not span:
        file.close()
        return Answer(416, headers | {"Content-Range": f"bytes */{status.st_size}"})
    return _part(file, span, status.st_size, headers)


def _part(file: BinaryIO, span: range, size: int, headers: Mapping[str, str]) -> Answer:
    place = {"Content-Range": f"bytes {span.start}-{span.stop - 1}/{size}"}
    return Answer(206, {**headers, **place}, Span(file, span.start, span.stop))


def _unmet(asked: Mapping[str, str], etag: str | None, modified: float) -> int | None:
    """Return 412 or 304 if a condition of the request does not hold."""
    if "if-match" in asked:
        if not _matches(asked["if-match"], etag):
            return 412
    elif "if-unmodified-since" in asked and int(modified) > _seconds(asked["if-unmodified-since"]):
        return 412
    if "if-none-match" in asked:
        return 304 if _matches(asked["if-none-match"], etag) else None
    if "if-modified-since" in asked and int(modified) <= _seconds(asked["if-modified-since"]):
        return 304
    return None


def _matches(tags: str, etag: str | None) -> bool:
    return tags == "*" or etag in [tag.strip() for tag in tags.split(",")]


def _seconds(date: str) -> float:
    return parsedate_to_datetime(date).timestamp()


def _span(asked: Mapping[str, str], headers: Mapping[str, str], size: int) -> range | None:
    """Return the range of a request: None is the whole file, and an empty range cannot be answered."""
    text = asked.get("range")
    if text is None or asked.get("if-range") not in (None, headers.get("ETag"), headers.get("Last-Modified")):
        return None
    if "," in text:
        return range(0)
    found = _RANGE.fullmatch(text)
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)
