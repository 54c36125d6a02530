"""A web server of threads and sockets on the loopback: one thread a connection, bodies by ``sendfile``.

``with listening(face, latency=0.02) as server`` starts it; ``server.url`` has no slash at its end. A face has
``answer(asked)``, which returns an ``Answer``. The server counts requests, bytes and connections, and ends answers as
faults say.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tests.loopback_messages import Answer, Asked, Face, Faulty, Request, read_request
from tests.loopback_tls import make_certificate

STEP = 256 << 10
"""Bytes that wait for the limit of the bandwidth at a time."""


@dataclass(frozen=True)
class Limits:
    """The limits that all connections of a server share."""

    latency: float = 0
    """Seconds before each answer."""
    gb_per_s: float | None = None
    """Bodies of all connections together, in both directions."""
    connections: int | None = None
    """Largest number of open connections; a further one is answered with 503 and closed."""
    retry_after: str = "0"
    """Retry-After of that answer."""


class Server:
    """A server that listens; ``listening`` starts and stops it."""

    def __init__(self, face: Face, limits: Limits, faults: Faulty | None, context: ssl.SSLContext | None, port: int):
        self.face, self.limits, self.faults, self._context = face, limits, faults, context
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        scheme, port = ("https" if context else "http"), self._listener.getsockname()[1]
        self.url, self.elsewhere = (f"{scheme}://{host}:{port}" for host in ("127.0.0.1", "localhost"))
        """URLs under both names of the host."""
        self.certificate: Path | None = None
        """File that clients must trust."""
        self.stopping = threading.Event()
        self._requests: list[Request] = []
        self._answers = threading.Condition()
        self._unfinished = 0
        self._open: set[socket.socket] = set()
        self.connections = self.most_connections = self.refused_connections = 0
        self._free_at = 0.0
        self._pacing = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def open_connections(self) -> int:
        return len(self._open)

    @property
    def requests(self) -> list[Request]:
        """Return the list of all requests so far. It waits until the answers are recorded, at most 5 seconds."""
        with self._answers:
            self._answers.wait_for(lambda: not self._unfinished, timeout=5)
            return self._requests

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def of(self, ending: str, method: str = "GET") -> list[Request]:
        return [one for one in self.requests if one.path.endswith(ending) and one.method == method]

    def saw_credentials(self, host: str) -> bool:
        """Return whether a request to this name of the host had an Authorization header or cookies."""
        return any(one.has_credentials for one in self.requests if one.host == host)

    def counts(self) -> dict[str, int]:
        requests = self.requests
        statuses = {f"status_{status}": 0 for status in sorted({one.status or 0 for one in requests})}
        for one in requests:
            statuses[f"status_{one.status or 0}"] += 1
        return {
            "requests": len(requests),
            "sent": sum(one.sent for one in requests),
            "received": sum(one.received for one in requests),
            "connections": self.connections,
            "open_connections": self.open_connections,
            "most_connections": self.most_connections,
            "refused_connections": self.refused_connections,
        } | statuses

    def stop(self) -> None:
        self.stopping.set()
        for one in [self._listener, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def pace(self, nbytes: int) -> None:
        """Wait until the bandwidth that all connections share allows these bytes."""
        if self.limits.gb_per_s is None:
            return
        with self._pacing:
            now = time.perf_counter()
            self._free_at = max(self._free_at, now - 0.005) + nbytes / (self.limits.gb_per_s * 1e9)
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with self._answers:
                self._open.add(connection)
                self.connections += 1
                self.most_connections = max(self.most_connections, len(self._open))
                crowded = self.limits.connections is not None and len(self._open) > self.limits.connections
                self.refused_connections += crowded
                number = self.connections
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(
                threading.Thread(target=self._converse, args=(connection, number, crowded), daemon=True)
            )
            self._threads[-1].start()

    def _converse(self, connection: socket.socket, number: int, crowded: bool) -> None:
        """Answer the requests of one connection until one side closes it."""
        reader = connection.makefile("rb")
        try:
            with suppress(OSError):  # either side closes the connection, also in the middle of an answer
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                while self._exchange(connection, reader, number, crowded):
                    pass
        finally:
            reader.close()
            connection.close()
            with self._answers:
                self._open.discard(connection)

    def _exchange(self, connection: socket.socket, reader: BinaryIO, number: int, crowded: bool) -> bool:
        """Read a request and answer it; return whether the connection stays open."""
        asked = read_request(connection, reader, self.pace, "https" if self._context else "http")
        if asked is None:
            return False
        url = urlsplit(asked.target)
        record = Request(asked.method, asked.path, url.query, asked.headers, number)
        with self._answers:
            self._unfinished += 1
            self._requests.append(record)
        try:
            if self.limits.latency:
                time.sleep(self.limits.latency)
            answer = self._answer(asked, record, crowded)
            if answer is None:
                return False
            keep = not crowded and asked.headers.get("connection", "").lower() != "close"
            whole = self._send(connection, asked, answer, record, keep)
            keep = keep and whole and asked.body.drain()
        finally:
            record.received = asked.body.received
            with self._answers:
                self._unfinished -= 1
                self._answers.notify_all()
        if answer.cut is not None:
            self._cut(connection, answer.cut.how)
            return False
        return keep

    def _answer(self, asked: Asked, record: Request, crowded: bool) -> Answer | None:
        if crowded:
            return Answer(503, {"Retry-After": self.limits.retry_after})
        if self.faults is None:
            return self.face.answer(asked)
        record.fault, answer = self.faults.apply(asked, self.face)
        return answer

    def _send(self, connection: Any, asked: Asked, answer: Answer, record: Request, keep: bool) -> bool:
        """Send an answer, or the share before it is cut; return whether all of it was sent."""
        record.status = answer.status
        headers = {"Content-Length": str(answer.nbytes), "Connection": "keep-alive" if keep else "close"}
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**headers, **answer.headers}.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        nbytes = answer.nbytes if asked.method != "HEAD" and answer.status not in (204, 304) else 0
        if answer.cut is not None:
            nbytes = int(nbytes * answer.cut.after)
        try:
            if isinstance(answer.body, bytes):
                connection.sendall(head + answer.body[:nbytes])
                record.sent = nbytes
            else:
                connection.sendall(head)
                for sent in self._send_span(connection, answer.body.file, answer.body.start, nbytes):
                    record.sent += sent
        finally:
            answer.discard()
        return answer.cut is None

    def _send_span(self, connection: socket.socket, file: BinaryIO, start: int, nbytes: int) -> Iterator[int]:
        stop, step = start + nbytes, STEP if self.limits.gb_per_s is not None else 1 << 30
        while start < stop:
            count = min(step, stop - start)
            self.pace(count)
            while count:
                if self._context is None:
                    sent = os.sendfile(connection.fileno(), file.fileno(), start, count)
                else:
                    part = os.pread(file.fileno(), min(count, STEP), start)
                    connection.sendall(part)
                    sent = len(part)
                if not sent:
                    raise ConnectionError("the file is shorter than it was when its answer began")
                start, count = start + sent, count - sent
                yield sent

    def _cut(self, connection: socket.socket, how: str) -> None:
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        while how == "stall" and not self.stopping.is_set() and not _is_closed(connection):
            self.stopping.wait(0.02)


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the client has closed a connection on which it sends nothing."""
    ready = select.select([connection.fileno()], [], [], 0)[0]
    if not ready:
        return False
    try:
        return not socket.socket.recv(connection, 1, socket.MSG_PEEK)
    except OSError:
        return True


@contextmanager
def listening(
    face: Face, *, faults: Faulty | None = None, tls: bool = False, port: int = 0, **limits: Any
) -> Iterator[Server]:
    """Serve a face until the block ends; then all connections are closed. ``limits`` are those of ``Limits``."""
    with tempfile.TemporaryDirectory() as folder:
        context, certificate = make_certificate(Path(folder)) if tls else (None, None)
        server = Server(face, Limits(**limits), faults, context, port)
        server.certificate = certificate
        try:
            yield server
        finally:
            server.stop()
