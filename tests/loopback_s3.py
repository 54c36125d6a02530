"""The S3 API of one bucket on the loopback: the files of a folder are its objects.

``with serve_s3(folder, "bucket") as server`` starts it in threads, ``serve_elsewhere(folder, s3="bucket")`` of
``tests.loopback_store`` in a process of its own. Paths are ``/bucket/key``. Requests must be signed, in a header or in
the query; signatures are not verified, but presigned ones expire. ETags identify versions of files: they are not the
MD5 of their content, as with S3's objects under KMS. Keys that are a folder of other keys, tags, versions, access
lists and checksums are not supported.

Source: the API reference of Amazon S3, version 2006-03-01.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.loopback_files import etag_of, file_answer, file_below
from tests.loopback_listing import Page, list_page
from tests.loopback_messages import Answer, Asked
from tests.loopback_multipart import Uploads
from tests.loopback_wire import Server, listening
from tests.loopback_xml import Refused, answer_xml, element, error_answer, time_of

SUBRESOURCES = {"acl", "policy", "tagging", "versioning", "versions", "cors", "lifecycle", "encryption", "torrent"}


@dataclass
class S3:
    bucket: str
    folder: Path
    uploads: Uploads
    anonymous: bool = False
    """Requests need no signature."""

    def file(self, asked: Asked) -> Path | None:
        return file_below(self.folder, self.key(asked))

    def key(self, asked: Asked) -> str:
        return asked.path.removeprefix("/").partition("/")[2]

    def answer(self, asked: Asked) -> Answer:
        try:
            self._check_signature(asked)
            bucket = asked.path.removeprefix("/").partition("/")[0]
            if not bucket:
                return self._buckets(asked)
            if bucket != self.bucket:
                raise Refused(404, "NoSuchBucket", "The specified bucket does not exist")
            if SUBRESOURCES & asked.query.keys():
                raise Refused(501, "NotImplemented", "A header or query you provided implies a feature we do not have.")
            return self._object(asked) if self.key(asked) else self._bucket(asked)
        except Refused as refusal:
            return error_answer(refusal, asked)

    def _check_signature(self, asked: Asked) -> None:
        query, now = asked.query, datetime.now(timezone.utc)
        if "X-Amz-Signature" in query:
            made = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
            end = made + timedelta(seconds=int(query["X-Amz-Expires"]))
        elif "AWSAccessKeyId" in query and "Signature" in query:
            end = datetime.fromtimestamp(int(query["Expires"]), timezone.utc)
        elif "redirected" in query or self.anonymous or "Signature=" in asked.headers.get("authorization", ""):
            return
        else:
            raise Refused(403, "AccessDenied", "Access Denied")
        if now > end:
            raise Refused(403, "AccessDenied", "Request has expired")

    def _buckets(self, asked: Asked) -> Answer:
        if asked.method != "GET":
            raise _not_allowed()
        one = element("Bucket", element("Name", self.bucket), element("CreationDate", time_of(0)))
        return answer_xml(element("ListAllMyBucketsResult", element("Buckets", one)))

    def _bucket(self, asked: Asked) -> Answer:
        query = asked.query
        if asked.method == "HEAD":
            return Answer(200, {"x-amz-bucket-region": "us-east-1"})
        if asked.method == "PUT":
            raise Refused(409, "BucketAlreadyOwnedByYou", "Your previous request to create the named bucket succeeded")
        if asked.method == "POST" and "delete" in query:
            return self._delete_many(asked)
        if asked.method != "GET":
            raise _not_allowed()
        if "location" in query:
            return answer_xml(element("LocationConstraint", ""))
        if "uploads" in query:
            return self.uploads.list_uploads(self.bucket, query.get("prefix", ""))
        if query.get("list-type") != "2":
            raise Refused(501, "NotImplemented", "Only ListObjectsV2 lists the objects of this bucket.")
        return answer_xml(_listing(self.bucket, self.folder, list_page(self.folder, query), query))

    def _object(self, asked: Asked) -> Answer:
        key, query = self.key(asked), asked.query
        if asked.method == "POST" and "uploads" in query:
            return self.uploads.create(self.bucket, key)
        if "uploadId" in query:
            return self._part(asked, key, query)
        if asked.method == "PUT":
            return self._put(asked, key)
        if asked.method == "DELETE":
            remove(self.folder, key)
            return Answer(204)
        if asked.method not in ("GET", "HEAD"):
            raise _not_allowed()
        path = self.file(asked)
        if path is None:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.", Key=key)
        answer = file_answer(asked, path, {"Content-Type": "binary/octet-stream", "x-amz-request-id": "1"})
        if answer.status == 416:
            raise Refused(416, "InvalidRange", "The requested range is not satisfiable", dict(answer.headers))
        if answer.status == 412:
            raise _precondition()
        return answer

    def _part(self, asked: Asked, key: str, query: dict[str, str]) -> Answer:
        upload = self.uploads.find(key, query["uploadId"])
        if asked.method == "PUT" and "partNumber" in query:
            return self.uploads.write_part(upload, int(query["partNumber"]), asked.body)
        if asked.method == "GET":
            return self.uploads.list_parts(self.bucket, upload, query)
        if asked.method == "DELETE":
            self.uploads.abort(upload)
            return Answer(204)
        if asked.method != "POST":
            raise _not_allowed()
        path = self.uploads.join(upload, asked.body.read())
        etag = self._place(asked, key, path)
        self.uploads.abort(upload)
        parts = [element("Bucket", self.bucket), element("Key", key), element("ETag", etag)]
        return answer_xml(element("CompleteMultipartUploadResult", *parts))

    def _put(self, asked: Asked, key: str) -> Answer:
        if "x-amz-copy-source" in asked.headers:
            raise Refused(501, "NotImplemented", "Copies of objects are not implemented.")
        path = self.uploads.new_file()
        if asked.body.save(path) != int(asked.headers.get("x-amz-decoded-content-length", path.stat().st_size)):
            raise Refused(400, "IncompleteBody", "The request body terminated unexpectedly")
        return Answer(200, {"ETag": self._place(asked, key, path)})

    def _place(self, asked: Asked, key: str, path: Path) -> str:
        """Move a whole file to its key, if the conditions of the request hold; return its ETag."""
        target = self.folder / key
        if target.is_dir() or ".." in target.parts or any(one.is_file() for one in target.parents):
            raise Refused(400, "InvalidArgument", "This store cannot have a key that is the folder of another one.")
        target.parent.mkdir(parents=True, exist_ok=True)
        etag = etag_of(path.stat())
        wanted = asked.headers.get("if-match")
        if wanted is not None and (not target.is_file() or wanted != etag_of(target.stat())):
            raise _precondition()
        if asked.headers.get("if-none-match") == "*":
            try:
                os.link(path, target)
            except FileExistsError:
                raise _precondition() from None
            path.unlink()
        else:
            path.replace(target)
        return etag

    def _delete_many(self, asked: Asked) -> Answer:
        keys = [one.text or "" for one in ElementTree.fromstring(asked.body.read()).iter() if one.tag.endswith("Key")]
        for key in keys:
            remove(self.folder, key)
        return answer_xml(element("DeleteResult", *(element("Deleted", element("Key", key)) for key in keys)))


def remove(folder: Path, key: str) -> None:
    """Remove an object, and the folders that are empty without it."""
    path = file_below(folder, key)
    if path is None:
        return
    path.unlink()
    while path.parent != folder and not any(path.parent.iterdir()):
        path = path.parent
        path.rmdir()


def _listing(bucket: str, folder: Path, page: Page, query: dict[str, str]) -> str:
    encode = page.encode
    fields = [element("Name", bucket), element("Prefix", encode(query.get("prefix", "")))]
    fields += [element("KeyCount", str(len(page.entries))), element("MaxKeys", str(page.most))]
    fields += [element("IsTruncated", "true" if page.next else "false")]
    for name in ("delimiter", "continuation-token", "start-after", "encoding-type"):
        if name in query:
            tag = "".join(word.capitalize() for word in name.split("-"))
            fields.append(element(tag, encode(query[name]) if name in ("delimiter", "start-after") else query[name]))
    if page.next:
        fields.append(element("NextContinuationToken", page.next))
    for name, is_prefix in page.entries:
        if is_prefix:
            fields.append(element("CommonPrefixes", element("Prefix", encode(name))))
            continue
        status = (folder / name).stat()
        content = [element("Key", encode(name)), element("LastModified", time_of(status.st_mtime))]
        content += [element("ETag", etag_of(status)), element("Size", str(status.st_size))]
        fields.append(element("Contents", *content, element("StorageClass", "STANDARD")))
    return element("ListBucketResult", *fields)


def _not_allowed() -> Refused:
    return Refused(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")


def _precondition() -> Refused:
    return Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")


@contextmanager
def opened(folder: Path, bucket: str, *, least_part: int = 5 << 20, anonymous: bool = False) -> Iterator[S3]:
    """Yield the face of a bucket, with a folder for unfinished uploads next to that of its objects."""
    folder = Path(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.uploads-", dir=folder.parent))
    try:
        yield S3(bucket, folder, Uploads(unfinished, least_part), anonymous)
    finally:
        shutil.rmtree(unfinished)


@contextmanager
def serve_s3(
    folder: Path, bucket: str, *, least_part: int = 5 << 20, anonymous: bool = False, **options: Any
) -> Iterator[Server]:
    """Serve a bucket; ``options`` are those of ``listening``, ``least_part`` the bytes of every part but the last."""
    with opened(folder, bucket, least_part=least_part, anonymous=anonymous) as face:
        with listening(face, **options) as server:
            server.uploads = face.uploads
            yield server
