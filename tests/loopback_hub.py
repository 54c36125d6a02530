"""A Hub on this machine: the requests of huggingface_hub that list files, download them, read ranges and upload them.

``with serve({"org/name": directory}) as hub`` starts it. ``use(hub, cache, monkeypatch)`` directs huggingface_hub in
this process to it, ``environment(hub, cache)`` that of another process. ``hub.requests`` lists requests and answers.
With ``redirects=True`` weights come from another host, through links that expire (``tests.loopback_cdn``); its requests
are in ``hub.cdn_server.requests``. Uploads are in ``tests.loopback_hub_uploads``.

Source: huggingface_hub 1.33.0, ``repo_info``, ``list_repo_tree``, ``get_hf_file_metadata``, ``http_get``.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tests.loopback_cdn import Cdn
from tests.loopback_faults import Faults
from tests.loopback_files import file_answer
from tests.loopback_hub_uploads import HubUploads, answer_json, is_large
from tests.loopback_messages import Answer, Asked, Request
from tests.loopback_wire import Server, listening

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(/.*)?)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)")
_WRITES = ("preupload", "commit", "batch", "verify")


class Refusal(Exception):
    def __init__(self, status: int, code: str, text: str = ""):
        super().__init__(code)
        self.answer = Answer(status, {"X-Error-Code": code, "X-Error-Message": text or code})


@dataclass
class Hub:
    repositories: dict[str, Path]
    token: str | None = None
    """Token that a reader or writer must send; None if anyone may read and write."""
    takes_ranges: bool = True
    private: Collection[str] = ()
    """Repositories that do not exist for others."""
    gated: Collection[str] | None = None
    """Repositories whose files are for the token only; None: all, and their descriptions as well."""
    strangers: Collection[str] = ()
    """Tokens of users without access."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """New names of repositories, which the old ones redirect to."""
    redirects: bool = False
    """Large files come from the content network."""
    cdn: Cdn = field(default_factory=Cdn)
    server: Server | None = None
    cdn_server: Server = field(init=False)
    uploads: HubUploads = field(init=False)
    _commits: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.url if self.server else ""

    @property
    def requests(self) -> list[Request]:
        """All requests so far."""
        return self.server.requests

    @property
    def sent(self) -> int:
        """Return the bytes of all bodies so far."""
        return self.server.sent + self.cdn_server.sent

    def files(self, name: str) -> dict[str, Path]:
        root = self.repositories[name]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def nbytes(self, name: str) -> int:
        """Return the bytes of all files of a repository."""
        return sum(path.stat().st_size for path in self.files(name).values())

    def commit(self, name: str) -> str:
        """Return the hash of the last commit, which depends on the names and sizes of the files."""
        text = [f"{path}: {file.stat().st_size}" for path, file in self.files(name).items()]
        text += [str(self._commits[name])] if name in self._commits else []
        return hashlib.sha1("\n".join([name, *text]).encode()).hexdigest()

    def advance(self, name: str) -> str:
        """Let a new commit follow; return its hash."""
        self._commits[name] = self._commits.get(name, 0) + 1
        return self.commit(name)

    def requests_of(self, ending: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(ending)]

    def file(self, asked: Asked) -> Path | None:
        found = _FILE.fullmatch(asked.path)
        return self.files(found[1]).get(found[3]) if found and found[1] in self.repositories else None

    def answer(self, asked: Asked) -> Answer:
        try:
            return self._answer(asked)
        except Refusal as refusal:
            return refusal.answer

    def _answer(self, asked: Asked) -> Answer:
        if asked.path == "/api/complete_multipart":  # the query has its signature
            return self.uploads.complete(asked)
        if asked.path in ("/api/repos/create", "/api/whoami-v2", "/api/validate-yaml"):
            return self._account(asked)
        api, file, lfs = (pattern.fullmatch(asked.path) for pattern in (_API, _FILE, _LFS))
        found = api or file or lfs
        name, kind = (found[1], found[2]) if found else ("", None)
        if name in self.moved:
            return Answer(307, {"Location": asked.target.replace(name, self.moved[name], 1)})
        self._check_access(name, asked, reads_file=file is not None, writes=file is None and kind in _WRITES)
        if lfs:
            return self.uploads.batch(asked, name) if kind == "batch" else self.uploads.verify(asked)
        revision = (api[3] if api else file[2]) if api or file else None
        commit = self.commit(name)
        if revision not in (None, "main", commit):
            raise Refusal(404, "RevisionNotFound")
        if file is not None:
            return self._file(asked, commit)
        if kind in ("preupload", "commit"):
            return getattr(self.uploads, kind)(asked, name)
        if kind == "tree":
            return answer_json(self._tree(name))
        if kind == "paths-info":
            wanted = parse_qs(asked.body.read().decode())["paths"]
            return answer_json([entry for entry in self._tree(name) if entry["path"] in wanted])
        return answer_json(self._info(name, commit))

    def _account(self, asked: Asked) -> Answer:
        if self.token not in (None, _token(asked)):
            raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        if asked.path == "/api/repos/create":
            return self.uploads.create(asked)
        if asked.path == "/api/validate-yaml":
            return answer_json({"warnings": [], "errors": []})
        return answer_json({"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})

    def _check_access(self, name: str, asked: Asked, *, reads_file: bool, writes: bool) -> None:
        """Raise a refusal as the Hub words it: a private repository does not exist, a gated one does."""
        token = _token(asked)
        allowed, is_known = self.token in (None, token), token in self.strangers
        if name not in self.repositories:
            if allowed or self.gated is not None or self.private:
                raise Refusal(404, "RepoNotFound", "Repository not found")
            raise Refusal(401, "GatedRepo")
        if allowed:
            return
        if name in self.private:
            raise Refusal(404 if is_known else 401, "RepoNotFound", "Repository not found")
        if (self.gated is None and not self.private) or (reads_file and name in (self.gated or ())):
            raise Refusal(403 if is_known else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if writes:
            raise Refusal(403 if is_known else 401, "Forbidden", f"You may not write to {name}.")

    def _info(self, name: str, commit: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.files(name)]
        value = {"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings}
        gated = "manual" if name in (self.gated or ()) else False
        return value | {"private": name in self.private, "gated": gated}

    def _tree(self, name: str) -> list[dict[str, Any]]:
        return [self._entry(path, file) for path, file in self.files(name).items()]

    def _entry(self, path: str, file: Path) -> dict[str, Any]:
        size, oid = file.stat().st_size, _etag(file)
        entry = {"type": "file", "path": path, "size": size, "oid": oid}
        if self.redirects and is_large(path, size):
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
        return entry

    def _file(self, asked: Asked, commit: str) -> Answer:
        path = self.file(asked)
        if path is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag, size = f'"{_etag(path)}"', path.stat().st_size
        headers = {"ETag": etag, "X-Repo-Commit": commit}
        if not self.redirects or not is_large(path.name, size):
            return file_answer(asked, path, headers, ranges=self.takes_ranges)
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(size), "Accept-Ranges": "bytes"}
        return Answer(302, {**headers, "Location": self.cdn.link(path)}, b"Found. Redirecting.")


def _token(asked: Asked) -> str | None:
    return asked.headers.get("authorization", "").removeprefix("Bearer ") or None


def _etag(path: Path) -> str:
    """Return a hash as long as that of a file that is not stored in git itself; it changes with the file."""
    status = path.stat()
    return hashlib.sha256(f"{path}: {status.st_size} {status.st_mtime_ns} {status.st_ino}".encode()).hexdigest()


@contextmanager
def serve(
    repositories: Mapping[str, Path],
    *,
    link_uses: int | None = None,
    link_seconds: float = 3600,
    part_size: int = 16 << 20,
    faults: Faults | None = None,
    cdn_faults: Faults | None = None,
    latency: float = 0,
    gb_per_s: float | None = None,
    **settings: Any,
) -> Iterator[Hub]:
    """Serve a Hub with these directories as repositories, at a revision "main".

    A link to the other host is good for ``link_uses`` requests and ``link_seconds``. Uploads of more than ``part_size``
    bytes have parts. ``settings`` are those of ``Hub``.
    """
    hub = Hub(dict(repositories), cdn=Cdn(link_uses, link_seconds), **settings)
    limits = {"latency": latency, "gb_per_s": gb_per_s}
    with (
        tempfile.TemporaryDirectory() as folder,
        listening(hub.cdn, faults=cdn_faults, **limits) as hub.cdn_server,
        listening(hub, faults=faults, **limits) as hub.server,
    ):
        hub.cdn.url = hub.cdn_server.elsewhere
        hub.uploads = HubUploads(hub, Path(folder), part_size)
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
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("NO_PROXY", "no_proxy"):
        patch.setenv(name, "*")
