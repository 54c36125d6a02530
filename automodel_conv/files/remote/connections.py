"""Connections to web servers: kept open between requests, and shared by the threads of a process.

The standard library sends the requests, because only its ``readinto`` receives a body straight into the memory where it
stays. ``python -m benchmarks.remote`` compares it with libraries that return bytes.
"""

from __future__ import annotations

import base64
import functools
import os
import socket
import ssl
import threading
import weakref
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from itertools import chain
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from automodel_conv.errors import size_text

CONNECT_SECONDS = 15.0
"""Longest wait for a connection."""
SILENT_SECONDS = 20.0
"""Longest wait for the next byte of an answer."""


class Traffic:
    """Counts of the requests that read a checkpoint."""

    def __init__(self):
        self.requests = self.retries = self.bytes_received = self.connections = self.most_connections = 0
        self._lock = threading.Lock()

    def add(self, *, requests: int = 0, retries: int = 0, bytes_received: int = 0, connections: int = 0) -> None:
        """Add to the counts; ``connections`` are those that are open now."""
        with self._lock:
            self.requests += requests
            self.retries += retries
            self.bytes_received += bytes_received
            self.connections += connections
            self.most_connections = max(self.most_connections, self.connections)

    def __repr__(self) -> str:
        return f"<Traffic: {self.requests} requests, {self.text()}>"

    def text(self) -> str:
        """Return the counts in a few words, for the end of a progress bar."""
        counts = f"{self.connections} connections, {self.retries} retries"
        return f"{size_text(self.bytes_received)} received, {counts}"


class WebError(OSError):
    """An error of a request that another one would meet too.

    Args:
        text: what happened.
        status: status of the answer; 0 if there is none.
    """

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status


class Origin(NamedTuple):
    """A web server, and the proxy before it."""

    scheme: str
    host: str
    port: int
    proxy: str | None


class Answer(NamedTuple):
    """The answer to one request, whose body has not been received yet."""

    response: HTTPResponse
    origin: Origin
    connection: HTTPConnection
    socket: socket.socket | None
    """Socket of the connection, which another thread may shut down."""


class Connections:
    """The connections to all web servers of one checkpoint.

    Args:
        traffic: counts what is sent and received.
    """

    def __init__(self, traffic: Traffic):
        self.traffic = traffic
        self.has_answered = False
        """Whether any server has answered, so that one that cannot be reached may come back."""
        self.stopped = threading.Event()
        """Set to end the opening of files: requests that fail are then not repeated."""
        self._idle: dict[Origin, list[HTTPConnection]] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    def send(self, method: str, parts: SplitResult, headers: dict[str, str]) -> Answer:
        """Send a request, and receive the head of the answer.

        Raises:
            OSError, http.client.HTTPException: there is no connection, or no answer.
            ValueError: a header has characters that cannot be sent.
        """
        origin = _origin(parts)
        connection = self._take(origin)
        was_idle = connection is not None
        try:
            if connection is None:
                connection = _connect(origin)
                self.traffic.add(connections=1)
            path = parts.path or "/"
            path += f"?{parts.query}" if parts.query else ""
            if origin.proxy is not None and origin.scheme == "http":
                headers = headers | _proxy_authorization(origin.proxy)
                path = f"http://{parts.netloc.rpartition('@')[2]}{path}"
            self.traffic.add(requests=1)
            connection.request(method, path, headers={"Accept-Encoding": "identity"} | headers)
            sock = connection.sock
            answer = Answer(connection.getresponse(), origin, connection, sock)
            self.has_answered = True
            return answer
        except BaseException as error:
            if connection is not None:
                connection.close()
                self.traffic.add(connections=-1)
            if was_idle and isinstance(error, ConnectionError):
                return self.send(method, parts, headers)  # the server has closed the idle connection
            raise

    def finish(self, answer: Answer) -> None:
        """Keep the connection of an answer if its whole body has been received; else close it."""
        response, origin, connection, _ = answer
        complete = response.isclosed() or response.length == 0
        if not complete or response.will_close or self._pid != os.getpid():
            response.close()
            connection.close()
            self.traffic.add(connections=-1)
            return
        response.close()
        with self._lock:
            self._idle.setdefault(origin, []).append(connection)

    def _take(self, origin: Origin) -> HTTPConnection | None:
        with self._lock:
            if self._pid != os.getpid():  # a forked process must not use the connections of its parent
                self._idle.clear()
                self._pid = os.getpid()
            idle = self._idle.get(origin)
            return idle.pop() if idle else None


def _close_all(idle: dict[Origin, list[HTTPConnection]]) -> None:
    for connection in chain.from_iterable(idle.values()):
        connection.close()


def _origin(parts: SplitResult) -> Origin:
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    return Origin(parts.scheme, host, port, proxy)


def _connect(origin: Origin) -> HTTPConnection:
    scheme, host, port, proxy = origin
    if proxy is not None:
        host, port = _address_of(proxy)
    if scheme == "https":
        connection = HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=_tls())
        if proxy is not None:
            connection.set_tunnel(origin.host, origin.port, _proxy_authorization(proxy))
    else:
        connection = HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    connection.connect()
    connection.sock.settimeout(SILENT_SECONDS)
    return connection


def _address_of(proxy: str) -> tuple[str, int]:
    """Return the host and the port of a proxy.

    Raises:
        WebError: it is no URL, or not the URL of an HTTP proxy.
    """
    try:
        at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if at.scheme == "http" and at.hostname:
            return at.hostname, at.port or 80
    except ValueError:  # its text may have a part of a password
        pass
    raise WebError("the proxy in the environment (http_proxy, https_proxy) is not http:// with a host and a port")


def _proxy_authorization(proxy: str) -> dict[str, str]:
    at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return {"Proxy-Authorization": basic(at.username, at.password or "")} if at.username else {}


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header, given a user and a password as a URL has them."""
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode("ascii")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the settings of TLS, which verify certificates by those of the system and of certifi, if installed."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context
