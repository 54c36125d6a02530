"""The folder that a path or a URL names, to be written to."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.files.paths import text_of_path
from automodel_conv.files.remote.folders import file_system_of
from automodel_conv.files.remote.urls import is_url, secrets_of, without_secrets
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.uploads.hub_store import hub_store
from automodel_conv.files.uploads.output_folders import LocalFolder, OutputFolder, UploadedFolder
from automodel_conv.files.uploads.s3_store import S3Store
from automodel_conv.files.uploads.store_errors import store_errors

_S3 = ("s3", "s3a")
_HUB = "hf"


def folder_of(path: str | os.PathLike[str], settings: SourceSettings | None = None) -> OutputFolder:
    """Return the folder that is named by a path, ``s3://bucket/prefix`` or ``hf://org/name@revision``; send no request.

    Args:
        path: path or URL.
        settings: ``storage_options`` of s3fs for ``s3://``, and ``token`` for ``hf://``. None: no options.

    Raises:
        UnsupportedError: files cannot be written to this URL, or the library for it is not installed.
    """
    name = os.path.expanduser(text_of_path(path))
    settings = settings or SourceSettings()
    if not is_url(name):
        return LocalFolder(os.path.abspath(name))
    protocol, _, location = name.partition("://")
    url = f"{protocol}://{location.rstrip('/')}"
    shown = without_secrets(url)
    if shown != url:
        raise UnsupportedError(
            message(
                "a destination with credentials or a query in its URL",
                where=shown,
                do="pass credentials in {storage_options=}, or in the variables and files of the store's library",
            )
        )
    if protocol.lower() == _HUB:
        store = hub_store(url, settings.token)
        return UploadedFolder(store, _waiting_room(url))
    if protocol.lower() not in _S3:
        raise UnsupportedError(
            message(
                "files cannot be written to this kind of URL",
                where=shown,
                expected="s3://bucket/prefix, hf://org/name or a local directory",
                do="write to a local directory, then upload it",
            )
        )
    options = dict(settings.storage_options or {})
    return UploadedFolder(_s3_store(url, options), _waiting_room(url, str(options.get("endpoint_url"))))


def _s3_store(url: str, options: dict[str, Any]) -> S3Store:
    secrets = secrets_of(options)
    with store_errors(url, secrets):
        try:
            file_system, path = file_system_of(url, options)
        except ImportError as error:
            do = 'pip install "automodel-conv[s3]"'
            raise UnsupportedError(
                message("a library that writes s3:// is not installed", where=url, found=error, do=do)
            ) from error
    bucket, _, key = path.partition("/")
    if not bucket:
        raise UnsupportedError(message("a URL without a bucket", where=url, expected="s3://bucket/prefix"))
    return S3Store(file_system, bucket, f"{key}/" if key else "", url, secrets)


def _waiting_room(*names: str) -> str:
    """Return the path of the directory on this machine in which files wait for their upload.

    Source: XDG Base Directory Specification 0.8, ``$XDG_CACHE_HOME``.
    """
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    return os.path.join(system.cache_directory(), "automodel_conv", "uploads", digest)
