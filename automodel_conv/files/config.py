"""What the configs beside a checkpoint say of its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from automodel_conv.errors import CheckpointError, message
from automodel_conv.files import system
from automodel_conv.files.header import malformed_json, read_limited, with_open

CONFIG_NAME = "config.json"
MODELOPT_NAME = "hf_quant_config.json"
"""Where releases of modelopt say how they are quantized, many of them nowhere else. A copy that is not quantized must
not have this file. Source: vLLM 0.33.0, ``ModelOptQuantConfigBase.get_config_filenames``."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the latter of older compressed-tensors
# Thousands of times what a config is; those of large quantized models list every module that is not.
_MOST_BYTES = 64 << 20


class Quantization(NamedTuple):
    """How a model is quantized, and the file that says it."""

    settings: Mapping[str, Any]
    path: str


def quantization(directory: str) -> Quantization | None:
    """How a model is quantized, also one of which only the text part is; None where no file says that it is.

    ``config.json`` decides where it says anything, else modelopt's own file.

    Raises:
        CheckpointError: a config cannot be read, or is not JSON of the form it must have.
    """
    path = os.path.join(directory, CONFIG_NAME)
    for part in _parts(_config(path)):
        for key in QUANTIZATION_KEYS:
            found = part.get(key)
            if isinstance(found, dict) and found:  # an empty one says nothing
                return Quantization(found, path)
            if found is not None and not isinstance(found, dict):
                raise CheckpointError(message(f"{key} is not an object", where=path, found=type(found).__name__))
    path = os.path.join(directory, MODELOPT_NAME)
    told = _config(path)
    return None if told is None else Quantization(_as_settings(told, path), path)


def quantization_config(directory: str) -> Mapping[str, Any] | None:
    """The settings alone; see ``quantization``."""
    found = quantization(directory)
    return None if found is None else found.settings


def check_config(directory: str) -> None:
    """Raise CheckpointError if there is a ``config.json`` that cannot be read, or is not JSON."""
    _config(os.path.join(directory, CONFIG_NAME))


def plain_config(directory: str) -> bytes | None:
    """``config.json`` without what it says of quantization; None without the file.

    Raises:
        CheckpointError: see ``quantization``.
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
    data = with_open(path, lambda fd: read_limited(fd, path, _MOST_BYTES))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed_json(data, path, "the config of a model", error) from error


def _parts(config: Any) -> list[dict[str, Any]]:
    """The objects that may say how a model is quantized."""
    if not isinstance(config, dict):
        return []
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def _as_settings(told: Any, path: str) -> dict[str, Any]:
    """What modelopt's own file says, in the words of ``quantization_config``.

    Source: NVIDIA Model Optimizer 0.40, ``convert_hf_quant_config_format`` in ``torch/export/convert_hf_config.py``.
    """
    parts = told if isinstance(told, dict) else {}
    producer, said = parts.get("producer", {"name": "modelopt"}), parts.get("quantization")
    if not isinstance(said, dict) or not isinstance(producer, dict):
        expected = 'an object that holds the object "quantization", and of which "producer" is an object'
        raise CheckpointError(message(f"{MODELOPT_NAME} is malformed", where=path, expected=expected))
    settings = {"quant_method": producer.get("name"), "quant_algo": said.get("quant_algo")}
    renamed = {"kv_cache_quant_algo": "kv_cache_scheme", "exclude_modules": "ignore", "group_size": "group_size"}
    return settings | {name: said[key] for key, name in renamed.items() if said.get(key) is not None}
