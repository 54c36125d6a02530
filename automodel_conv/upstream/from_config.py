"""Build the model that ``from_pretrained`` would build for a checkpoint, on the meta device.

Its class is one that transformers' Auto classes list for the type of the config: the class that ``architectures`` names
if it is listed, else the first of ``_DEFAULTS``. Its dtype is the result of transformers' own ``_get_dtype``, computed
from the headers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import DOCUMENTATION, Advice, ConversionError, UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import architectures_of, check_config, model_type_of
from automodel_conv.recipes import RECIPES
from automodel_conv.recipes.experts import call_for
from automodel_conv.upstream.registry import transformers_available

# Auto mappings for a config whose ``architectures`` name no class of its type. Models with more kinds of input come
# first, and models with a head before bare ones. Older versions of transformers lack some.
# Source: transformers 5.24.0, ``models/auto/modeling_auto.py``.
_DEFAULTS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_MAPPING",
)

_NEWER = "use a version of transformers that supports the model (remote code is never run)"
_OTHERWISE = ("pass {model=}", "{rules=[]} keeps the tensors under their own names")
"""Advice for a caller whose config.json yields no model."""


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """Return the model of a checkpoint's ``config.json`` on the meta device, as ``from_pretrained`` would build it.

    Args:
        checkpoint: the checkpoint.
        dtype: dtype of the model. None: as in ``from_pretrained``, the config's, else the index's, else that of the
            first floating tensor, by name, in the first file.

    Raises:
        UnsupportedError: transformers or the config is missing, or this version of transformers cannot build a model
            from the config.
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
                where=checkpoint.path,
                do=["put the model's config.json next to the weights", *_OTHERWISE],
            )
        )
    from transformers import AutoConfig, initialization

    advice = [f"correct it, or {_NEWER}", *_OTHERWISE]
    with _as_unsupported("transformers cannot read the checkpoint's config.json", path, advice):
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception:
            check_config(directory)  # raises a clearer error if the file is not a config at all
            refuse_unknown_type(checkpoint, path)
            raise
    _refuse_unread_sizes(config, path)
    with _as_unsupported("transformers cannot determine the model class of the checkpoint's config.json", path, advice):
        cls, config = model_class(config, path)
    safe_creation = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    advice = [*_OTHERWISE, "pass another {dtype=} if it is the dtype that does not fit"]
    with _as_unsupported(f"transformers cannot build {cls.__name__} from the checkpoint's config.json", path, advice):
        config, dtype = _with_dtype(config, dtype, checkpoint)
        with ExitStack() as stack:
            for context in (torch.device("meta"), safe_creation()):
                stack.enter_context(context)
            return cls._from_config(config, dtype=dtype)


def _refuse_unread_sizes(config: Any, path: str) -> None:
    """Raise UnsupportedError if a class reads sizes in ``text_config`` only, and the config has none.

    transformers would build a model of the default sizes.
    """
    text = getattr(config, "text_config", None)
    if "text_config" not in config.sub_configs or "text_config" in config.get_config_dict(path)[0]:
        return
    unread = [
        (key, value, getattr(text, key))
        for key, value in vars(config).items()  # what a class does not read becomes an attribute
        if type(value) is int and getattr(text, key, value) != value
    ]
    if unread:
        raise UnsupportedError(
            message(
                f"{type(config).__name__} of transformers does not read the sizes of the checkpoint's config.json",
                where=path,
                expected="the settings of the text model in text_config",
                found=", ".join(f"{key} {stated}, read as {read}" for key, stated, read in unread[:3]),
                do=["move them there", _rules_of_type(config.model_type), *_OTHERWISE],
            )
        )


def _rules_of_type(model_type: str) -> str:
    return f'pass {{rules=automodel_conv.get_checkpoint_conversion_mapping("{model_type}")}}'


def refuse_unknown_type(checkpoint: Checkpoint, path: str) -> None:
    """Raise UnsupportedError if transformers does not have the ``model_type`` of a config; advise a recipe or rules.

    Args:
        checkpoint: the checkpoint, whose names suggest the rules if there is no recipe for the type.
        path: path of the config.
    """
    import transformers

    model_type = model_type_of(checkpoint.directory)
    if model_type is None or model_type in transformers.CONFIG_MAPPING:
        return
    raise UnsupportedError(
        message(
            f"transformers {transformers.__version__} has no model type {model_type!r}",
            where=path,
            do=[_rules_for(model_type, architectures_of(checkpoint.directory), checkpoint.names), _NEWER, *_OTHERWISE],
        )
    )


def _rules_for(model_type: str, architectures: Iterable[str], names: Iterable[str]) -> Advice:
    """Return the advice to pass a recipe, the rules that classes or names suggest, or rules of the caller's own."""
    by_hand = f"rules of your own: {DOCUMENTATION}tasks/recipes/"
    in_python = f"in Python, pass {by_hand}"
    if model_type in RECIPES:
        return f"pass {{rules=automodel_conv.recipes.{RECIPES[model_type].__name__}()}}"
    for architecture in architectures:
        known_type = _type_with_rules(architecture)
        if known_type is not None:
            return f"{_rules_of_type(known_type)} if its names are those of {architecture}", in_python
    call = call_for(names)
    if call is None:
        return f"pass {{rules=[...]}}, {by_hand}", in_python
    return f"pass {{rules=automodel_conv.recipes.{call}}} if these are its experts", in_python


def _type_with_rules(architecture: str) -> str | None:
    """Return the ``model_type`` of a class of transformers if rules are registered for the type."""
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    try:
        config_class = getattr(getattr(transformers, architecture, None), "config_class", None)
    except ImportError:  # the class needs a package that is not installed
        return None
    model_type = getattr(config_class, "model_type", None)
    return model_type if model_type and get_checkpoint_conversion_mapping(model_type) else None


def model_class(config: Any, where: str) -> tuple[Any, Any]:
    """Return the class for a config, and the config to pass to it.

    The latter is the text part's config if the Auto class builds only the text part.

    Args:
        config: the config.
        where: path of its file, for the error.

    Raises:
        UnsupportedError: transformers has no class for the config.
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
                do=[_NEWER, *_OTHERWISE],
            )
        )
    text = config.sub_configs.get("text_config")
    is_text_only = text is not None and getattr(cls, "config_class", None) == text
    return cls, config.get_text_config() if is_text_only else config


@contextmanager
def _as_unsupported(what: str, where: str, do: Sequence[str]) -> Iterator[None]:
    """Raise UnsupportedError for any error that transformers raises for a config that it does not expect."""
    try:
        yield
    except (MemoryError, ConversionError):  # not the fault of the config, or explained already
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise UnsupportedError(message(what, where=where, found=cause, do=do)) from error


def _known_classes(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, class)`` for the type of a config from all Auto mappings, those of ``_DEFAULTS`` first."""
    from transformers.models.auto import modeling_auto

    others = [name for name in vars(modeling_auto) if name.endswith("_MAPPING") and name not in _DEFAULTS]
    for name in (*_DEFAULTS, *others):
        mapping: Any = getattr(modeling_auto, name, {})
        if type(config) in mapping:
            classes = mapping[type(config)]
            for cls in classes if isinstance(classes, (list, tuple)) else (classes,):
                yield cls.__name__, cls


def _with_dtype(config: Any, dtype: torch.dtype | None, checkpoint: Checkpoint) -> tuple[Any, torch.dtype]:
    """Return the config and dtype that ``from_pretrained`` would determine, from headers instead of tensor data."""
    from transformers.modeling_utils import _get_dtype

    rows = [row for row, file in enumerate(checkpoint.file_ids) if file == 0]
    rows.sort(key=lambda row: checkpoint.names[row])  # the order of ``safe_open``
    first = {
        checkpoint.names[row]: torch.empty(0, dtype=stored, device="meta")
        for row in rows
        if (stored := torch_dtype(checkpoint.dtypes[row])) is not None
    }
    return _get_dtype(dtype or "auto", None, config, checkpoint.index_metadata, first, True)
