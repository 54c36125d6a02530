"""A Hub on this machine: the requests of huggingface_hub that list files, download them and read ranges of them.

``with serve({"org/name": directory}) as hub`` starts it. ``use(hub, cache, monkeypatch)`` directs huggingface_hub in
this process to it, ``environment(hub, cache)`` that of another process. ``hub.requests`` lists requests and answers.

Source: huggingface_hub 1.33.0, ``repo_info``, ``list_repo_tree``, ``get_hf_file_metadata``, ``http_get``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from tests.loopback import running

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.*)?)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    sent: int
    """Bytes of the body that were sent."""


@dataclass
class Hub:
    repositories: Mapping[str, Path]
    token: str | None = None
    """Token that a reader must send; None if anyone may read."""
    takes_ranges: bool = True
    url: str = ""
    _requests: list[Request] = field(default_factory=list)
    _answers: threading.Condition = field(default_factory=threading.Condition)
    _unfinished: int = 0
    """Number of answers that are being sent."""

    @property
    def requests(self) -> list[Request]:
        """All requests so far. A client may have an answer a moment before it is recorded, so this waits for that."""
        with self._answers:
            assert self._answers.wait_for(lambda: not self._unfinished, timeout=60)
            return self._requests

    @contextmanager
    def answering(self) -> Iterator[Callable[[Request], None]]:
        """Yield the function that records a request, while its answer is sent."""
        with self._answers:
            self._unfinished += 1
        try:
            yield self._requests.append
        finally:
            with self._answers:
                self._unfinished -= 1
                self._answers.notify_all()

    @property
    def sent(self) -> int:
        """Return the bytes of all bodies so far."""
        return sum(request.sent for request in self.requests)

    def files(self, name: str) -> dict[str, Path]:
        root = self.repositories[name]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def nbytes(self, name: str) -> int:
        """Return the bytes of all files of a repository."""
        return sum(path.stat().st_size for path in self.files(name).values())

    def commit(self, name: str) -> str:
        """Return the hash of its only commit, which depends on the names and sizes of the files."""
        text = [f"{path}: {file.stat().st_size}" for path, file in self.files(name).items()]
        return hashlib.sha1("\n".join([name, *text]).encode()).hexdigest()

    def requests_of(self, ending: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(ending)]


@contextmanager
def serve(repositories: Mapping[str, Path], **settings: Any) -> Iterator[Hub]:
    """Serve a Hub with one commit of each of these directories, called "main"."""
    hub = Hub(repositories, **settings)
    with running(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Return the environment of a process that uses this Hub and keeps its downloads in ``cache``."""
    unwanted = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    """Direct this process to the Hub, which has already read its environment."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name in ("NO_PROXY", "no_proxy"):
        patch.setenv(name, "*")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        name = (api or file or [None, ""])[1]
        if self.hub.token is not None and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._refuse(401, "GatedRepo")
        if name not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        commit = self.hub.commit(name)
        revision = (api[3] if api else file[2]) if api or file else None
        if revision not in (None, "main", commit):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._answer_json(self._tree(name) if api[2] == "tree" else self._info(name, commit))
        path = self.hub.files(name).get(file[3]) if file else None
        if path is None:
            return self._refuse(404, "EntryNotFound")
        return self._answer_file(path, commit)

    do_HEAD = do_GET

    def _info(self, name: str, commit: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.hub.files(name)]
        return {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    def _tree(self, name: str) -> list[dict[str, Any]]:
        files = self.hub.files(name).items()
        return [{"type": "file", "path": p, "size": f.stat().st_size, "oid": _etag(f)} for p, f in files]

    def _answer_file(self, file: Path, commit: str) -> None:
        size = file.stat().st_size
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = _RANGE.fullmatch(self.headers.get("Range", "")) if self.hub.takes_ranges else None
        if asked is None:
            return self._answer(200, headers, file, 0, size)
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= size:
            return self._answer(416, {"Content-Range": f"bytes */{size}"}, None, 0, 0)
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return self._answer(206, headers, file, start, stop)

    def _answer_json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), 0, None)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": code}, None, 0, 0)

    def _answer(self, status: int, headers: dict[str, str], body: Path | bytes | None, start: int, stop: int | None):
        """Send a part of a body, or only its length, and record what was sent."""
        size = len(body) if isinstance(body, bytes) else (stop or 0) - start
        with self.hub.answering() as record:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            sent = 0
            if body is not None and self.command == "GET":
                with suppress(ConnectionError):  # a client that has enough closes the connection
                    for part in [body] if isinstance(body, bytes) else _parts(body, start, size):
                        self.wfile.write(part)
                        sent += len(part)
            record(Request(self.command, self.path, self.headers.get("Range"), sent))


def _parts(path: Path, start: int, nbytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while nbytes:
            part = file.read(min(nbytes, 1 << 20))
            nbytes -= len(part)
            yield part


def _etag(path: Path) -> str:
    """Return a hash as long as that of a file that is not stored in git itself."""
    return hashlib.sha256(f"{path}: {path.stat().st_size}".encode()).hexdigest()
