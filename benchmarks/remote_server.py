"""The servers of ``benchmarks.remote``, in a process of their own: files, a Hub and a bucket of S3, on the loopback.

    python -m benchmarks.remote_server FOLDER LATENCY GB_PER_S

serves the folders of FOLDER until its input ends, and prints JSON: the URL of each server. All are
``tests.loopback_wire``, with the same latency and bandwidth. ``counts`` answers with what the others have counted.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from benchmarks import measure
from tests.loopback_files import file_answer, file_below
from tests.loopback_messages import Answer, Asked
from tests.loopback_s3 import serve_s3
from tests.loopback_store import serve
from tests.loopback_wire import Server, listening

BUCKET, OWNER = "models", "bench"
"""The folders are ``s3://models/FOLDER`` and the repositories ``bench/FOLDER``."""
_COUNTED = ("requests", "sent", "connections")
_API = re.compile(rf"/api/models/{OWNER}/([^/]+)/(?:revision|tree)/[^/]+/?")
_FILE = re.compile(rf"/{OWNER}/([^/]+)/resolve/[^/]+/(.+)")


@dataclass(frozen=True)
class Hub:
    """A Hub with one commit of each folder, as far as huggingface_hub needs it to download them.

    Source: huggingface_hub 1.33.0, ``repo_info``, ``list_repo_tree``, ``get_hf_file_metadata``, ``http_get``.
    """

    folder: Path

    def file(self, asked: Asked) -> Path | None:
        found = _FILE.fullmatch(asked.path)
        return file_below(self.folder, f"{found[1]}/{found[2]}") if found else None

    def answer(self, asked: Asked) -> Answer:
        api = _API.fullmatch(asked.path)
        if api:
            return self._listed(api[1], "tree" in asked.path)
        path = self.file(asked)
        if path is None:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()
        return file_answer(asked, path, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(path.parent.name)})

    def _listed(self, name: str, as_tree: bool) -> Answer:
        files = [path for path in sorted((self.folder / name).iterdir()) if path.is_file()]
        tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _commit(p.name)} for p in files]
        siblings = [{"rfilename": path.name} for path in files]
        info = {"id": f"{OWNER}/{name}", "sha": _commit(name), "private": False, "tags": [], "siblings": siblings}
        body = json.dumps(tree if as_tree else info).encode()
        return Answer(200, {"Content-Type": "application/json"}, body)


@dataclass(frozen=True)
class Counts:
    """The counts of the servers, as JSON."""

    servers: Mapping[str, Server]

    def file(self, asked: Asked) -> Path | None:
        return None

    def answer(self, asked: Asked) -> Answer:
        counts = [server.counts() for server in self.servers.values()]
        total = {name: sum(count[name] for count in counts) for name in _COUNTED}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(total).encode())


def counts(url: str) -> dict[str, int]:
    """Return the requests, the bytes sent and the connections that all servers have counted so far."""
    with urlopen(url) as answer:
        return json.loads(answer.read())


@contextmanager
def serve_elsewhere(folder: str, latency: float, gb_per_s: float) -> Iterator[dict[str, str]]:
    """Start the servers in a process of their own, and yield their URLs: ``files``, ``hub``, ``s3`` and ``counts``."""
    command = [sys.executable, "-m", "benchmarks.remote_server", folder, str(latency), str(gb_per_s)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=measure.REPOSITORY
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(20)


def _commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def main() -> None:
    folder, latency, gb_per_s = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    limits = {"latency": latency, "gb_per_s": gb_per_s or None}
    with (
        serve(folder, **limits) as files,
        listening(Hub(folder), **limits) as hub,
        serve_s3(folder, BUCKET, **limits) as s3,
        listening(Counts({"files": files, "hub": hub, "s3": s3})) as counted,
    ):
        servers = {"files": files, "hub": hub, "s3": s3, "counts": counted}
        sys.stdout.write(json.dumps({name: server.url for name, server in servers.items()}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
