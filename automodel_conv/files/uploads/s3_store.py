"""Files of one folder of an S3 store: uploads in parts that become visible when they are completed.

All requests go through the client of s3fs, which has the credentials, the endpoint and the retries.

Sources: Amazon S3 API Reference, ``CreateMultipartUpload``, ``UploadPart``, ``ListParts``, ``CompleteMultipartUpload``,
``AbortMultipartUpload``, ``PutObject`` (``If-None-Match``); Amazon S3 User Guide, "Amazon S3 multipart upload limits":
10,000 parts of at least 5 MiB, except the last one. s3fs 2026.9.0, ``call_s3``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from automodel_conv.errors import WriteError
from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.remote.folders import StoreFolder
from automodel_conv.files.shards import is_checkpoint
from automodel_conv.files.source import ByteSource
from automodel_conv.files.uploads.store_errors import code_of, occupied_by_other, store_errors
from automodel_conv.files.uploads.upload_journal import Record, Upload
from automodel_conv.files.write_errors import write_errors

PART_BYTES = 8 << 20
"""Size of a part, unless a file would have too many of them."""
THREADS = 8
"""Number of parts that are uploaded at the same time."""
MOST_PARTS = 10_000

# Bytes of a file that are requested first when it is compared.
_FIRST_BYTES = 4096
_MARK = "automodel-conv"
"""Name of the metadata by which this package recognizes a file that it has written."""
_NOT_THERE = ("404", "NoSuchKey", "NoSuchUpload")
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NO_CONDITIONS = ("NotImplemented", "501")
"""Codes of stores that do not support the condition that a file must not exist yet."""


class Part(NamedTuple):
    """A part of a file."""

    number: int
    """Counted from 1."""
    start: int
    nbytes: int


def parts_of(nbytes: int) -> list[Part]:
    """Return the parts in which a file of at least one byte is uploaded."""
    size = max(PART_BYTES, -(-nbytes // MOST_PARTS))
    return [
        Part(number, start, min(size, nbytes - start)) for number, start in enumerate(range(0, nbytes, size), start=1)
    ]


@dataclass(frozen=True)
class S3Store:
    """A folder of an S3 store that files are uploaded to."""

    system: Any = field(repr=False)
    """The file system of s3fs."""
    bucket: str
    prefix: str
    """Start of the keys of all files; empty, or with a slash at its end."""
    url: str
    """URL of the folder without credentials."""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    resumes = True
    """Whether uploads of a process that was killed can be continued."""

    @property
    def most_bytes(self) -> int:
        """Memory of an upload in bytes; files above 78 GiB have larger parts and need more."""
        return PART_BYTES * THREADS

    @property
    def most_at_once(self) -> int:
        """Size in bytes of the largest file that is sent in one request."""
        return PART_BYTES

    def prepare(self) -> None:
        """Do nothing, as a bucket is never created."""

    def names(self) -> list[str]:
        """Return the names of the files in the folder, sorted, without those in folders below it.

        Raises:
            WriteError: the folder cannot be listed.
        """
        names: list[str] = []
        page: dict[str, Any] = {}
        while True:
            page = self._call(
                "list_objects_v2",
                Prefix=self.prefix,
                Delimiter="/",
                **({"ContinuationToken": page["NextContinuationToken"]} if page else {}),
            )
            names += [one["Key"].removeprefix(self.prefix) for one in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return sorted(filter(None, names))

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        head = self._head(name)
        return None if head is None else head["ContentLength"]

    def source(self, name: str) -> ByteSource:
        """Return a file of the folder, to be read."""
        folder = StoreFolder(self.system, f"{self.bucket}/{self.prefix}".rstrip("/"), self.url, "", self.secrets)
        return folder.file(name, _FIRST_BYTES, None)

    def is_marked(self, name: str, mark: str) -> bool:
        """Return whether a file exists and has a mark of this package."""
        head = self._head(name)
        return head is not None and head.get("Metadata", {}).get(_MARK) == mark

    def has_parts(self, name: str, upload: Upload, nbytes: int) -> bool:
        """Return whether the store still has all parts of an upload."""
        kept = self._kept_parts(name, upload, nbytes)
        return kept is not None and len(kept) == len(parts_of(nbytes))

    def upload(
        self,
        name: str,
        path: str,
        nbytes: int,
        upload: Upload,
        mark: str,
        record: Record,
        stop: threading.Event,
    ) -> bool:
        """Upload a file in parts, as far as the store does not have them, and leave it invisible.

        Args:
            name: name of the file in the folder.
            path: path of the file on this machine.
            nbytes: its size.
            upload: what is known of the upload, which is updated.
            mark: text that the store keeps with the file.
            record: function that records each step on the disk; any thread may call it.
            stop: event that another thread sets to end the upload; no further part is begun then.

        Returns:
            Whether the file on this machine is no longer needed, which is always so.

        Raises:
            WriteError: the store refuses the upload, or cannot be reached.
            ReadError: the file cannot be read.
        """
        kept = self._kept_parts(name, upload, nbytes)
        if kept is None:
            kept = {}
            record({"upload": name, "id": None})
            upload.id = self._call("create_multipart_upload", name, Metadata=self._metadata(mark))["UploadId"]
            record({"upload": name, "id": upload.id})
        upload.parts = kept
        missing = [part for part in parts_of(nbytes) if part.number not in kept]
        with write_errors(path, "a file"), system.open_readonly(path) as file:
            failed = threading.Event()

            def send(part: Part) -> None:
                if failed.is_set() or stop.is_set():
                    return
                try:
                    data = bytearray(part.nbytes)
                    read_exactly(file.fileno(), [memoryview(data)], part.start, path)
                    answer = self._call("upload_part", name, UploadId=upload.id, PartNumber=part.number, Body=data)
                    upload.parts[part.number] = answer["ETag"]
                    record({"part": part.number, "of": name, "etag": answer["ETag"]})
                except BaseException:
                    failed.set()
                    raise

            with ThreadPoolExecutor(THREADS, thread_name_prefix="automodel_conv-upload") as pool:
                for _ in pool.map(send, missing):  # raises the first error
                    pass
        return True

    def publish(
        self,
        names: Sequence[str],
        paths: Mapping[str, str],
        uploads: Mapping[str, Upload],
        mark: str,
        obsolete: Sequence[str] = (),
    ) -> None:
        """Make files visible one after another.

        Weights and indexes must not exist yet, unless they have the mark. Other files replace those of the same name.

        Args:
            names: names of the files, in this order.
            paths: paths of the files on this machine that have not been uploaded in parts, by their names.
            uploads: complete uploads, by the names of their files.
            mark: text that the store keeps with the files.
            obsolete: names of files that are removed before.

        Raises:
            DestinationError: another process has written a file.
            WriteError: the store refuses a file, or cannot be reached.
        """
        self.remove(obsolete)
        for name in names:
            if name in uploads:
                self._complete(name, uploads[name], mark)
            else:
                self._put(name, paths[name], mark)

    def remove(self, names: Sequence[str], mark: str | None = None) -> None:
        """Remove files one after another, with a mark only those that have it."""
        for name in names:
            if mark is None or self.is_marked(name, mark):
                self._call("delete_object", name)

    def abort(self, uploads: Mapping[str, Upload]) -> None:
        """Remove uploads that have not been completed, with all of their parts.

        An upload whose name is not known has no parts yet, because its name is the answer to the first request.
        """
        for name, upload in uploads.items():
            for upload_id in self._empty_uploads(name) if upload.id is None else [upload.id]:
                self._optional("abort_multipart_upload", name, UploadId=upload_id)

    def _empty_uploads(self, name: str) -> list[str]:
        """Return the names of the uploads of a file that have no parts."""
        answer = self._call("list_multipart_uploads", Prefix=self.prefix + name)
        own = [one["UploadId"] for one in answer.get("Uploads", ()) if one["Key"] == self.prefix + name]
        return [one for one in own if not (self._optional("list_parts", name, UploadId=one) or {}).get("Parts")]

    def _complete(self, name: str, upload: Upload, mark: str) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(upload.parts.items())]
        content = {"UploadId": upload.id, "MultipartUpload": {"Parts": parts}}
        if not self._write("complete_multipart_upload", name, mark, **content):
            self.abort({name: upload})

    def _put(self, name: str, path: str, mark: str) -> None:
        with write_errors(path, "a file"), system.open_readonly(path) as file:
            data = bytearray(system.size(file.fileno()))
            read_exactly(file.fileno(), [memoryview(data)], 0, path)
        self._write("put_object", name, mark, Body=data, Metadata=self._metadata(mark))

    def _write(self, method: str, name: str, mark: str, **arguments: Any) -> bool:
        """Write a file; return False if an earlier request of this work has written it."""
        condition = {"IfNoneMatch": "*"} if is_checkpoint(name) else {}
        with self._errors(name):
            try:
                try:
                    self._send(method, name, **condition, **arguments)
                except Exception as error:  # each library has errors of its own
                    if code_of(error) not in _NO_CONDITIONS or not condition:
                        raise
                    self._send(method, name, **arguments)
            except Exception as error:
                # A request whose answer was lost is sent again, and then the file or no upload is there.
                if condition and self._is_surely_marked(name, mark):
                    return False
                if code_of(error) in _EXISTS and condition:
                    raise occupied_by_other(self.url, name) from None
                raise
        return True

    def _is_surely_marked(self, name: str, mark: str) -> bool:
        """Return whether a file has a mark; False if the store cannot tell after a request has failed."""
        try:
            return self.is_marked(name, mark)
        except WriteError:
            return False

    def _kept_parts(self, name: str, upload: Upload, nbytes: int) -> dict[int, str] | None:
        """Return the ETags of the parts that were uploaded and that the store has; None if it has no such upload."""
        if upload.id is None:
            return None
        listed: dict[int, tuple[str, int]] = {}
        for page in self._pages_of_parts(name, upload.id):
            if page is None:
                return None
            listed |= {one["PartNumber"]: (one["ETag"], one["Size"]) for one in page.get("Parts", ())}
        return {
            part.number: upload.parts[part.number]
            for part in parts_of(nbytes)
            if listed.get(part.number) == (upload.parts.get(part.number), part.nbytes)
        }

    def _pages_of_parts(self, name: str, upload_id: str) -> Iterator[dict[str, Any] | None]:
        after: dict[str, Any] = {}
        while True:
            page = self._optional("list_parts", name, UploadId=upload_id, **after)
            yield page
            if page is None or not page.get("IsTruncated"):
                return
            after = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _metadata(self, mark: str) -> dict[str, str]:
        given = getattr(self.system, "s3_additional_kwargs", None) or {}
        return {**given.get("Metadata", {}), _MARK: mark}

    def _head(self, name: str) -> dict[str, Any] | None:
        return self._optional("head_object", name)

    def _optional(self, method: str, name: str, **arguments: Any) -> dict[str, Any] | None:
        """Return the answer of a request; None if the file or the upload does not exist."""
        with self._errors(name):
            try:
                return self._send(method, name, **arguments)
            except FileNotFoundError as error:
                if code_of(error) not in _NOT_THERE:  # the bucket does not exist
                    raise
                return None

    def _call(self, method: str, name: str | None = None, **arguments: Any) -> dict[str, Any]:
        with self._errors(name):
            return self._send(method, name, **arguments)

    def _send(self, method: str, name: str | None, **arguments: Any) -> dict[str, Any]:
        key = {} if name is None else {"Key": self.prefix + name}
        return self.system.call_s3(method, Bucket=self.bucket, **key, **arguments)

    def _errors(self, name: str | None) -> Any:
        return store_errors(self.url if name is None else f"{self.url}/{name}", self.secrets)
