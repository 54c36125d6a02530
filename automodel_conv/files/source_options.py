"""``SourceOptions``, the keyword arguments that say where a checkpoint is and how it is reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from automodel_conv.errors import ConversionError, message
from automodel_conv.files.paths import text_of_path
from automodel_conv.files.remote.urls import is_url, protocol_of


class SourceOptions(TypedDict, total=False):
    """Keyword arguments of all functions that open a checkpoint.

    All keys are optional. ``help(open_checkpoint)`` describes each of them.

    Example:
        >>> import torch
        >>> from automodel_conv import SourceOptions, open_checkpoint
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> options: SourceOptions = {"variant": "fp16"}
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3)}, f"{directory}/model.fp16.safetensors")
        ...     checkpoint = open_checkpoint(directory, **options)
        >>> checkpoint.names
        ['weight']
    """

    revision: str | None
    """Branch, tag or commit of a repository on the Hub. None: its default branch."""

    token: str | bool | None
    """Token for the Hub. None: the one that ``hf auth login`` stored. False: none."""

    cache_dir: str | os.PathLike[str] | None
    """Cache of the Hub. None: that of huggingface_hub (``HF_HUB_CACHE``)."""

    subfolder: str
    """Folder of the checkpoint within the directory, URL or repository. Default: ""."""

    variant: str | None
    """Variant of the files, as in ``model.fp16.safetensors``. None: the files without one."""

    local_files_only: bool
    """Read a repository from the cache only, and send no request. Default: False."""

    storage_options: Mapping[str, Any] | None
    """Options for the protocol of a URL, as fsspec takes them: credentials, ``endpoint_url``, ``anon`` and so on; for
    ``http`` and ``https`` the ``headers`` of each request. None: what the libraries find in their own variables and
    files."""

    node_cache: str | os.PathLike[str] | None
    """Directory on this machine that keeps the bytes of files behind a URL, for all processes. None: keep none."""


@dataclass(frozen=True)
class SourceSettings:
    """The values of ``SourceOptions``, with the defaults of those that the caller left out."""

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    subfolder: str = ""
    variant: str | None = None
    local_files_only: bool = False
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    node_cache: str | os.PathLike[str] | None = None

    @property
    def hub_cache(self) -> str | None:
        """Path of the Hub's cache, with ``~`` expanded."""
        return None if self.cache_dir is None else os.path.expanduser(os.fsdecode(self.cache_dir))

    def source(self) -> SourceOptions:
        """Return only these options, as keywords for ``open_checkpoint``."""
        return SourceOptions(**{field.name: getattr(self, field.name) for field in fields(SourceSettings)})  # type: ignore[typeddict-item]

    def shared(self, path: str | os.PathLike[str]) -> SourceSettings:
        """Return the options for one of several paths that a call reads or writes.

        The token and the cache are left out if the path is a URL of another protocol than ``hf``; another path needs
        them.
        """
        path = text_of_path(path)
        settings = SourceSettings(**self.source())
        is_elsewhere = is_url(path) and protocol_of(path) != "hf"
        return replace(settings, token=None, cache_dir=None) if is_elsewhere else settings

    def further(self, path: str | os.PathLike[str]) -> SourceSettings:
        """Return ``shared`` for a path besides the first, whose revision, subfolder and variant are its own."""
        return replace(self.shared(path), revision=None, subfolder="", variant=None)

    def __post_init__(self) -> None:
        parts = self.subfolder.replace("\\", "/").split("/")
        if self.subfolder and (not all(parts) or ".." in parts or os.path.isabs(self.subfolder)):
            expected = "the relative path of a folder, with / between names"
            raise ConversionError(message("this is no subfolder", expected=expected, found=repr(self.subfolder)))
