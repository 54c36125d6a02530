"""A web server whose answers a test changes, and a proxy before it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.loopback_messages import Answer, Asked
from tests.loopback_store import Folder
from tests.loopback_wire import Server, listening

Change = Callable[[Asked, Answer], Answer]


@dataclass(frozen=True)
class Scripted(Folder):
    """A folder, with each answer as a function returns it."""

    change: Change = lambda asked, answer: answer

    def answer(self, asked: Asked) -> Answer:
        return self.change(asked, super().answer(asked))


@contextmanager
def scripted(folder: Path, change: Change, **limits: Any) -> Iterator[Server]:
    with listening(Scripted(Path(folder), change=change), **limits) as server:
        yield server


def only(ending: str, change: Change) -> Change:
    """Return a change of the answers for files with this ending."""
    return lambda asked, answer: change(asked, answer) if asked.path.endswith(ending) else answer


def with_headers(**headers: str | None) -> Change:
    """Return a change of headers, with ``_`` for ``-`` in their names; None removes one."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def change(asked: Asked, answer: Answer) -> Answer:
        merged = {**answer.headers, **named}
        return replace(answer, headers={name: value for name, value in merged.items() if value is not None})

    return change


@dataclass
class Proxy:
    url: str = ""
    heads: list[str] = field(default_factory=list)
    """The heads of all requests, with their headers."""
    refuses: str | None = None
    """Status line of all answers instead of the real ones."""


@contextmanager
def proxy(**settings: Any) -> Iterator[Proxy]:
    """Run a proxy for ``http``, one request a connection, and for ``CONNECT``."""
    own = Proxy(**settings)
    listener = socket.create_server(("127.0.0.1", 0))
    own.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    opened: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            opened.append(connection)
            threading.Thread(target=_relay, args=(connection, own, opened), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield own
    finally:
        for one in (listener, *opened):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        thread.join(5)


def _relay(client: socket.socket, own: Proxy, opened: list[socket.socket]) -> None:
    with suppress(OSError):
        head = b""
        while b"\r\n\r\n" not in head:
            part = client.recv(1 << 16)
            if not part:
                return
            head += part
        text = head.decode("latin-1")
        own.heads.append(text)
        if own.refuses is not None:
            client.sendall(f"HTTP/1.1 {own.refuses}\r\nContent-Length: 0\r\n\r\n".encode())
            client.close()
            return
        method, target, _ = text.split(" ", 2)
        place = target if method == "CONNECT" else target.split("/", 3)[2]
        host, _, port = place.rpartition(":")
        server = socket.create_connection((host, int(port)))
        opened.append(server)
        if method == "CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = "/" + target.split("/", 3)[3]
            server.sendall(f"{method} {path} {text.split(' ', 2)[2]}".encode("latin-1"))
        back = threading.Thread(target=_pump, args=(server, client), daemon=True)
        back.start()
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
