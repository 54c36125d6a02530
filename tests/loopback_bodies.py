"""Bodies of requests: with a length, in chunks, and in the signed chunks of S3.

Sources: RFC 9112, section 7.1; "Signature calculations for the Authorization header: transferring payload in multiple
chunks" in the API reference of Amazon S3.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

PART = 256 << 10


class Body:
    """The body of a request, which is read from its connection at most once."""

    def __init__(
        self, reader: BinaryIO, headers: Mapping[str, str], go_on: Callable[[], None], pace: Callable[[int], None]
    ):
        self._waits = headers.get("expect", "").lower() == "100-continue"
        self._go_on, self._pace = go_on, pace
        self._rest = _decoded(reader, headers)
        self.received = 0

    def parts(self) -> Iterator[bytes]:
        if self._waits:
            self._waits = False
            self._go_on()
        for part in self._rest:
            self._pace(len(part))
            self.received += len(part)
            yield part

    def read(self) -> bytes:
        return b"".join(self.parts())

    def save(self, path: Path) -> int:
        """Write the body to a file and return its number of bytes."""
        with path.open("wb", buffering=0) as file:
            for part in self.parts():
                file.write(part)
            return file.tell()

    def drain(self) -> bool:
        """Read what is left; return False if the client still waits to be asked for it."""
        if self._waits:
            return False
        for _ in self.parts():
            pass
        return True


def _decoded(reader: BinaryIO, headers: Mapping[str, str]) -> Iterator[bytes]:
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    signed = headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
    if chunked and signed:
        yield from _chunks(io.BytesIO(b"".join(_chunks(reader))))
    elif chunked or signed:
        yield from _chunks(reader)
    else:
        yield from _parts(reader, int(headers.get("content-length", 0)))


def _chunks(reader: BinaryIO) -> Iterator[bytes]:
    """Yield the content of chunks; a size may have a signature behind it, and headers may follow the last chunk."""
    while size := int(reader.readline(1 << 16).split(b";")[0], 16):
        yield from _parts(reader, size)
        reader.readline(1 << 16)
    while reader.readline(1 << 16).strip():
        pass


def _parts(reader: BinaryIO, nbytes: int) -> Iterator[bytes]:
    while nbytes:
        part = reader.read(min(nbytes, PART))
        if not part:
            raise ConnectionError("the client closed the connection within the body of a request")
        nbytes -= len(part)
        yield part
