"""Checkpoints behind URLs, which fsspec reads by range: object stores, web servers and memory.

The weights are read where they are. Only the small files next to them, such as the config and the index, are copied to
a temporary folder. Credentials are those that the libraries of fsspec find in their own variables and files. Error
texts contain neither credentials nor the query of a URL, which may sign a request.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from automodel_conv.errors import Advice, ReadError, UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.files.choosing import ADVICE, INDEX_NAME, INDEX_SUFFIX, MAX_INDEX_BYTES, SINGLE_NAME
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.header import checkpoint_error, too_large
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import Identity, OpenSource
from automodel_conv.files.staging import remove_all
from automodel_conv.files.write_errors import write_errors

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRETS = re.compile(r"(?<=://)[^\s/]*@|\?\S+")
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of this package that installs the library for a protocol."""
_SMALL = (CONFIG_NAME, MODELOPT_NAME, CHECKSUMS_NAME)
_ABSENT = (401, 403, 404, 410)
"""Answers of web servers for a file that does not exist. Stores deny it if the caller may not list the names."""
_NO_RANGES = "the server ignores ranges and sends the whole file; download the files, or serve them with ranges"


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(path) is not None


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Raise UnsupportedError if the path of a checkpoint that would be read is a URL."""
    _refuse_url(
        path, ["download the files first", ("{memory_map=False} reads URLs", "{load_state_dict(...)} reads URLs")]
    )


def local_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute form of the path of a directory that would be written.

    Raises:
        UnsupportedError: the path is a URL.
    """
    _refuse_url(path, ["write to a local directory, then upload it"])
    return os.path.abspath(os.fsdecode(path))


def _refuse_url(path: str | os.PathLike[str], do: Sequence[Advice]) -> None:
    path = os.fsdecode(path)
    if is_url(path):
        text = "a URL, where only a path on this machine is supported"
        raise UnsupportedError(message(text, where=_without_secrets(path), do=do))


class SmallFiles:
    """A temporary folder with the small files of a checkpoint; it is removed when the last reference is gone."""

    def __init__(self, files: dict[str, bytes]):
        with write_errors("the temporary directory"):
            self.folder = system.make_temporary_directory("automodel_conv-")
            weakref.finalize(self, _remove, self.folder, os.getpid())
            for name, data in files.items():
                path = os.path.join(self.folder, name)
                with system.create(path) as file:
                    write_exactly(file.fileno(), [memoryview(data)], 0, path)


def _remove(folder: str, pid: int) -> None:
    """Remove a folder in the process that made it; a forked process inherits the finalizer but not the folder."""
    if os.getpid() == pid:
        with suppress(OSError):
            remove_all(folder)


class RemoteFolder(NamedTuple):
    """The folder of a checkpoint behind a URL."""

    system: Any
    """fsspec's file system."""
    path: str
    """Path of the folder as the file system has it, without a slash at its end; empty for the root."""
    url: str
    """URL of the folder without credentials and query."""
    name: str
    """Name of the file that the URL names; empty if it names the folder."""
    query: str
    """Query of the URL, with its question mark, which each request repeats; empty if there is none."""

    @property
    def lists_names(self) -> bool:
        """Whether the file system lists the names in a folder.

        Web servers have no common way to do so.
        """
        return not self.url.startswith(("http://", "https://"))

    def path_of(self, name: str) -> str:
        """Return the path of a file as the file system has it."""
        return f"{self.path}/{name}{self.query}"

    def file(self, name: str, small: SmallFiles) -> RemoteFile:
        """Return a file of the folder."""
        return RemoteFile(self.system, self.path_of(name), f"{self.url}/{name}", small)


def find_folder(url: str) -> RemoteFolder:
    """Return the folder that a URL names, or that holds the file that it names; send no request.

    Raises:
        CheckpointError: the library for the protocol is not installed, or fsspec has no such protocol.
    """
    protocol = url.partition("://")[0].lower()
    is_web = protocol in ("http", "https")
    location, mark, query = url.partition("?") if is_web else (url, "", "")
    scheme, _, location = location.partition("://")
    location, name = location.rstrip("/"), ""
    if "/" in location and location.endswith((".safetensors", ".json", *ADVICE)):
        location, _, name = location.rpartition("/")
        location = location.rstrip("/")
    shown = _without_secrets(f"{scheme}://{location}")
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"use_listings_cache": False}  # another process may add files at any time
        if is_web:
            # fsspec merges the settings of both schemes.
            given = [conf.get(scheme, {}).get("client_kwargs", {}) for scheme in ("http", "https")]
            options["client_kwargs"] = {**given[0], **given[1], "raise_for_status": _refuse_whole_file}
        file_system, path = url_to_fs(f"{scheme}://{location or '/'}", **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        raise checkpoint_error(
            f"a library that reads {protocol}:// is not installed",
            where=shown,
            found=error,
            do="install what fsspec needs for it" if extra is None else f'pip install "automodel-conv[{extra}]"',
        ) from error
    except Exception as error:  # each library has errors of its own
        raise checkpoint_error("this URL cannot be read", where=shown, found=_text_of(error)) from None
    return RemoteFolder(file_system, path.rstrip("/"), shown, name, mark + query)


def fetch_small_files(folder: RemoteFolder) -> tuple[list[str], SmallFiles]:
    """Return the names in a folder, and its small files.

    If the names cannot be listed, the result has the small files that exist, and the name of a single file.

    Raises:
        CheckpointError: the folder or a file cannot be read.
        WriteError: the temporary folder cannot be written.
    """
    if folder.query and folder.name:  # a signature is valid for one file
        names = [folder.name]
    elif folder.lists_names:
        with _errors(folder.url):
            names = [os.path.basename(path) for path in folder.system.ls(folder.path or "/", detail=False)]
    else:
        names = [*([] if folder.name else [INDEX_NAME]), *_SMALL]
    named = [folder.name] if folder.name.endswith(".json") else []
    wanted = list(dict.fromkeys([*named, *(n for n in names if n in _SMALL or n.endswith(INDEX_SUFFIX))]))
    paths = list(map(folder.path_of, wanted))
    with _errors(folder.url):
        results = folder.system.cat_ranges(paths, 0, MAX_INDEX_BYTES + 1, on_error="return")
    files: dict[str, bytes] = {}
    denied: dict[str, Exception] = {}
    for name, result in zip(wanted, results, strict=True):
        if isinstance(result, bytes):
            if len(result) > MAX_INDEX_BYTES:
                raise too_large(f"{folder.url}/{name}", MAX_INDEX_BYTES, f"more than {MAX_INDEX_BYTES}")
            files[name] = result
        elif name != folder.name and not folder.lists_names and getattr(result, "status", None) in _ABSENT:
            denied[name] = result
        elif not isinstance(result, FileNotFoundError) or name == folder.name:
            with _errors(f"{folder.url}/{name}"):
                raise result
    if denied and not files and not folder.name:
        _refuse_denied(folder, denied)
    return names if folder.lists_names else [*files, SINGLE_NAME], SmallFiles(files)


def _refuse_denied(folder: RemoteFolder, denied: dict[str, Exception]) -> None:
    """Raise the first error of files that may be absent, unless the single file that needs none of them exists."""
    name, error = next(iter(denied.items()))
    with _errors(f"{folder.url}/{name}"):
        try:
            folder.system.info(folder.path_of(SINGLE_NAME))
        except Exception:  # each library has errors of its own
            raise error from None


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, read by range."""

    system: Any = field(repr=False)
    path: str = field(repr=False)
    url: str
    small: SmallFiles = field(repr=False)
    """The small files next to it, which exist as long as it does."""

    def describe(self) -> str:
        return self.url

    def identity(self) -> Identity:
        return repr(self._info())  # the size, and an ETag or a time, under names that depend on the library

    def open(self) -> OpenSource:
        """Request the size of the file, the first time.

        Raises:
            OSError: the file does not exist or cannot be read.
        """
        return _OpenRemoteFile(self, self._nbytes)

    @cached_property
    def _nbytes(self) -> int:
        size = self._info().get("size")
        if size is None:
            raise OSError("the server does not state the size of the file; download the files first")
        return size

    def _info(self) -> dict[str, Any]:
        try:
            return self.system.info(self.path)
        except Exception as error:  # each library has errors of its own
            raise OSError(_text_of(error)) from None


class _OpenRemoteFile(NamedTuple):
    file: RemoteFile
    nbytes: int
    """Size of the file."""

    def size(self) -> int:
        return self.nbytes

    def read_into(self, views: list[memoryview], offset: int) -> None:
        total = sum(map(len, views))
        if not total:
            return
        try:
            data = memoryview(self.file.system.cat_file(self.file.path, start=offset, end=offset + total))
        except Exception as error:  # each library has errors of its own
            raise ReadError(_text_of(error)) from None
        if len(data) != total:
            raise ReadError(f"the file has changed: {len(data)} bytes instead of {total} from byte {offset}")
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def descriptor(self) -> int | None:
        return None

    def close(self) -> None:
        pass


async def _refuse_whole_file(response: Any) -> None:
    """Raise OSError if a web server answers the request of a range with a whole file, before its body is received."""
    if response.status == 200 and "Range" in response.request_info.headers:
        response.close()
        raise OSError(_NO_RANGES)


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Raise errors of fsspec and its libraries as CheckpointError."""
    try:
        yield
    except Exception as error:  # each library has errors of its own
        do = "check the URL, the network and the access rights"
        text = "a checkpoint behind a URL cannot be read"
        # The text of the library's error may contain credentials, so no traceback must show it.
        raise checkpoint_error(text, where=where, found=_text_of(error), do=do) from None


def _text_of(error: BaseException) -> str:
    """Return the text of an error, or of its cause, in one line without credentials."""
    error = error.__cause__ or error
    return _without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _without_secrets(text: str) -> str:
    return _SECRETS.sub("", text)
