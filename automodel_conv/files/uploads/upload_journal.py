"""The journal of an upload, from which it can be resumed after a crash.

Each line is a JSON object of one of these forms:

    {"work": description, "mark": text}   the first line; null if the work cannot be resumed
    {"written": file, "verified": bool, "checksums": {tensor: text} or null}   the file is complete on this machine
    {"upload": file, "id": text}          the store has begun an upload of the file; null just before it is asked to
    {"part": number, "of": file, "etag": text}   the store has this part of it
    {"uploaded": file}                    the store has all parts of it
    {"again": file}                       the file must be written and uploaded again
    {"publishing": [file]}                from here on, the files become visible in this order

Credentials are never in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from automodel_conv.files.journal import is_inside

Record = Callable[[Mapping[str, Any]], None]
"""A function that appends a line to the journal; any thread may call it."""


@dataclass
class Upload:
    """The upload of one file, as far as it is known."""

    id: str | None = None
    """Name of the upload in the store; None if it is not known, as when the answer was lost."""
    parts: dict[int, str] = field(default_factory=dict)
    """ETag of each part that the store has, by the number of the part."""


@dataclass
class UploadState:
    """The state of an unfinished upload that a journal records; empty for a file that is not a journal."""

    work: dict[str, Any] | None = None
    """JSON description of the work; None if the work cannot be resumed."""
    mark: str = ""
    """Text that the store keeps with each file, by which this work recognizes its own files."""
    verified: set[str] = field(default_factory=set)
    """Names of the written files that have been compared with their sources."""
    checksums: dict[str, dict[str, str] | None] = field(default_factory=dict)
    """Checksums of the tensors of each written file, by its name; None if they have not been computed."""
    uploads: dict[str, Upload] = field(default_factory=dict)
    """Uploads that have begun, by the name of the file."""
    uploaded: set[str] = field(default_factory=set)
    """Names of the files of which the store has all parts."""
    publishing: tuple[str, ...] = ()
    """Names of the files that were becoming visible, in order."""

    @property
    def written(self) -> set[str]:
        """Names of the files that have been complete on this machine."""
        return set(self.checksums)

    def forget(self, name: str) -> None:
        """Forget a file, which must be written and uploaded again."""
        self.verified.discard(name)
        self.checksums.pop(name, None)
        self.uploads.pop(name, None)
        self.uploaded.discard(name)


def upload_state(records: Sequence[Any] | None) -> UploadState:
    """Return the state that the lines of a journal record; an empty one if they are not of an upload."""
    state = UploadState()
    for record in records or ():
        match record:
            case {"work": dict() | None as work, "mark": str(mark)}:
                state.work, state.mark = work, mark
            case {"written": str(name), "verified": bool(verified), "checksums": dict() | None as checksums}:
                state.checksums[name] = checksums
                (state.verified.add if verified else state.verified.discard)(name)
            case {"upload": str(name), "id": str() | None as number}:
                state.uploads[name] = Upload(number)
            case {"part": int(number), "of": str(name), "etag": str(etag)} if name in state.uploads:
                state.uploads[name].parts[number] = etag
            case {"uploaded": str(name)}:
                state.uploaded.add(name)
            case {"again": str(name)}:
                state.forget(name)
            case {"publishing": list(names)} if all(isinstance(name, str) and is_inside(name) for name in names):
                state.publishing = tuple(names)
            case _:
                return UploadState()
    return state
