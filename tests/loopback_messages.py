"""Requests and answers of a web server on the loopback, as data."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.loopback_bodies import Body


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    target: str
    """Path and query, as they were sent."""
    headers: Mapping[str, str]
    """The headers by their names in lower case."""
    body: Body
    scheme: str = "http"

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query_string(self) -> str:
        return urlsplit(self.target).query

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.query_string, keep_blank_values=True))

    def without(self, header: str) -> Asked:
        return replace(self, headers={name: value for name, value in self.headers.items() if name != header})


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of an open file, which is closed when they are sent."""

    file: BinaryIO
    start: int
    stop: int


class Cut(NamedTuple):
    """How an answer ends after a share of its body."""

    how: str
    """"close", "reset", "stall", or "hang up" after the whole body."""
    after: float = 1.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Span = b""
    cut: Cut | None = None

    @property
    def nbytes(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stop - self.body.start

    def discard(self) -> None:
        if isinstance(self.body, Span):
            self.body.file.close()


class Face(Protocol):
    def answer(self, asked: Asked) -> Answer: ...

    def file(self, asked: Asked) -> Path | None:
        """Return the file that a request names."""


class Faulty(Protocol):
    def apply(self, asked: Asked, face: Face) -> tuple[str | None, Answer | None]:
        """Return the name of a fault, or None, and the answer; no answer closes the connection."""


@dataclass
class Request:
    """A request as the server recorded it."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    connection: int
    """Number of its connection, from 1."""
    status: int | None = None
    """None if there was no answer."""
    sent: int = 0
    """Bytes of the body that were sent."""
    received: int = 0
    fault: str | None = None

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def host(self) -> str:
        """Return the name of the host that the client asked, without the port."""
        return self.headers.get("host", "").partition(":")[0]

    @property
    def has_credentials(self) -> bool:
        return "authorization" in self.headers or "cookie" in self.headers


def read_request(connection: socket.socket, reader: BinaryIO, pace: Callable[[int], None], scheme: str) -> Asked | None:
    """Read the head of a request; return None if the client closed the connection."""
    words = reader.readline(1 << 16).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers: dict[str, str] = {}
    while line := reader.readline(1 << 16).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    go_on = lambda: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")  # noqa: E731
    return Asked(words[0], words[1], headers, Body(reader, headers, go_on, pace), scheme)
