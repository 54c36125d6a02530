"""A file on a web server, read by range straight into the memory where its bytes stay.

An answer is received as it is needed: the request of a long range is sent once, and the reads of a thread follow each
other in its body. A connection that breaks continues with a request for the rest.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from automodel_conv.errors import ReadError, message
from automodel_conv.files.remote.connections import Connections
from automodel_conv.files.remote.requests import (
    PASSING_ERRORS,
    Address,
    Body,
    PassingFault,
    Retries,
    Version,
    WebError,
    request_range,
)
from automodel_conv.files.remote.urls import text_of
from automodel_conv.files.source import SMALL_RANGE_BYTES, Identity
from automodel_conv.files.waits import waiting

# Bytes that are received at once. A connection that breaks loses at most these.
_PIECE_BYTES = 1 << 20
# Bytes of small ranges that each thread keeps.
_RECEIVED_BYTES = 4 << 20
_RENEWABLE = (400, 401, 403)
"""Statuses of an address that has expired."""
_REFUSED = "the server refuses access; if the URL is signed, its signature has expired or is not valid"


class _FileChanged(WebError):
    """An answer of another version of a file than the one that was opened."""


class WebFile:
    """A file on a web server.

    Args:
        url: URL for error texts, without credentials.
        locate: returns the address of the file. It is called again if the address has expired.
        connections: connections to use.
        first_bytes: bytes of the first request, which should hold the header.
        keeps: an object that exists as long as the file does.
    """

    is_remote = True

    def __init__(
        self,
        url: str,
        locate: Callable[[], Address],
        connections: Connections,
        first_bytes: int,
        keeps: object = None,
    ):
        self.connections = connections
        self._url = url
        self._locate = locate
        self._first_bytes = first_bytes
        self._keeps = keeps
        self._address: Address | None = None
        self._version: Version | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"WebFile({self._url!r})"

    def describe(self) -> str:
        return self._url

    def identity(self) -> Identity:
        """Request the version of the file."""
        stream = Stream(self, 0, 1, pinned=False)
        try:
            stream.begin()
            version = stream.version
        finally:
            stream.close()
        return _identity_of(version)

    def pinned(self) -> str | None:
        """Return a text for the version of the file that was opened; None if the server states only its size."""
        version = self._version
        return None if version is None or version[1:] == (None, None) else _identity_of(version)

    def open(self) -> OpenWebFile:
        """Request the first bytes of the file, the first time.

        Raises:
            OSError: the file does not exist or cannot be read.
        """
        start = b""
        if self._version is None:
            stream = Stream(self, 0, self._first_bytes, stopped=self.connections.stopped)
            try:
                stream.begin()
                data = bytearray(min(self._first_bytes, stream.version.nbytes))
                stream.read_into(memoryview(data))
                start = bytes(data)
            finally:
                stream.close()
        return OpenWebFile(self, start)

    @property
    def nbytes(self) -> int:
        """Size of the file; it has been opened."""
        assert self._version is not None
        return self._version.nbytes

    def request(self, start: int, stop: int, *, pinned: bool) -> Body:
        """Send one request for a range; see ``request_range``.

        Args:
            start, stop: offsets in bytes.
            pinned: whether the file must be the same as at the first request.

        Raises:
            WebError: the file has changed, or see ``request_range``.
        """
        with self._lock:
            is_new = self._address is None
            address = self._address = self._address or self._locate()
        try:
            body = request_range(self.connections, address, start, stop)
        except PASSING_ERRORS as error:
            with self._lock:
                if self._address == address:
                    self._address = None  # it may be a redirect that has expired, or a host that is down
            if getattr(error, "status", 0) not in _RENEWABLE:
                raise
            if not is_new:
                raise PassingFault(text_of(error)) from None
            raise WebError(f"{error}: {_REFUSED}", error.status) from None  # type: ignore[union-attr]
        with self._lock:
            self._address = body.address
            if pinned and self._version is None:
                self._version = body.version
            before = self._version
        if pinned and before is not None and before.differs_from(body.version):
            self.connections.finish(body.answer)
            raise _FileChanged(
                f"the file has changed since it was opened: {_version_text(before)}, now {_version_text(body.version)}"
            )
        return body


def _identity_of(version: Version) -> str:
    return f"{version.nbytes} bytes, {version.etag or version.modified}"


def _version_text(version: Version) -> str:
    return ", ".join([f"{version.nbytes} bytes", *filter(None, version[1:])])


class Stream:
    """The bytes of a range of a file, in order, for one thread.

    Args:
        file: the file.
        start, stop: the range.
        pinned: whether the file must be the same as at the first request.
        stopped: event that ends the stream; None for one of its own.
    """

    def __init__(
        self, file: WebFile, start: int, stop: int, *, pinned: bool = True, stopped: threading.Event | None = None
    ):
        self.position, self.stop = start, stop
        self._file, self._pinned = file, pinned
        self._body: Body | None = None
        self._stopped = threading.Event() if stopped is None else stopped
        self._retries = Retries(file.connections, self._stopped)
        self._since_fault = 0
        """Bytes received since the last fault."""

    @property
    def version(self) -> Version:
        """Version of the file; the range has been requested."""
        assert self._body is not None
        return self._body.version

    def begin(self) -> Body:
        """Request the range if that has not been done.

        Raises:
            OSError: the range cannot be requested.
        """
        while self._body is None:
            self._raise_if_stopped()
            try:
                with waiting():
                    self._body = self._file.request(self.position, self.stop, pinned=self._pinned)
            except PASSING_ERRORS as error:
                self._retries.wait(error)
        return self._body

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes.

        Raises:
            OSError: the bytes cannot be read.
        """
        while len(view):
            response = self.begin().answer.response
            try:
                self._raise_if_stopped()  # what stops a stream sees no connection while it is requested
                count = response.readinto(view[:_PIECE_BYTES])
                self._raise_if_stopped()  # a TLS connection that is shut down receives what is still encrypted
                if not count:
                    raise PassingFault(f"the answer ends at byte {self.position} instead of {self.stop}")
            except PASSING_ERRORS as error:
                self.close()
                self._retries.wait(error)
                self._since_fault = 0
                continue
            self._since_fault += count
            if self._since_fault >= _PIECE_BYTES:
                self._retries.reset()
            self._file.connections.traffic.add(bytes_received=count)
            self.position += count
            view = view[count:]

    def _raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise WebError("the read was stopped")

    def skip_to(self, offset: int) -> None:
        """Receive the bytes before ``offset`` and throw them away."""
        if offset > self.position:
            junk = memoryview(bytearray(min(offset - self.position, _PIECE_BYTES)))
            while offset > self.position:
                self.read_into(junk[: offset - self.position])

    def close(self) -> None:
        """Give the connection back, or close it if bytes are left."""
        if self._body is not None:
            body, self._body = self._body, None
            self._file.connections.finish(body.answer)

    def stop_now(self) -> None:
        """End the read that another thread waits for; it raises OSError."""
        self._stopped.set()
        body = self._body
        if body is not None and body.answer.socket is not None:
            with suppress(OSError):
                body.answer.socket.shutdown(socket.SHUT_RDWR)


class _Expected(threading.local):
    """The ranges that one thread has stated, and those that it has begun to read."""

    def __init__(self):
        self.ranges: list[tuple[int, int]] = []
        self.streams: list[Stream] = []
        self.received: dict[int, memoryview] = {}
        """Small ranges that have been received whole, by their start; the latest ones."""


class OpenWebFile:
    """An open file on a web server, shared by threads."""

    def __init__(self, file: WebFile, start: bytes):
        self._file = file
        self._start = memoryview(start)
        self._expected = _Expected()
        self._streams: set[Stream] = set()
        """The streams of all threads."""
        self._is_aborted = False

    def size(self) -> int:
        return self._file.nbytes

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        own = self._expected
        for stream in own.streams:
            self._end(stream)
        own.ranges, own.streams, own.received = list(ranges), [], {}

    def read_into(self, views: list[memoryview], offset: int) -> None:
        total = sum(map(len, views))
        if not total:
            return
        if offset + total > self._file.nbytes:
            raise ReadError(
                message(
                    "a file ends too early",
                    expected=f"{total} bytes from byte {offset}",
                    found=f"{self._file.nbytes} bytes in all",
                    do="the file is truncated: upload it again",
                )
            )
        known = len(self._start) - offset
        if 0 < known < total and len(views) == 1:
            views[0][:known] = self._start[offset:]
            views, offset, total = [views[0][known:]], offset + known, total - known
        try:
            held = self._held(offset, offset + total)
            if held is None:
                self._receive(views, offset, offset + total)
                return
        except OSError as error:
            raise ReadError(message("bytes of a URL cannot be read", found=text_of(error), do=_advice(error))) from None
        for view in views:
            view[:], held = held[: len(view)], held[len(view) :]

    def _held(self, start: int, stop: int) -> memoryview | None:
        """Return bytes that have been received already; receive a small range of which these are a part."""
        if stop <= len(self._start):
            return self._start[start:stop]
        own = self._expected
        if not any(first <= start and stop <= first + len(data) for first, data in own.received.items()):
            range_of = self._take_range(start, stop, most_bytes=SMALL_RANGE_BYTES)
            if range_of is None:
                return None
            data = memoryview(bytearray(range_of[1] - range_of[0]))
            self._receive([data], *range_of)
            own.received[range_of[0]] = data
            while sum(map(len, own.received.values())) > _RECEIVED_BYTES:
                del own.received[next(iter(own.received))]
        for first, data in own.received.items():
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return None

    def _receive(self, views: list[memoryview], start: int, stop: int) -> None:
        """Fill ``views`` from the stream that these bytes follow in, or from a new one."""
        own = self._expected
        stream = next((one for one in own.streams if one.position <= start and stop <= one.stop), None)
        if stream is None:
            _, last = self._take_range(start, stop) or (start, stop)
            stream = Stream(self._file, start, last)
            own.streams.append(stream)
            self._streams.add(stream)
            if self._is_aborted:
                stream.stop_now()
        try:
            stream.skip_to(start)
            for view in views:
                stream.read_into(view)
        except BaseException:
            self._end(stream)
            raise
        if stream.position == stream.stop:
            own.streams.remove(stream)
            self._end(stream)

    def _take_range(self, start: int, stop: int, most_bytes: int | None = None) -> tuple[int, int] | None:
        """Remove and return the stated range that has these bytes; with ``most_bytes``, only a larger but small one."""
        for number, (first, last) in enumerate(self._expected.ranges):
            if first <= start and stop <= last:
                if most_bytes is not None and (last - first > most_bytes or (first, last) == (start, stop)):
                    return None
                return self._expected.ranges.pop(number)
        return None

    def _end(self, stream: Stream) -> None:
        stream.close()
        self._streams.discard(stream)

    def descriptor(self) -> int | None:
        return None

    def abort(self) -> None:
        self._is_aborted = True  # before the loop, so that no stream that begins now is missed
        for stream in tuple(self._streams):
            stream.stop_now()

    def close(self) -> None:
        self._start = memoryview(b"")
        for stream in tuple(self._streams):
            self._end(stream)
        self._expected = _Expected()


def _advice(error: OSError) -> str:
    status = getattr(error, "status", 0)
    if status in _RENEWABLE:
        return "check the access rights; if the URL is signed, ask for a new one"
    if isinstance(error, _FileChanged):
        return "load again, when nothing writes to the file any more"
    return "check the URL, the network and the server, then load again"
