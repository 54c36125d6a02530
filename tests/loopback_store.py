"""A fast web server on the loopback that serves the files of a folder by range, with limits and faults.

In this process::

    with serve(folder, latency=0.02, gb_per_s=1.0, faults=Faults([RESET])) as store:
        store.url, store.requests, store.most_connections

In a process of its own: ``with serve_elsewhere(folder, latency=0.02) as store`` has ``store.url`` and
``store.counts()``; ``python -m tests.loopback_store FOLDER`` prints the URL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.loopback_faults import Faults
from tests.loopback_files import file_answer, file_below
from tests.loopback_gcs import serve_gcs
from tests.loopback_messages import Answer, Asked
from tests.loopback_s3 import serve_s3
from tests.loopback_wire import Server, listening

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Folder:
    """The files of a folder, as a web server shows them."""

    folder: Path
    authorization: str | None = None
    """Authorization header that every request must have; None if any will do."""
    query: str | None = None
    """Query that every request must have; None if any will do."""
    takes_ranges: bool = True
    takes_head: bool = True
    validators: bool = True
    """ETag and Last-Modified are sent."""

    def file(self, asked: Asked) -> Path | None:
        return file_below(self.folder, asked.path.lstrip("/"))

    def answer(self, asked: Asked) -> Answer:
        if asked.method not in ("GET", "HEAD") or (asked.method == "HEAD" and not self.takes_head):
            return Answer(405, {"Allow": "GET, HEAD" if self.takes_head else "GET"})
        if "redirected" not in asked.query:
            if self.authorization not in (None, asked.headers.get("authorization")):
                return Answer(401, {"WWW-Authenticate": "Bearer"})
            if self.query not in (None, asked.query_string):
                return Answer(403)
        path = self.file(asked)
        if path is None:
            return Answer(404)
        return file_answer(asked, path, ranges=self.takes_ranges, validators=self.validators)


@contextmanager
def serve(
    folder: Path,
    *,
    faults: Faults | None = None,
    latency: float = 0,
    gb_per_s: float | None = None,
    connections: int | None = None,
    retry_after: str = "0",
    tls: bool = False,
    port: int = 0,
    **settings: Any,
) -> Iterator[Server]:
    """Serve a folder in threads of this process; ``settings`` are those of ``Folder``."""
    limits = {"latency": latency, "gb_per_s": gb_per_s, "connections": connections, "retry_after": retry_after}
    with listening(Folder(Path(folder), **settings), faults=faults, tls=tls, port=port, **limits) as server:
        yield server


@dataclass
class Elsewhere:
    """A server in a process of its own."""

    url: str
    pid: int
    certificate: Path | None
    _process: Any = field(repr=False)

    def counts(self) -> dict[str, int]:
        """Return the counts of the server, as ``Server.counts`` does."""
        self._process.stdin.write("counts\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def serve_elsewhere(folder: Path, **options: Any) -> Iterator[Elsewhere]:
    """Start the command line of this module with these options, such as ``gb_per_s=1`` for ``--gb-per-s 1``."""
    command = [sys.executable, "-m", "tests.loopback_store", str(folder), "--stdin"]
    for name, value in options.items():
        if value is not None and value is not False:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        first = json.loads(process.stdout.readline())
        certificate = Path(first["certificate"]) if first["certificate"] else None
        try:
            yield Elsewhere(first["url"], process.pid, certificate, process)
        finally:
            process.stdin.close()
            process.wait(20)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loopback_store", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0, help="seconds before each answer")
    parser.add_argument("--gb-per-s", type=float, help="bandwidth that all connections share")
    parser.add_argument("--connections", type=int, help="largest number of open connections")
    parser.add_argument("--retry-after", default="0", help="Retry-After for connections above that number")
    parser.add_argument("--authorization", help="Authorization header that every request must have")
    parser.add_argument("--query", help="query that every request must have")
    parser.add_argument("--s3", metavar="BUCKET", help="the S3 API instead, with the folder as this bucket")
    parser.add_argument("--gcs", metavar="BUCKET", help="the API of Google Cloud Storage instead, likewise")
    parser.add_argument("--tls", action="store_true", help="https with a certificate that is signed by itself")
    parser.add_argument("--seed", type=int, help="seed of random faults")
    parser.add_argument("--probability", type=float, default=0.1, help="probability of a fault, with --seed")
    parser.add_argument("--stdin", action="store_true", help="answer each line of the input by counts; end with it")
    options = vars(parser.parse_args(arguments))
    listens, seed, probability = options.pop("stdin"), options.pop("seed"), options.pop("probability")
    options["faults"] = None if seed is None else Faults.random(seed, probability)
    with _serve_kind(options) as server:
        certificate = server.certificate and str(server.certificate)
        if not listens:
            print(server.url, *filter(None, [certificate]), flush=True)
            threading.Event().wait()
        print(json.dumps({"url": server.url, "certificate": certificate}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(server.counts()), flush=True)


def _serve_kind(options: dict[str, Any]) -> AbstractContextManager[Server]:
    """Serve the folder by the API that the options name."""
    buckets = {"s3": options.pop("s3"), "gcs": options.pop("gcs")}
    if not any(buckets.values()):
        return serve(**options)
    if options.pop("authorization") or options.pop("query"):
        raise SystemExit("--authorization and --query are for files, not for the API of a bucket")
    kind, bucket = next(item for item in buckets.items() if item[1])
    return {"s3": serve_s3, "gcs": serve_gcs}[kind](options.pop("folder"), bucket, **options)


if __name__ == "__main__":
    main()
