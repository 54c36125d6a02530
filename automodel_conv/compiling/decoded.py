"""Build the source table of a checkpoint, with quantized tensors described as their decoded values."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from automodel_conv.dtypes import DECODED, dtype_code
from automodel_conv.errors import QuantizationError, UnsupportedError, message
from automodel_conv.execution.reading import read_each
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import (
    CONFIG_NAME,
    MODELOPT_NAME,
    Quantization,
    model_type_of,
    quantization,
    stated_dtype,
)
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.quantization import (
    PaddingSuspect,
    group_indices,
    padding_suspects,
    quantized_table,
    without_padding,
)
from automodel_conv.planning.schemes import KEEP, implied_config


def decoded_table(checkpoint: Checkpoint, needs_values: bool) -> SourceTable:
    """Return the tensors of a checkpoint, with quantized tensors described as their decoded values.

    Args:
        needs_values: whether codes without a quantization config are an error.

    Raises:
        CheckpointError: ``config.json``, or modelopt's own file, is malformed.
        UnsupportedError: see ``quantized_table``; or the columns of a group are not consecutive.
        QuantizationError: see ``quantized_table`` and ``unpadded_table``; or the checkpoint has codes and scales, no
            config describes them, and ``needs_values`` is true.
    """
    table = SourceTable.from_checkpoint(checkpoint)
    config = quantization_of(checkpoint)
    if config is not None:
        decoded = _in_stated_dtype(quantized_table(table, config.settings, where=config.path), checkpoint)
        _refuse_shuffled_groups(checkpoint, group_indices(decoded, config.settings))
        return unpadded_table(checkpoint, decoded, padding_suspects(table, decoded, config.settings))
    codes = has_codes(table) if needs_values else None
    if codes is not None:
        raise codes_without_config(codes, checkpoint)
    return table


def _in_stated_dtype(decoded: SourceTable, checkpoint: Checkpoint) -> SourceTable:
    """Return a table whose decoded weights have the dtype of the model, if ``config.json`` states it.

    Weights in another dtype, such as that of their scales, would be rounded a second time when the model is loaded.
    """
    stated = getattr(torch, stated_dtype(checkpoint.directory) or "", None)
    code = dtype_code(stated) if isinstance(stated, torch.dtype) else None
    if code not in DECODED:
        return decoded
    dtypes = [code if row in decoded.decodes else dtype for row, dtype in enumerate(decoded.dtypes)]
    return replace(decoded, dtypes=dtypes)


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


def unpadded_table(checkpoint: Checkpoint, decoded: SourceTable, suspects: Iterable[PaddingSuspect]) -> SourceTable:
    """Return a table whose weights have only the columns that are not padding.

    The true shape of a weight is the data of a tensor. The table of a remote checkpoint has all columns, because only
    headers are read. A load computes the table again, and refuses a plan in which columns are padding.

    Args:
        checkpoint: the checkpoint.
        decoded: ``quantized_table`` of the checkpoint.
        suspects: see ``padding_suspects``.

    Raises:
        QuantizationError: a true shape does not fit its packed codes.
    """
    if checkpoint.headers_only:
        return decoded
    suspects = list(suspects)
    shape_rows = {row: checkpoint.position[name] for row, name, _ in suspects if name in checkpoint.position}
    vectors = [place for row, place in shape_rows.items() if checkpoint.shapes[place] == (len(decoded.shapes[row]),)]
    true_shapes = dict(zip(vectors, (shape.tolist() for shape in read_each(vectors, checkpoint)), strict=True))
    widths = {}
    for row, shape_name, codes_per_element in suspects:
        if row not in shape_rows:
            continue
        *lead, columns = decoded.shapes[row]
        true_shape = true_shapes.get(shape_rows[row])
        if true_shape == [*lead, columns]:
            continue
        least = columns - codes_per_element + 1
        if true_shape is None or true_shape[:-1] != lead or true_shape[-1] not in range(least, columns):
            text = f"{shape_name} does not fit its packed codes"
            expected = f"[{', '.join(map(str, lead))}, {least} to {columns}]"
            found = checkpoint.shapes[shape_rows[row]] if true_shape is None else true_shape
            do = ["download the files again: they may be of different releases", KEEP]
            raise QuantizationError(message(text, where=checkpoint.names[row], expected=expected, found=found, do=do))
        widths[row] = int(true_shape[-1])
    return without_padding(decoded, widths)


def _refuse_shuffled_groups(checkpoint: Checkpoint, indices: Iterable[tuple[str, int, int]]) -> None:
    """Refuse weights whose groups are not consecutive columns, which is not supported.

    A remote checkpoint is not checked, because its plan is compiled from headers only. A load checks it.

    Args:
        indices: see ``group_indices``.

    Raises:
        UnsupportedError: the columns of a group are not consecutive.
    """
    if checkpoint.headers_only:
        return
    rows = {
        row: (columns, group) for name, columns, group in indices if (row := checkpoint.position.get(name)) is not None
    }
    for row, (columns, group) in rows.items():
        if (checkpoint.dtypes[row], checkpoint.shapes[row]) != ("I32", (columns,)):
            stored = f"{checkpoint.dtypes[row]} {list(checkpoint.shapes[row])}"
            raise _shuffled_groups(checkpoint.names[row], columns, group, stored)
    in_order = {
        (columns, group): torch.arange(columns, dtype=torch.int32) // group for columns, group in set(rows.values())
    }
    for row, stored in zip(rows, read_each(list(rows), checkpoint), strict=True):
        expected = in_order[rows[row]]
        if not torch.equal(stored, expected):
            first = int((stored != expected).nonzero()[0])
            raise _shuffled_groups(checkpoint.names[row], *rows[row], f"element {first} is {int(stored[first])}")


def _shuffled_groups(name: str, columns: int, group: int, found: str) -> UnsupportedError:
    text = "groups by activation order are not supported"
    expected = f"I32 [{columns}], in which element i is i // {group}"
    return UnsupportedError(message(text, where=name, expected=expected, found=found, do=[KEEP]))
