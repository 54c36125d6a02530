"""The API of Google Cloud Storage for one bucket on the loopback: the files of a folder are its objects.

``with serve_gcs(folder, "bucket") as server`` starts it; ``STORAGE_EMULATOR_HOST=server.url`` directs clients to it.
The JSON API lists objects, describes them and sends their bytes. The XML API, ``/bucket/object``, is that of
``tests.loopback_s3``.

Source: "Cloud Storage JSON API", version 1, objects: list, get; "Request endpoints".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.loopback_files import file_answer, file_below
from tests.loopback_listing import list_page
from tests.loopback_messages import Answer, Asked
from tests.loopback_s3 import S3, opened
from tests.loopback_wire import Server, listening
from tests.loopback_xml import time_of

JSON = "/storage/v1/b/"
DOWNLOAD = "/download" + JSON


@dataclass
class Gcs:
    xml: S3
    authorization: str | None = None
    """Authorization header that every request must have; None if any will do."""

    def file(self, asked: Asked) -> Path | None:
        if asked.path.startswith((JSON, DOWNLOAD)):
            return file_below(self.xml.folder, _split(asked.path)[1])
        return self.xml.file(asked)

    def answer(self, asked: Asked) -> Answer:
        if self.authorization not in (None, asked.headers.get("authorization")) and "redirected" not in asked.query:
            return _error(401, "Anonymous caller does not have storage.objects.get access.", "required")
        if not asked.path.startswith((JSON, DOWNLOAD)):
            return self.xml.answer(asked)
        bucket, name = _split(asked.path)
        if bucket != self.xml.bucket:
            return _error(404, "The specified bucket does not exist.", "notFound")
        if asked.method not in ("GET", "HEAD"):
            return _error(405, "This store only reads by the JSON API.", "methodNotAllowed")
        if name is None:
            return _json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        if not name:
            return self._list(asked.query)
        path = self.file(asked)
        if path is None:
            return _error(404, f"No such object: {bucket}/{name}", "notFound")
        if asked.query.get("alt") != "media":
            return _json(self._describe(name))
        generation = str(path.stat().st_mtime_ns)
        if asked.query.get("generation", generation) != generation:
            return _error(404, f"No such object: {bucket}/{name}", "notFound")
        return file_answer(asked, path, {"x-goog-generation": generation, "Content-Type": "application/octet-stream"})

    def _list(self, query: Mapping[str, str]) -> Answer:
        names = {"maxResults": "max-keys", "pageToken": "continuation-token"}
        page = list_page(self.xml.folder, {names.get(name, name): value for name, value in query.items()})
        value: dict[str, Any] = {"kind": "storage#objects"}
        value["items"] = [self._describe(name) for name, is_prefix in page.entries if not is_prefix]
        value["prefixes"] = [name for name, is_prefix in page.entries if is_prefix]
        return _json(value | ({"nextPageToken": page.next} if page.next else {}))

    def _describe(self, name: str) -> dict[str, Any]:
        status, bucket = (self.xml.folder / name).stat(), self.xml.bucket
        when, generation = time_of(status.st_mtime), str(status.st_mtime_ns)
        value = {"kind": "storage#object", "id": f"{bucket}/{name}/{generation}", "name": name, "bucket": bucket}
        value |= {"generation": generation, "metageneration": "1", "contentType": "application/octet-stream"}
        value |= {"storageClass": "STANDARD", "size": str(status.st_size), "etag": generation}
        return value | {"timeCreated": when, "updated": when, "selfLink": f"{JSON}{bucket}/o/{quote(name, safe='')}"}


def _split(path: str) -> tuple[str, str | None]:
    """Return bucket and object of a path of the JSON API; "" for all objects, None for the bucket itself."""
    bucket, _, rest = path.removeprefix("/download").removeprefix(JSON).partition("/")
    return bucket, rest.removeprefix("o").removeprefix("/") if rest.partition("/")[0] == "o" else None


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode())


def _error(status: int, text: str, reason: str) -> Answer:
    errors = [{"message": text, "domain": "global", "reason": reason}]
    return _json({"error": {"code": status, "message": text, "errors": errors}}, status)


@contextmanager
def serve_gcs(folder: Path, bucket: str, *, authorization: str | None = None, **options: Any) -> Iterator[Server]:
    """Serve a bucket; ``options`` are those of ``listening``."""
    with opened(folder, bucket, anonymous=True) as xml, listening(Gcs(xml, authorization), **options) as server:
        yield server
