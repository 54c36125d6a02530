"""Multipart uploads to an S3 bucket on the loopback: their parts are files next to the bucket.

Source: CreateMultipartUpload, UploadPart, CompleteMultipartUpload, ListParts and ListMultipartUploads in the API
reference of Amazon S3, version 2006-03-01.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.loopback_bodies import Body
from tests.loopback_files import etag_of
from tests.loopback_messages import Answer
from tests.loopback_xml import Refused, answer_xml, element, time_of


class Part(NamedTuple):
    path: Path
    size: int
    etag: str


@dataclass
class Upload:
    key: str
    id: str
    parts: dict[int, Part] = field(default_factory=dict)


@dataclass
class Uploads:
    folder: Path
    least_part: int
    """Bytes that every part but the last must have."""
    unfinished: dict[str, Upload] = field(default_factory=dict)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def new_file(self) -> Path:
        return self.folder / uuid.uuid4().hex

    def create(self, bucket: str, key: str) -> Answer:
        upload = Upload(key, uuid.uuid4().hex)
        self.unfinished[upload.id] = upload
        fields = [element("Bucket", bucket), element("Key", key), element("UploadId", upload.id)]
        return answer_xml(element("InitiateMultipartUploadResult", *fields))

    def find(self, key: str, name: str) -> Upload:
        upload = self.unfinished.get(name)
        if upload is None or upload.key != key:
            raise Refused(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        return upload

    def write_part(self, upload: Upload, number: int, body: Body) -> Answer:
        if not 1 <= number <= 10_000:
            raise Refused(400, "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive")
        path = self.new_file()
        size = body.save(path)
        part = Part(path, size, etag_of(path.stat()))
        with self._changing:
            old = upload.parts.get(number)
            upload.parts[number] = part
        if old is not None:
            old.path.unlink()
        return Answer(200, {"ETag": part.etag})

    def join(self, upload: Upload, asked: bytes) -> Path:
        """Write the parts that a completion lists to one file."""
        parts = [self._part(upload, number, etag) for number, etag in _listed(asked)]
        if any(part.size < self.least_part for part in parts[:-1]):
            raise Refused(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
        path = self.new_file()
        with path.open("wb", buffering=0) as target:
            for part in parts:
                with part.path.open("rb", buffering=0) as source:
                    rest = part.size
                    while rest:
                        rest -= os.sendfile(target.fileno(), source.fileno(), None, rest)
        return path

    def _part(self, upload: Upload, number: int, etag: str) -> Part:
        part = upload.parts.get(number)
        if part is None or part.etag.strip('"') != etag.strip('"'):
            text = "One or more of the specified parts could not be found, or has another entity tag."
            raise Refused(400, "InvalidPart", text)
        return part

    def abort(self, upload: Upload) -> None:
        """Forget an upload and its parts."""
        with self._changing:
            self.unfinished.pop(upload.id, None)
        for part in upload.parts.values():
            part.path.unlink(missing_ok=True)

    def list_uploads(self, bucket: str, prefix: str) -> Answer:
        uploads = [
            element("Upload", element("Key", one.key), element("UploadId", one.id), element("Initiated", time_of(0)))
            for one in sorted(self.unfinished.values(), key=lambda one: (one.key, one.id))
            if one.key.startswith(prefix)
        ]
        fields = [element("Bucket", bucket), element("Prefix", prefix), element("IsTruncated", "false")]
        return answer_xml(element("ListMultipartUploadsResult", *fields, *uploads))

    def list_parts(self, bucket: str, upload: Upload, query: Mapping[str, str]) -> Answer:
        first, most = int(query.get("part-number-marker", 0)), int(query.get("max-parts", 1000))
        numbers = sorted(number for number in upload.parts if number > first)
        fields = [element("Bucket", bucket), element("Key", upload.key), element("UploadId", upload.id)]
        fields.append(element("IsTruncated", "true" if len(numbers) > most else "false"))
        numbers = numbers[:most]
        if numbers:
            fields.append(element("NextPartNumberMarker", str(numbers[-1])))
        for number in numbers:
            part = upload.parts[number]
            content = [element("PartNumber", str(number)), element("ETag", part.etag)]
            fields.append(
                element("Part", *content, element("Size", str(part.size)), element("LastModified", time_of(0)))
            )
        return answer_xml(element("ListPartsResult", *fields))


def _listed(asked: bytes) -> list[tuple[int, str]]:
    """Return number and ETag of each part in the XML of a completion."""
    try:
        root = ElementTree.fromstring(asked)
    except ElementTree.ParseError:
        raise Refused(400, "MalformedXML", "The XML you provided was not well-formed") from None
    found = []
    for part in root.iter():
        if part.tag.endswith("}Part") or part.tag == "Part":
            fields = {one.tag.rpartition("}")[2]: one.text or "" for one in part}
            found.append((int(fields["PartNumber"]), fields["ETag"]))
    numbers = [number for number, _ in found]
    if not numbers:
        raise Refused(400, "MalformedXML", "You must specify at least one part")
    if numbers != sorted(set(numbers)):
        raise Refused(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
    return found
