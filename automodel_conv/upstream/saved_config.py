"""Write the configs and code that ``save_pretrained`` writes next to the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.files.config import QUANTIZATION_KEYS
from automodel_conv.upstream.registry import is_pretrained_model


def write_config(model: nn.Module, dtype: torch.dtype | None, directory: str) -> None:
    """Write the configs and code of a transformers model; do nothing for other models.

    Args:
        model: the model.
        dtype: dtype of the saved weights; None: the model's.
        directory: directory to write to.

    Source: transformers 5.24.0, ``save_pretrained`` in ``modeling_utils``.
    """
    if not is_pretrained_model(model):
        return
    cls = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))
    config: Any = copy.deepcopy(model.config)
    config.architectures = [cls.__name__]
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    is_decoded = all(dtype_code(parameter.dtype) in FLOATING for parameter in model.parameters())
    for part in (config, getattr(config, "text_config", None)) if is_decoded else ():
        for key in QUANTIZATION_KEYS if part is not None else ():
            vars(part).pop(key, None)  # it describes the checkpoint that this model was decoded from
    config.save_pretrained(directory)
    if model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(directory)  # type: ignore[union-attr, operator]
    if getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, directory, config=config)
