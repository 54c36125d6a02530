"""Read how a checkpoint is quantized from the config files next to its weights."""

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
"""File in which releases of modelopt describe their quantization, many of them only there. A copy that is not quantized
must not have this file. Source: vLLM 0.33.0, ``ModelOptQuantConfigBase.get_config_filenames``."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # older compressed-tensors write the latter
# Thousands of times the size of a config. Configs of large quantized models list every module that is not quantized.
_MOST_BYTES = 64 << 20


class Quantization(NamedTuple):
    """How a model is quantized."""

    settings: Mapping[str, Any]
    """The ``quantization_config`` of transformers."""
    path: str
    """Path of the file that contains the settings."""


def quantization(directory: str) -> Quantization | None:
    """Return how a model, or only its text part, is quantized; None if no file describes a quantization.

    The settings of ``config.json`` take precedence over modelopt's own file.

    Raises:
        CheckpointError: a config cannot be read, or is not JSON of the form it must have.
    """
    path = os.path.join(directory, CONFIG_NAME)
    for part in _parts(_config(path)):
        for key in QUANTIZATION_KEYS:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:  # an empty object describes no quantization
                return Quantization(settings, path)
            if settings is not None and not isinstance(settings, dict):
                raise CheckpointError(message(f"{key} is not an object", where=path, found=type(settings).__name__))
    path = os.path.join(directory, MODELOPT_NAME)
    config = _config(path)
    return None if config is None else Quantization(_as_settings(config, path), path)


def quantization_config(directory: str) -> Mapping[str, Any] | None:
    """Return only the settings of ``quantization``."""
    quantized = quantization(directory)
    return None if quantized is None else quantized.settings


def check_config(directory: str) -> None:
    """Raise CheckpointError if ``config.json`` exists but cannot be read or is not JSON."""
    _config(os.path.join(directory, CONFIG_NAME))


def model_type_of(directory: str) -> str | None:
    """Return the ``model_type`` that ``config.json`` states; None if it states none.

    Raises:
        CheckpointError: see ``quantization``.
    """
    config = _config(os.path.join(directory, CONFIG_NAME))
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return model_type if isinstance(model_type, str) else None


def architectures_of(directory: str) -> list[str]:
    """Return the names of classes that ``config.json`` states.

    Raises:
        CheckpointError: see ``quantization``.
    """
    config = _config(os.path.join(directory, CONFIG_NAME))
    names = config.get("architectures") if isinstance(config, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def stated_dtype(directory: str) -> str | None:
    """Return the name of the dtype that ``config.json`` states for a model, or only for its text part; None if none.

    Raises:
        CheckpointError: see ``quantization``.
    """
    parts = _parts(_config(os.path.join(directory, CONFIG_NAME)))
    stated = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))  # older configs have the latter
    return next((name.removeprefix("torch.") for name in stated if isinstance(name, str)), None)


def plain_config(directory: str) -> bytes | None:
    """Return ``config.json`` without its quantization settings; None if the file does not exist.

    Raises:
        CheckpointError: see ``quantization``.
    """
    config = _config(os.path.join(directory, CONFIG_NAME))
    for part in _parts(config):
        for key in QUANTIZATION_KEYS:
            part.pop(key, None)
    return None if config is None else json.dumps(config, indent=2).encode() + b"\n"


def _config(path: str) -> Any:
    """Return the parsed file; None if it does not exist."""
    if not system.is_file(path):
        return None
    data = with_open(path, lambda fd: read_limited(fd, path, _MOST_BYTES))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed_json(data, path, "the config of a model", error) from error


def _parts(config: Any) -> list[dict[str, Any]]:
    """Return the objects of a config that may describe how a model is quantized."""
    if not isinstance(config, dict):
        return []
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def _as_settings(config: Any, path: str) -> dict[str, Any]:
    """Return the settings of modelopt's own file in the form of ``quantization_config``.

    Source: NVIDIA Model Optimizer 0.47, ``convert_hf_quant_config_format`` in ``torch/export/convert_hf_config.py``.
    """
    parts = config if isinstance(config, dict) else {}
    producer, stated = parts.get("producer", {"name": "modelopt"}), parts.get("quantization")
    if not isinstance(stated, dict) or not isinstance(producer, dict):
        expected = 'an object with an object "quantization" and, optionally, an object "producer"'
        raise CheckpointError(message(f"{MODELOPT_NAME} is malformed", where=path, expected=expected))
    settings = {"quant_method": producer.get("name"), "quant_algo": stated.get("quant_algo")}
    renamed = {"kv_cache_quant_algo": "kv_cache_scheme", "exclude_modules": "ignore"}
    keys = (*renamed, "group_size", "quantized_layers", "moe_quant_algo")
    return settings | {renamed.get(key, key): stated[key] for key in keys if stated.get(key) is not None}
