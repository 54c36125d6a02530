"""moto's server, which has the semantics of S3, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve_moto() -> Iterator[str]:
    """Start the server and yield its URL; it needs the package ``moto[server]``."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = os.environ | CREDENTIALS | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _url(process.stderr)
        finally:
            process.terminate()
            process.wait(20)


def _url(lines: Iterator[str]) -> str:
    seen = []
    for line in lines:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
            return found[1]
        seen.append(line)
    raise RuntimeError(f"moto's server ended before it listened: {''.join(seen)}")
