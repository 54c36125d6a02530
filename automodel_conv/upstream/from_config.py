"""The model that ``from_pretrained`` would build for a checkpoint: its class and its dtype, on the meta device.

The class is one that transformers' Auto classes know for the type of the config: the one that ``architectures`` names
if it is among them, else the first of ``_DEFAULTS``. The dtype is what transformers' own ``_get_dtype`` says, given
what the headers say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import check_config
from automodel_conv.upstream.registry import transformers_available

# Auto mappings for a config whose ``architectures`` name no class of its type: most inputs first, heads before none.
# Older transformers lack some. Source: transformers 5.23.0, ``models/auto/modeling_auto.py``.
_DEFAULTS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_MAPPING",
)


# What a caller can do without a model of config.json.
_OTHERWISE = ("pass {model=}", "{rules=[]} takes the tensors under their own names")


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """The model of a checkpoint's ``config.json`` on the meta device, as ``from_pretrained`` would build it.

    Args:
        dtype: None takes what ``from_pretrained`` takes: the config's, else what the index says, else that of the first
            floating tensor, by name, of the first file.

    Raises:
        UnsupportedError: no transformers, no config, or one that this transformers cannot build a model from.
    """
    directory = checkpoint.directory
    if not transformers_available():
        raise UnsupportedError(
            message(
                "building a model from config.json needs transformers",
                do=["pip install transformers", *_OTHERWISE],
            )
        )
    path = os.path.join(directory, "config.json")
    if not system.is_file(path):
        raise UnsupportedError(
            message(
                "the checkpoint has no config.json to build a model from",
                where=directory,
                do=["put the model's config.json there", *_OTHERWISE],
            )
        )
    from transformers import AutoConfig, initialization

    advice = ["correct it, or use a transformers that knows the model (remote code is never run)", *_OTHERWISE]
    with _told("transformers cannot read the checkpoint's config.json", path, advice):
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception:
            check_config(directory)  # tells what stands there instead of a config
            raise
    with _told("transformers cannot tell the class of the checkpoint's config.json", path, advice):
        cls, config = model_class(config, path)
    safe_creation = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    advice = [*_OTHERWISE, "pass another {dtype=} if it is the dtype that does not fit"]
    with _told(f"transformers cannot build {cls.__name__} from the checkpoint's config.json", path, advice):
        config, dtype = _with_dtype(config, dtype, checkpoint)
        with ExitStack() as stack:
            for context in (torch.device("meta"), safe_creation()):
                stack.enter_context(context)
            return cls._from_config(config, dtype=dtype)


def model_class(config: Any, where: str) -> tuple[Any, Any]:
    """The class for a config, and the config that it takes: the text part's, where an Auto class builds that alone.

    Args:
        where: the file of the config, for the error.

    Raises:
        UnsupportedError: transformers has none.
    """
    import transformers

    known = dict(_known_classes(config))
    named = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    exported = ((name, getattr(transformers, name, None)) for name in named)
    of_this_type = {name: cls for name, cls in exported if getattr(cls, "config_class", None) is type(config)}
    cls = next((known.get(name) or of_this_type[name] for name in named if name in known or name in of_this_type), None)
    cls = cls or next(iter(known.values()), None)
    if cls is None:
        raise UnsupportedError(
            message(
                f"transformers {transformers.__version__} has no model class for this checkpoint",
                where=where,
                found=f"architectures {named}, model_type {config.model_type}",
                do=["use a transformers that knows the model (remote code is never run)", *_OTHERWISE],
            )
        )
    text = config.sub_configs.get("text_config")
    is_text_alone = text is not None and getattr(cls, "config_class", None) == text
    return cls, config.get_text_config() if is_text_alone else config


@contextmanager
def _told(what: str, where: str, do: Sequence[str]) -> Iterator[None]:
    """Tell as UnsupportedError all that transformers raises for a config that it does not expect."""
    try:
        yield
    except (MemoryError, ConversionError):  # the former is no fault of the config, the latter is told
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise UnsupportedError(message(what, where=where, found=found, do=do)) from error


def _known_classes(config: Any) -> Iterator[tuple[str, Any]]:
    """The classes of all Auto mappings for the type of a config, by name, those of ``_DEFAULTS`` first."""
    from transformers.models.auto import modeling_auto

    others = [name for name in vars(modeling_auto) if name.endswith("_MAPPING") and name not in _DEFAULTS]
    for name in (*_DEFAULTS, *others):
        mapping: Any = getattr(modeling_auto, name, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            for cls in found if isinstance(found, (list, tuple)) else (found,):
                yield cls.__name__, cls


def _with_dtype(config: Any, dtype: torch.dtype | None, checkpoint: Checkpoint) -> tuple[Any, torch.dtype]:
    """The config and the dtype that ``from_pretrained`` resolves them to, of headers instead of files."""
    from transformers.modeling_utils import _get_dtype

    rows = [row for row, file in enumerate(checkpoint.file_ids) if file == 0]
    rows.sort(key=lambda row: checkpoint.names[row])  # as ``safe_open`` lists them
    first = {
        checkpoint.names[row]: torch.empty(0, dtype=known, device="meta")
        for row in rows
        if (known := torch_dtype(checkpoint.dtypes[row])) is not None
    }
    return _get_dtype(dtype or "auto", None, config, checkpoint.index_metadata, first, True)
