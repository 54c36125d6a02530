"""A web server on this machine that serves the files of a folder, with or without ranges.

``with serve(folder) as web`` starts it; ``web.url`` is the URL of the folder. ``web.requests`` lists the requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.loopback import running

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Request(NamedTuple):
    method: str
    name: str
    """Path of the file in the folder."""
    query: str
    range: tuple[int, int] | None
    """First byte and the byte after the last."""


@dataclass
class Web:
    folder: Path
    takes_ranges: bool = True
    takes_head: bool = True
    query: str | None = None
    """Query that every request must have; None if any will do."""
    authorization: str | None = None
    """Authorization header that every request must have; None if any will do."""
    absent_status: int = 404
    """Status of the answers for files that do not exist."""
    status: int | None = None
    """Status of all answers instead of the usual ones."""
    missing_bytes: int = 0
    """Bytes at the end of each weight file that are promised but not sent."""
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    """Bytes of all bodies so far."""
    url: str = ""

    def of(self, ending: str, method: str = "GET") -> list[Request]:
        return [one for one in self.requests if one.name.endswith(ending) and one.method == method]


@contextmanager
def serve(folder: Path, **settings: Any) -> Iterator[Web]:
    web = Web(folder, **settings)
    with running(type("Handler", (_Handler,), {"web": web})) as url:
        web.url = f"{url}/models/tiny"
        yield web


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        web, url = self.web, urlsplit(self.path)
        name = url.path.removeprefix("/models/tiny/")
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        span = (int(asked[1]), int(asked[2]) + 1) if asked else None
        web.requests.append(Request(self.command, name, url.query, span))
        path = web.folder / name
        status = web.status or (403 if web.query not in (None, url.query) else None)
        if web.authorization not in (None, self.headers["Authorization"]):
            status = status or 401
        status = status or (405 if self.command == "HEAD" and not web.takes_head else None)
        status = status or (web.absent_status if not path.is_file() else None)
        if status is not None:
            return self._answer(status, {}, b"")
        data = path.read_bytes()
        if span is None or not web.takes_ranges:
            return self._answer(200, {}, data)
        first, stop = span[0], min(span[1], len(data))
        headers = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
        missing = web.missing_bytes if name.endswith(".safetensors") and stop == len(data) else 0
        return self._answer(206, headers, data[first : stop - missing])

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that refuses the body closes the connection
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])
                    self.web.sent += len(body[start : start + (1 << 16)])
