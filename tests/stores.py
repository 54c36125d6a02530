"""An S3 server in a process of its own, and what it holds.

``with serve_s3() as server`` starts moto's server; it needs the packages ``moto[server]`` and ``s3fs``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

BUCKET = "bucket"
SECRET = "wJalrXUtnFEMI/K7MDENG"
_RUNNING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@dataclass
class S3Server:
    url: str

    @property
    def options(self) -> dict[str, Any]:
        """Options with which s3fs speaks to the server; it tries a request again only once."""
        retries = {"retries": {"max_attempts": 1}}
        return {"key": "AKIAIOSFODNN7", "secret": SECRET, "endpoint_url": self.url, "config_kwargs": retries}

    @property
    def system(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(**self.options, use_listings_cache=False)

    def files(self, folder: str) -> dict[str, bytes]:
        """Return the bytes of the files below a folder by their relative names."""
        system, path = self.system, f"{BUCKET}/{folder}/"
        system.invalidate_cache()
        return {name.removeprefix(path): system.cat_file(name) for name in system.find(path)}

    def put(self, folder: str, name: str, data: bytes = b"data") -> None:
        self.system.call_s3("put_object", Bucket=BUCKET, Key=f"{folder}/{name}", Body=data)

    def open_uploads(self, folder: str = "") -> list[str]:
        """Return the keys of the uploads that are neither completed nor aborted."""
        answer = self.system.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=folder)
        return sorted(one["Key"] for one in answer.get("Uploads", ()))


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Start a server with one bucket that takes parts of any size."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        names = {"PYTHONPATH": os.pathsep.join(sys.path), "S3_UPLOAD_PART_MIN_SIZE": "1"}
        with subprocess.Popen(command, env=os.environ | names, stdout=log, stderr=log) as process:
            try:
                server = S3Server(_url(log, process))
                server.system.call_s3("create_bucket", Bucket=BUCKET)
                yield server
            finally:
                process.kill()


def _url(log: Any, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        if found := _RUNNING.search(log.read()):
            return found[1]
        time.sleep(0.02)
    log.seek(0)
    raise RuntimeError(f"moto's server does not listen: {log.read()}")


def watch_calls(
    patch: pytest.MonkeyPatch,
    before: Callable[[int, str], None] = lambda number, method: None,
    after: Callable[[int, str], None] = lambda number, method: None,
) -> list[str]:
    """Pass each request of s3fs, counted from 1, to ``before`` and ``after``; return the list of their methods."""
    import s3fs

    real, seen = s3fs.S3FileSystem.call_s3, []

    def call(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        seen.append(method)
        number = len(seen)
        before(number, method)
        answer = real(self, method, *arguments, **named)
        after(number, method)
        return answer

    patch.setattr(s3fs.S3FileSystem, "call_s3", call)
    return seen


def client_error(code: str, text: str = "refused") -> Exception:
    """Return the error that s3fs raises for an answer with this code."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": text}}, "Operation"))
