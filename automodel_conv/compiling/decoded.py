"""Build the source table of a checkpoint, with quantized tensors described as their decoded values."""

from __future__ import annotations

import os
from collections.abc import Iterable

from automodel_conv.errors import QuantizationError, message
from automodel_conv.execution.reading import read_whole
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME, Quantization, model_type_of, quantization
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.quantization import padding_suspects, quantized_table
from automodel_conv.planning.schemes import KEEP, implied_config


def decoded_table(checkpoint: Checkpoint, needs_values: bool) -> SourceTable:
    """Return the tensors of a checkpoint, with quantized tensors described as their decoded values.

    Args:
        needs_values: whether codes without a quantization config are an error.

    Raises:
        CheckpointError: ``config.json``, or modelopt's own file, is malformed.
        QuantizationError: see ``quantized_table``; or the checkpoint has codes and scales, no config describes them,
            and ``needs_values`` is true.
    """
    table = SourceTable.from_checkpoint(checkpoint)
    config = quantization_of(checkpoint)
    if config is not None:
        decoded = quantized_table(table, config.settings, where=config.path)
        _refuse_padding(checkpoint, padding_suspects(table, decoded, config.settings), decoded)
        return decoded
    codes = has_codes(table) if needs_values else None
    if codes is not None:
        raise codes_without_config(codes, checkpoint)
    return table


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """Return how a checkpoint is quantized as its config states, or as its model type implies; None if neither does.

    Raises:
        CheckpointError: see ``decoded_table``.
    """
    stated = quantization(checkpoint.directory)
    if stated is not None:
        return stated
    settings = implied_config(model_type_of(checkpoint.directory))
    return None if settings is None else Quantization(settings, os.path.join(checkpoint.directory, CONFIG_NAME))


def codes_without_config(codes: str, checkpoint: Checkpoint) -> QuantizationError:
    """Return the error for codes that no config describes."""
    return QuantizationError(
        message(
            f"{codes} has the form of quantized codes, but no config describes how to decode them",
            where=checkpoint.path,
            expected=f"a quantization_config in the config.json next to the files, or modelopt's {MODELOPT_NAME}",
            do=["add the one that the release has", KEEP],
        )
    )


def _refuse_padding(checkpoint: Checkpoint, suspects: Iterable[tuple[int, str]], table: SourceTable) -> None:
    """Refuse packed codes whose rows end in padding, which is not supported.

    A remote checkpoint is not checked, because its plan is compiled from headers only. A load checks it.

    Args:
        suspects: ``(row, name of the tensor that holds the weight's true shape)``.
        table: the decoded table.

    Raises:
        QuantizationError: a row ends in padding.
    """
    if checkpoint.is_remote:
        return
    for row, shape_name in suspects:
        shape_row = checkpoint.position.get(shape_name)
        if shape_row is None:
            continue
        is_shape = checkpoint.shapes[shape_row] == (len(table.shapes[row]),)
        true_shape = read_whole(shape_row, checkpoint).tolist() if is_shape else checkpoint.shapes[shape_row]
        if true_shape != list(table.shapes[row]):
            name = checkpoint.names[row]
            text = "the rows of packed codes end in padding, which is not supported"
            raise QuantizationError(message(text, where=name, expected=list(table.shapes[row]), found=true_shape))
