"""One request to a web server: redirects, statuses, retries, and whether the answer has the bytes asked for."""

from __future__ import annotations

import logging
import random
import re
import ssl
import threading
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from time import time
from typing import NamedTuple

from automodel_conv.files.remote.connections import Answer, Connections, WebError, basic
from automodel_conv.files.remote.urls import joined, split_web_url, text_of, without_secrets
from automodel_conv.files.waits import waiting

_LOG = logging.getLogger(__name__)

ATTEMPTS = 8
"""Requests in a row that may fail before a read is given up."""
FIRST_ATTEMPTS = 3
"""The same if no server has answered yet: the URL may be wrong."""
FIRST_WAIT_SECONDS = 0.2
"""Longest wait after the first failure; it doubles with each further one."""
_MOST_WAIT_SECONDS = 20.0
_MOST_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504, 509)
"""Statuses of faults that may pass."""
_REDIRECTS = (301, 302, 303, 307, 308)
_OF_ANY_HOST = ("user-agent", "accept")
"""Headers that another host may see; any other may have credentials."""
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")
_CODE = re.compile(rb"<(Code|Message)>([^<]{1,200})</")
_MOST_ERROR_BYTES = 4096
_NO_RANGES = "the server ignores ranges and sends the whole file; download the files, or serve them with ranges"


class Address(NamedTuple):
    """The URL of a file, and the headers of each request for it."""

    url: str
    headers: dict[str, str]


class Version(NamedTuple):
    """Size, ETag and time of a file, as an answer states them; if they differ, so do the bytes."""

    nbytes: int
    """Size of the file."""
    etag: str | None
    modified: str | None
    """The ``Last-Modified`` header."""

    def differs_from(self, other: Version) -> bool:
        """Return whether any value that both have is different.

        Equal strong ETags are of equal bytes, whatever the time. Source: RFC 9110, section 8.8.1.
        """
        if self.etag is not None and self.etag == other.etag and not self.etag.startswith("W/"):
            return self.nbytes != other.nbytes
        return any(None not in pair and pair[0] != pair[1] for pair in zip(self, other, strict=True))


class PassingFault(Exception):
    """A fault that another request may not meet.

    Args:
        text: what happened.
        wait_seconds: how long the server asks to wait.
    """

    def __init__(self, text: str, wait_seconds: float = 0.0):
        super().__init__(text)
        self.wait_seconds = wait_seconds


class Body(NamedTuple):
    """An answer whose body has the bytes that were asked for."""

    answer: Answer
    address: Address
    """The address after all redirects."""
    version: Version


PASSING_ERRORS = (PassingFault, OSError, HTTPException)
"""Errors of a request, or of receiving its body, that may pass, unless ``is_final``."""


def is_final(error: BaseException) -> bool:
    """Return whether another request would meet the same error, such as a certificate that is not trusted."""
    return isinstance(error, (WebError, ssl.SSLCertVerificationError))


def wait_seconds(failures: int, error: BaseException) -> float:
    """Return the seconds to wait after a number of failures in a row: random, so that clients do not come together."""
    longest = min(_MOST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
    asked = min(_MOST_WAIT_SECONDS, getattr(error, "wait_seconds", 0.0))
    return max(asked, longest * random.uniform(0.5, 1.0))


def request_range(connections: Connections, address: Address, start: int, stop: int) -> Body:
    """Request the bytes of a file from ``start`` to ``stop``, or to its end if that comes first.

    Args:
        connections: connections to use.
        address: address of the file. Redirects are followed; another host does not see credentials.
        start, stop: offsets in bytes; at least one byte.

    Returns:
        The answer, whose body follows. If ``start`` is beyond the end of the file, the body is empty.

    Raises:
        WebError: another request would be answered in the same way.
        PassingFault, OSError, http.client.HTTPException: another request may be answered.
    """
    answer, address = _follow(connections, address, {"Range": f"bytes={start}-{stop - 1}"})
    response = answer.response
    etag, modified = response.getheader("ETag"), response.getheader("Last-Modified")
    stated = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
    try:
        if response.status == 416 and stated and start >= int(stated[3]):
            return Body(answer, address, Version(int(stated[3]), etag, modified))
        if response.status == 200:
            raise WebError(_NO_RANGES, 200)
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise WebError("the server compresses the file, so its ranges are not those of the file")
        if response.status != 206:
            raise WebError(_status_text(answer), response.status)
        if stated is None or not stated[1]:
            raise PassingFault("the answer does not state the size of the file")
        first, last, nbytes = int(stated[1]), int(stated[2]), int(stated[3])
        if (first, last + 1) != (start, min(stop, nbytes)):
            raise PassingFault(f"bytes {first} to {last + 1} of {nbytes} instead of {start} to {stop}")
        return Body(answer, address, Version(nbytes, etag, modified))
    except BaseException:
        connections.finish(answer)
        raise


def fetch_whole(connections: Connections, address: Address, most_bytes: int) -> bytes:
    """Return a whole small file, or its first ``most_bytes`` and one more.

    Raises:
        WebError, PassingFault, OSError, http.client.HTTPException: see ``request_range``.
    """
    answer, _ = _follow(connections, address, {})
    try:
        if answer.response.status != 200:
            raise WebError(_status_text(answer), answer.response.status)
        if answer.response.getheader("Content-Encoding", "identity") != "identity":
            raise WebError("the server compresses the file, although it was asked not to")
        expected = answer.response.length
        data = answer.response.read(most_bytes + 1)
        connections.traffic.add(bytes_received=len(data))
        if expected is not None and len(data) < min(expected, most_bytes + 1):
            raise PassingFault(f"{len(data)} bytes instead of {expected}")
        return data
    finally:
        connections.finish(answer)


def _follow(connections: Connections, address: Address, headers: dict[str, str]) -> tuple[Answer, Address]:
    """Send a GET request, follow redirects, and raise for statuses that may pass."""
    for _ in range(_MOST_REDIRECTS + 1):
        parts = split_web_url(address.url)
        own = dict(address.headers)
        if parts.username is not None and "authorization" not in {name.lower() for name in own}:
            own["Authorization"] = basic(parts.username, parts.password or "")
        try:
            answer = connections.send("GET", parts, own | headers)
        except OSError:  # that of a certificate is a ValueError too
            raise
        except ValueError:  # its text may be that of a header, with credentials
            text = "a header of the request, such as a token, has a line break or other letters than latin-1"
            raise WebError(text) from None
        response = answer.response
        if response.status in _REDIRECTS:
            connections.finish(answer)
            address = _redirected(address, response.getheader("Location"), response.status)
            continue
        if response.status in _PASSING:
            wait = _retry_after(response.getheader("Retry-After"))
            text = _status_text(answer)
            connections.finish(answer)
            raise PassingFault(text, wait)
        return answer, address
    raise WebError(f"more than {_MOST_REDIRECTS} redirects")


def _redirected(address: Address, location: str | None, status: int) -> Address:
    if not location:
        raise WebError(f"{status}: a redirect without an address", status)
    before = split_web_url(address.url)
    try:
        url = joined(address.url, location)
        after = split_web_url(url)
    except ValueError:
        raise WebError(f"{status}: a redirect that is not to the URL of a web server", status) from None
    if before.scheme == "https" and after.scheme == "http":
        raise WebError(f"{status}: a redirect from https to http, to {without_secrets(url)}", status)
    if (before.scheme, before.hostname, before.port) == (after.scheme, after.hostname, after.port):
        if before.username is not None and after.username is None:
            url = after._replace(netloc=before.netloc).geturl()
        return Address(url, address.headers)
    kept = {name: value for name, value in address.headers.items() if name.lower() in _OF_ANY_HOST}
    return Address(url, kept)


def _retry_after(value: str | None) -> float:
    """Return the seconds of a ``Retry-After`` header: a number, or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError):
        return 0.0


def _status_text(answer: Answer) -> str:
    """Return the status of an answer, with the code and the message that object stores add in XML."""
    response = answer.response
    text = f"{response.status} {response.reason}".strip()
    try:
        found = dict(_CODE.findall(response.read(_MOST_ERROR_BYTES)))
    except (OSError, HTTPException):
        found = {}
    details = [found[name].decode("utf-8", "replace") for name in (b"Code", b"Message") if name in found]
    return without_secrets(": ".join([text, *details]))


class Retries:
    """The failures in a row of one read.

    Args:
        connections: connections that the read uses.
        stopped: event after which nothing is tried again.
    """

    def __init__(self, connections: Connections, stopped: threading.Event):
        self._connections = connections
        self._stopped = stopped
        self._failures = 0

    def reset(self) -> None:
        """Record that bytes were received."""
        self._failures = 0

    def wait(self, error: BaseException) -> None:
        """Wait before the next attempt.

        Raises:
            OSError: there is no further attempt.
        """
        if is_final(error):
            raise error
        self._failures += 1
        most = ATTEMPTS if self._connections.has_answered else FIRST_ATTEMPTS
        if self._failures >= most:
            raise WebError(f"{self._failures} requests in a row failed; the last one: {text_of(error)}") from None
        self._connections.traffic.add(retries=1)
        seconds = wait_seconds(self._failures, error)
        _LOG.info("a request failed and is repeated in %.1f s: %s", seconds, text_of(error))
        with waiting():
            is_stopped = self._stopped.wait(seconds)
        if is_stopped:
            raise WebError(f"the read was stopped after: {text_of(error)}") from None


def fetch_with_retries(connections: Connections, address: Address, most_bytes: int) -> bytes:
    """Return a small file, see ``fetch_whole``; repeat the request while it meets faults that may pass.

    Raises:
        OSError: the fault does not pass, or is final.
    """
    retries = Retries(connections, connections.stopped)
    while True:
        try:
            return fetch_whole(connections, address, most_bytes)
        except PASSING_ERRORS as error:
            retries.wait(error)
