"""Faults of a web server: which request gets which, and what it does to the answer.

``Faults([RESET, None, busy("0.1")])`` is for the first three requests, ``Faults({7: SHORT})`` for the eighth, and
``Faults.random(seed, probability=0.2)`` for each with a probability. The fault of the n-th request depends only on n.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from tests.loopback_messages import Answer, Asked, Cut, Face, Span

BUSY_CODES = {429: "TooManyRequests", 500: "InternalError", 502: "BadGateway", 503: "SlowDown", 504: "GatewayTimeout"}


@dataclass(frozen=True)
class Fault:
    name: str
    answer: Answer | None = None
    """Answer instead of the usual one."""
    cut: Cut | None = None
    """End of the usual answer."""
    lasting: bool = False
    """All later requests get it as well."""

    def from_then_on(self) -> Fault:
        return replace(self, lasting=True)


def xml_error(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error as S3 answers it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message></Error>'
    return Answer(status, {"Content-Type": "application/xml", **(headers or {})}, body.encode())


def busy(retry_after: str | None = "0", status: int = 429) -> Fault:
    """Return an answer that asks to try again; ``retry_after`` is in seconds, also a fraction."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Fault(f"busy {status}", xml_error(status, BUSY_CODES[status], "Please try again.", headers))


def failing(status: int) -> Fault:
    return Fault(f"failing {status}", busy(None, status).answer)


def cut(how: str, after: float = 0.5) -> Fault:
    """Return an end of the body after a share of it: "close", "reset" or "stall"."""
    return Fault(how, cut=Cut(how, after))


NO_ANSWER = Fault("no answer")
"""Closes the connection before the answer."""
RESET = cut("reset")
SHORT = cut("close")
STALL = cut("stall")
"""Stops in the middle of the body, until the client closes the connection or the server stops."""
HANG_UP = cut("hang up", 1.0)
"""Closes the connection after a whole answer that says it stays open."""
SHIFTED = Fault("shifted")
"""States a range that begins one byte later."""
OTHER_SIZE = Fault("other size")
"""States a file that is one byte larger."""
WHOLE = Fault("whole")
"""Answers 200 with the whole file."""
CHANGED = Fault("changed")
"""Inverts all bytes of the file, in the folder, before the answer. Its ETag changes as well."""
EXPIRED = Fault("expired", xml_error(403, "AccessDenied", "Request has expired"))
EXPIRED_TOKEN = Fault("expired token", xml_error(400, "ExpiredToken", "The provided token has expired."))
DENIED = Fault("denied", xml_error(403, "AccessDenied", "Access Denied"))
UNAUTHORIZED = Fault("unauthorized", xml_error(401, "Unauthorized", "Unauthorized"))
ELSEWHERE = Fault("elsewhere")
"""Redirects to another name of the host, which asks for no credentials, and sets a cookie."""
LOOP = Fault("loop")
"""Redirects to the same file without end."""

PASSING = (
    *(busy(after) for after in ("0", "0.05", None)),
    *map(failing, (500, 502, 503, 504)),
    *(NO_ANSWER, RESET, SHORT, HANG_UP, ELSEWHERE, cut("reset", 0.0), cut("close", 0.99)),
)
"""Faults after which the same request succeeds, without waiting for a time limit."""
LASTING = tuple(
    one.from_then_on() for one in (EXPIRED, EXPIRED_TOKEN, DENIED, UNAUTHORIZED, SHIFTED, OTHER_SIZE, WHOLE)
)
WRONG = (*LASTING, CHANGED, LOOP)
"""Faults after which a load cannot succeed."""


class Faults:
    """Faults by the number of a request, from 0. Only requests whose path has the ``ending`` count."""

    def __init__(
        self,
        schedule: Sequence[Fault | None] | Mapping[int, Fault] | Callable[[int], Fault | None],
        *,
        ending: str = "",
        method: str | None = None,
    ):
        if not callable(schedule):
            entries = dict(schedule if isinstance(schedule, Mapping) else enumerate(schedule))
            schedule = entries.get
        self._schedule, self._ending, self._method = schedule, ending, method
        self._count, self._lasting, self._counting = 0, None, threading.Lock()
        self.dealt: list[tuple[int, str]] = []
        """Number of the request and name of the fault."""

    @classmethod
    def random(
        cls, seed: int, probability: float = 0.2, kinds: Sequence[Fault] = PASSING, *, stop: int | None = None, **which
    ) -> Faults:
        """Return faults for requests before the ``stop``-th; each gets one with this probability."""

        def schedule(number: int) -> Fault | None:
            chance = random.Random(f"{seed} {number}")
            is_hit = chance.random() < probability and (stop is None or number < stop)
            return chance.choice(kinds) if is_hit else None

        return cls(schedule, **which)

    def apply(self, asked: Asked, face: Face) -> tuple[str | None, Answer | None]:
        """Return the name of the fault of a request, or None, and the answer."""
        fault = self._next(asked)
        if fault is None:
            return None, face.answer(asked)
        return fault.name, _answer(fault, asked, face)

    def _next(self, asked: Asked) -> Fault | None:
        if "loop" in asked.query:
            return LOOP
        if not asked.path.endswith(self._ending) or self._method not in (None, asked.method):
            return None
        with self._counting:
            fault = self._lasting or self._schedule(self._count)
            if fault is not None and fault.name == ELSEWHERE.name and "redirected" in asked.query:
                fault = None
            if fault is not None:
                self.dealt.append((self._count, fault.name))
                self._lasting = fault if fault.lasting else None
            self._count += 1
        return fault


def _answer(fault: Fault, asked: Asked, face: Face) -> Answer | None:
    if fault.name == NO_ANSWER.name:
        return None
    if fault.answer is not None:
        return fault.answer
    if fault.name in (ELSEWHERE.name, LOOP.name):
        return _redirect(asked, fault.name == LOOP.name)
    if fault.name == CHANGED.name and (path := face.file(asked)) is not None:
        invert(path)
    answer = face.answer(asked.without("range") if fault.name == WHOLE.name else asked)
    if fault.name == SHIFTED.name:
        return _restate(answer, 1, 0)
    if fault.name == OTHER_SIZE.name:
        return _restate(answer, 0, 1)
    return replace(answer, cut=fault.cut)


def _redirect(asked: Asked, loops: bool) -> Answer:
    """Return a redirect to the same file, under the other name of the host if it does not loop."""
    host = urlsplit(f"//{asked.headers['host']}")
    name, added = host.hostname, "loop=1" if loops else "redirected=1"
    if not loops:
        name = "localhost" if name == "127.0.0.1" else "127.0.0.1"
    path, _, query = asked.target.partition("?")
    query = query if added in query else "&".join(filter(None, [query, added]))
    location = f"{asked.scheme}://{name}:{host.port}{path}?{query}"
    return Answer(302, {"Location": location, "Set-Cookie": "session=secret; Path=/"})


def _restate(answer: Answer, shift: int, larger: int) -> Answer:
    """Return an answer with another Content-Range, if it has one and a body."""
    if not isinstance(answer.body, Span) or "Content-Range" not in answer.headers:
        return answer
    size = int(answer.headers["Content-Range"].rpartition("/")[2]) + larger
    start, stop = answer.body.start + shift, answer.body.stop + shift
    return replace(answer, headers={**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def invert(path: Path) -> None:
    """Invert all bytes of a file: readers that have it open keep the old ones."""
    other = path.with_name(f"{path.name}.inverted")
    other.write_bytes(path.read_bytes().translate(bytes(range(255, -1, -1))))
    os.replace(other, path)
