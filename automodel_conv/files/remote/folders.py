"""The folder of a checkpoint behind a URL: its names, its small files, and its weights, which stay where they are.

Credentials are those of the caller, or those that the libraries find in their own variables and files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import quote, unquote

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.header import checkpoint_error
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.fsspec_files import FsspecFile
from automodel_conv.files.remote.node_cache import PinnedSource
from automodel_conv.files.remote.requests import Address, WebError, fetch_with_retries
from automodel_conv.files.remote.urls import protocol_of, quoted, secrets_of, split_web_url, text_of, without_secrets
from automodel_conv.files.remote.web_files import WebFile

# Small files that are requested at the same time.
_AT_ONCE = 16
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of this package that installs the library for a protocol."""
# A signature is renewed when it has expired.
_SIGNED_SECONDS = 6 * 3600
_ENDINGS = (".safetensors", ".json")


class Folder(Protocol):
    """The folder of a checkpoint behind a URL."""

    url: str
    """URL of the folder, without credentials and query."""
    name: str
    """Name of the file that the URL names; empty if it names the folder."""
    lists_names: bool
    """Whether the names in the folder can be listed.

    Web servers have no common way to do so.
    """
    connections: Connections
    """The connections to the web servers that have its files."""
    is_one_file: bool
    """Whether only the named file can be read, because the query of the URL may sign the request for it."""

    def names(self, *, below: bool = False) -> list[str]:
        """Return the names in the folder, or the relative paths of all files below it.

        Raises:
            OSError: the folder cannot be listed.
        """
        ...

    def fetch(self, names: Sequence[str], most_bytes: int) -> list[bytes | OSError]:
        """Return the contents of small files, or the errors of those that cannot be read.

        Of a file that is larger than ``most_bytes``, the result has at least one byte more.
        """
        ...

    def file(self, name: str, first_bytes: int, keeps: object) -> PinnedSource:
        """Return a file of the folder; see ``WebFile``."""
        ...


class WebFolder:
    """A folder behind an ``http`` or ``https`` URL.

    Args:
        url: URL of the folder or of a file in it. Each request repeats its user and query.
        name: name of the file that the URL names; empty if it names the folder.
        options: ``storage_options``.

    Raises:
        ValueError: the URL has no host.
        UnsupportedError: an option is unknown.
    """

    lists_names = False

    def __init__(self, url: str, name: str, options: Mapping[str, Any] | None):
        parts = split_web_url(url)
        self.name = name
        self.url = without_secrets(parts._replace(query="", fragment="").geturl())
        self.is_one_file = bool(name and parts.query)
        self._parts = parts
        self._headers = _configured_headers(parts.scheme) | _headers_of(options)
        self.connections = Connections(Traffic())

    def names(self, *, below: bool = False) -> list[str]:
        raise OSError("a web server does not list its files")

    def fetch(self, names: Sequence[str], most_bytes: int) -> list[bytes | OSError]:
        def get(name: str) -> bytes | OSError:
            address = self._address(name)
            try:
                return fetch_with_retries(self.connections, address, most_bytes)
            except OSError as error:
                return error

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                return list(pool.map(get, names))
            except BaseException:
                self.connections.stopped.set()
                raise

    def file(self, name: str, first_bytes: int, keeps: object) -> PinnedSource:
        address = self._address(name)
        return WebFile(f"{self.url}/{quoted(name)}", lambda: address, self.connections, first_bytes, keeps)

    def _address(self, name: str) -> Address:
        parts = self._parts
        path = f"{parts.path.rstrip('/')}/{quoted(name)}"
        return Address(parts._replace(path=path, fragment="").geturl(), self._headers)


def _configured_headers(protocol: str) -> dict[str, str]:
    """Return the headers that the configuration of fsspec states for a protocol, in its files or variables."""
    try:
        from fsspec.config import conf
    except ImportError:
        return {}
    client = (conf.get(protocol) or {}).get("client_kwargs") or {}
    return {str(name): str(value) for name, value in (client.get("headers") or {}).items()}


def _headers_of(options: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the headers in ``storage_options``, which may be written as fsspec's ``client_kwargs`` too."""
    options = dict(options or {})
    client = dict(options.pop("client_kwargs", None) or {})
    headers = dict(client.pop("headers", None) or {}) | dict(options.pop("headers", None) or {})
    if options or client:
        raise UnsupportedError(
            message(
                "storage_options for a web server",
                expected="headers, as in storage_options={'headers': {'Authorization': 'Bearer ...'}}",
                found=", ".join(sorted({*map(str, options), *(f"client_kwargs[{name!r}]" for name in client)})),
            )
        )
    return {str(name): str(value) for name, value in headers.items()}


class StoreFolder:
    """A folder of one of fsspec's file systems.

    Files of S3 and of Google Cloud Storage are read over HTTP, with addresses from fsspec.

    Args:
        system: fsspec's file system.
        path: path of the folder as the file system has it, without a slash at its end; empty for the root.
        url: URL of the folder, without credentials.
        name: name of the file that the URL names; empty if it names the folder.
        secrets: credentials that must not be in error texts.
    """

    lists_names = True
    is_one_file = False

    def __init__(self, system: Any, path: str, url: str, name: str, secrets: Collection[str] = ()):
        self.url, self.name = url, name
        self._secrets = secrets
        self._system, self._path = system, path
        self.connections = Connections(Traffic())

    def names(self, *, below: bool = False) -> list[str]:
        root = self._path or "/"
        try:
            paths = self._system.find(root) if below else self._system.ls(root, detail=False)
        except Exception as error:  # each library has errors of its own
            raise OSError(text_of(error, self._secrets)) from None
        names = [path.removeprefix(f"{self._path}/") for path in paths]
        return names if below else [os.path.basename(name.rstrip("/")) for name in names]

    def fetch(self, names: Sequence[str], most_bytes: int) -> list[bytes | OSError]:
        try:
            found = self._system.cat_ranges(
                [self._path_of(name) for name in names], 0, most_bytes + 1, on_error="return"
            )
        except Exception as error:  # each library has errors of its own
            raise OSError(text_of(error, self._secrets)) from None
        return [data if isinstance(data, bytes) else self._as_os_error(data) for data in found]

    def file(self, name: str, first_bytes: int, keeps: object) -> PinnedSource:
        path, url = self._path_of(name), f"{self.url}/{name}"
        protocols = self._system.protocol
        protocols = {protocols} if isinstance(protocols, str) else {*protocols}
        if protocols & {"s3", "s3a"}:
            return WebFile(url, lambda: self._signed(path), self.connections, first_bytes, keeps)
        if protocols & {"gs", "gcs"}:
            return WebFile(url, lambda: self._authorized(path), self.connections, first_bytes, keeps)
        return FsspecFile(self._system, path, url, keeps, self._secrets)

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _signed(self, path: str) -> Address:
        """Return an address that s3fs signs, without a request."""
        options = {"RequestPayer": "requester"} if getattr(self._system, "req_kw", None) else {}
        try:
            return Address(self._system.sign(path, _SIGNED_SECONDS, **options), {})
        except Exception as error:  # botocore has many errors without a common class
            raise WebError(text_of(error, self._secrets)) from None

    def _authorized(self, path: str) -> Address:
        """Return an address of Google's JSON API, with the token of gcsfs."""
        headers: dict[str, str] = {}
        try:
            self._system.credentials.apply(headers)
            payer = self._system.requester_pays
            project = payer if isinstance(payer, str) else self._system.project
            query = f"&userProject={quote(project, safe='')}" if payer and project else ""
            return Address(self._system.url(path) + query, headers)
        except Exception as error:  # each library of credentials has errors of its own
            raise WebError(text_of(error, self._secrets)) from None

    def _as_os_error(self, error: object) -> OSError:
        if isinstance(error, FileNotFoundError):
            return error
        return OSError(text_of(error, self._secrets) if isinstance(error, BaseException) else str(error))


def find_folder(
    url: str, subfolder: str, options: Mapping[str, Any] | None, others: Sequence[str] = ()
) -> WebFolder | StoreFolder:
    """Return the folder that a URL names, or that holds the file that it names; send no request.

    Args:
        url: a URL of any protocol but ``hf``.
        subfolder: folder below the one that the URL names.
        options: ``storage_options``.
        others: endings of files in other formats.

    Raises:
        CheckpointError: the library for the protocol is not installed, or fsspec has no such protocol.
        UnsupportedError: an option is unknown.
    """
    is_web = protocol_of(url) in ("http", "https")
    location, mark, query = url.partition("#")[0].partition("?") if is_web else (url, "", "")
    scheme, _, location = location.partition("://")
    location, name = location.rstrip("/"), ""
    if "/" in location and location.endswith((*_ENDINGS, *others)):
        location, _, name = location.rpartition("/")
        location = location.rstrip("/")
        name = unquote(name) if is_web and "/" not in unquote(name) else name
    if subfolder:
        location = f"{location}/{quoted(subfolder) if is_web else subfolder}"
    shown = without_secrets(f"{scheme}://{location}")
    try:
        if is_web:
            return WebFolder(f"{scheme.lower()}://{location}{mark}{query}", name, options)
        return _store_folder(scheme, location, shown, name, options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme.lower())
        raise checkpoint_error(
            f"a library that reads {scheme.lower()}:// is not installed",
            where=shown,
            found=error,
            do="install fsspec and what it needs for this protocol"
            if extra is None
            else f'pip install "automodel-conv[{extra}]"',
        ) from error
    except UnsupportedError:
        raise
    except Exception as error:  # each library has errors of its own
        where = f"{scheme}://..." if is_web and "@" in url else shown  # where a password ends is unknown
        do = "check the URL and the network"
        raise checkpoint_error("this URL cannot be read", where=where, found=text_of(error), do=do) from None


def _store_folder(scheme: str, location: str, shown: str, name: str, options: Mapping[str, Any] | None) -> StoreFolder:
    bucket = location.partition("/")[0]
    if scheme.lower() in _EXTRAS and not bucket.startswith("arn:") and {"@", ":"} & {*bucket}:
        text = "the URL of a bucket with a user or a password"
        raise UnsupportedError(message(text, where=f"{scheme}://...", do=["pass credentials in {storage_options=}"]))
    file_system, path = file_system_of(f"{scheme}://{location or '/'}", options)
    return StoreFolder(file_system, path.rstrip("/"), shown, name, secrets_of(options))


def file_system_of(url: str, options: Mapping[str, Any] | None) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path of the URL as the file system has it.

    Args:
        url: a URL of any protocol.
        options: ``storage_options``.

    Raises:
        ImportError: a library for the protocol is not installed.
        Exception: any error of fsspec or of such a library.
    """
    from fsspec.core import url_to_fs

    given = dict(options or {})
    known: dict[str, Any] = {"use_listings_cache": False}  # another process may add files at any time
    if _EXTRAS.get(protocol_of(url)) == "s3":
        known["cache_regions"] = True  # a signature is for the region of the bucket
        # botocore signs addresses by version 2 where it can, and S3 refuses that for encrypted objects.
        given["config_kwargs"] = {"signature_version": "s3v4", **(given.get("config_kwargs") or {})}
    return url_to_fs(url, **known | given)
