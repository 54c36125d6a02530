"""What a checkpoint has beside its data: config, headers, checksums and index."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.execution.checksums import checksums_of, checksums_text
from automodel_conv.execution.writing import begin_shard
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.config import QUANTIZATION_KEYS
from automodel_conv.files.destination import Destination, telling
from automodel_conv.files.shards import CHECKSUMS_NAME, Form, Shard, index_of
from automodel_conv.upstream.registry import is_pretrained_model


def begin_save(
    destination: Destination, shards: Sequence[Shard], model: nn.Module | None, dtype: torch.dtype | None = None
) -> None:
    """Write what goes before all data: the config, and of each file the header."""
    if model is not None:
        with telling(destination.directory):
            _write_config(model, dtype, destination.staging)
    for shard in shards:
        begin_shard(shard, destination.path(shard.name))


def finish_save(
    destination: Destination,
    shards: Sequence[Shard],
    model: nn.Module | None,
    form: Form,
    checksum_threads: int = 0,
) -> None:
    """What follows when the data of all files is on the disk; with no threads for checksums there are none."""
    for shard in shards:
        destination.finish(shard)
    if checksum_threads:
        write_checksums(destination, shards, checksum_threads)
    parameters = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    destination.commit(index_of(shards, parameters, form))


def write_checksums(destination: Destination, shards: Sequence[Shard], threads: int) -> None:
    """Add the checksums of all tensors to what lies in a destination."""
    sums: dict[str, str] = {}
    for shard in shards:
        sums |= checksums_of(open_checkpoint(destination.found(shard.name)), threads)
    destination.write(CHECKSUMS_NAME, checksums_text(sums))


def _write_config(model: nn.Module, dtype: torch.dtype | None, directory: str) -> None:
    """What ``save_pretrained`` writes besides the weights. Source: transformers 5.23.0, modeling_utils."""
    if not is_pretrained_model(model):
        return
    cls = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))
    config: Any = copy.deepcopy(model.config)
    config.architectures = [cls.__name__]
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    holds_numbers = all(dtype_code(parameter.dtype) in FLOATING for parameter in model.parameters())
    for part in (config, getattr(config, "text_config", None)) if holds_numbers else ():
        for key in QUANTIZATION_KEYS if part is not None else ():
            vars(part).pop(key, None)  # of the checkpoint that this model was decoded from
    config.save_pretrained(directory)
    if model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(directory)  # type: ignore[union-attr, operator]
    if getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, directory, config=config)
