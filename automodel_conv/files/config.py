"""What the config.json beside a checkpoint says of its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from automodel_conv.errors import CheckpointError, message
from automodel_conv.files import system
from automodel_conv.files.header import read_limited, with_open

CONFIG_NAME = "config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the latter of older compressed-tensors
# Thousands of times what a config is; those of large quantized models list every module that is not.
_MOST_BYTES = 64 << 20


def quantization_config(directory: str) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model, also of one of which only the text part is quantized; None without.

    Raises:
        CheckpointError: config.json cannot be read, or is not JSON of the form it must have.
    """
    path = os.path.join(directory, CONFIG_NAME)
    for part in _parts(_config(path)):
        for key in QUANTIZATION_KEYS:
            found = part.get(key)
            if isinstance(found, dict):
                return found
            if found is not None:
                raise CheckpointError(message(f"{key} is not an object", where=path, found=type(found).__name__))
    return None


def plain_config(directory: str) -> bytes | None:
    """``config.json`` without what it says of quantization; None without the file.

    Raises:
        CheckpointError: see ``quantization_config``.
    """
    config = _config(os.path.join(directory, CONFIG_NAME))
    for part in _parts(config):
        for key in QUANTIZATION_KEYS:
            part.pop(key, None)
    return None if config is None else json.dumps(config, indent=2).encode() + b"\n"


def _config(path: str) -> Any:
    """What the file holds; None without it."""
    if not system.is_file(path):
        return None
    try:
        return json.loads(with_open(path, lambda fd: read_limited(fd, path, _MOST_BYTES)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(message("config.json is not JSON", where=path, found=error)) from error


def _parts(config: Any) -> list[dict[str, Any]]:
    """The objects that may say how a model is quantized."""
    if not isinstance(config, dict):
        return []
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
