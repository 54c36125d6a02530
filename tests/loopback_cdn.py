"""A content network on the loopback: files behind URLs that are signed, and that expire.

The server that links to it signs: ``cdn.link(path)`` returns a URL for GET and HEAD, ``cdn.upload(path)`` one for PUT.
An Authorization header beside a signature is refused, as S3 refuses it.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback_faults import xml_error
from tests.loopback_files import etag_of, file_answer
from tests.loopback_messages import Answer, Asked


@dataclass
class Grant:
    methods: tuple[str, ...]
    path: Path
    uses: int | None
    """Number of requests that are left; None for any number."""
    end: float
    """Time of the clock when it expires."""


@dataclass
class Cdn:
    uses: int | None = None
    """Number of requests that each link is good for; None for any number."""
    seconds: float = 3600
    """Time until a link expires."""
    url: str = ""
    grants: dict[str, Grant] = field(default_factory=dict)
    _using: threading.Lock = field(default_factory=threading.Lock)

    def link(self, path: Path) -> str:
        return self._sign(("GET", "HEAD"), path, self.uses)

    def upload(self, path: Path) -> str:
        return self._sign(("PUT",), path, None)

    def expire(self) -> None:
        """Let all links so far expire."""
        for grant in self.grants.values():
            grant.uses = 0

    def _sign(self, methods: tuple[str, ...], path: Path, uses: int | None) -> str:
        name, end = uuid.uuid4().hex, time.time() + self.seconds
        self.grants[name] = Grant(methods, path, uses, end)
        return f"{self.url}/repos/{name[:4]}/{name}?Expires={int(end)}&Signature={name}&Key-Pair-Id=K1"

    def file(self, asked: Asked) -> Path | None:
        grant = self.grants.get(asked.query.get("Signature", ""))
        return grant and grant.path

    def answer(self, asked: Asked) -> Answer:
        grant = self.grants.get(asked.query.get("Signature", ""))
        if "authorization" in asked.headers:
            return xml_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if grant is None or asked.method not in grant.methods:
            return xml_error(403, "AccessDenied", "Access Denied")
        if not self._take(grant):
            return xml_error(403, "AccessDenied", "Request has expired")
        if asked.method == "PUT":
            asked.body.save(grant.path)
            return Answer(200, {"ETag": etag_of(grant.path.stat())})
        if not grant.path.is_file():
            return xml_error(404, "NoSuchKey", "The specified key does not exist.")
        return file_answer(asked, grant.path)

    def _take(self, grant: Grant) -> bool:
        """Count a use of a link; return whether it is still good."""
        with self._using:
            if grant.uses == 0 or time.time() > grant.end:
                return False
            grant.uses = grant.uses and grant.uses - 1
        return True
