"""Build the source table of a checkpoint, with quantized tensors described as their decoded values."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from automodel_conv.errors import QuantizationError, UnsupportedError, message
from automodel_conv.execution.reading import read_each, read_whole
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import MODELOPT_NAME, quantization
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.quantization import group_indices, padding_suspects, quantized_table
from automodel_conv.planning.schemes import KEEP


def decoded_table(checkpoint: Checkpoint, needs_values: bool) -> SourceTable:
    """Return the tensors of a checkpoint, with quantized tensors described as their decoded values.

    Args:
        needs_values: whether codes without a quantization config are an error.

    Raises:
        CheckpointError: ``config.json``, or modelopt's own file, is malformed.
        UnsupportedError: see ``quantized_table``; or the columns of a group are not consecutive.
        QuantizationError: see ``quantized_table``; or the checkpoint has codes and scales, no config describes them,
            and ``needs_values`` is true.
    """
    table = SourceTable.from_checkpoint(checkpoint)
    config = quantization(checkpoint.directory)
    if config is not None:
        decoded = quantized_table(table, config.settings, where=config.path)
        _refuse_padding(checkpoint, padding_suspects(table, decoded, config.settings), decoded)
        _refuse_shuffled_groups(checkpoint, group_indices(decoded, config.settings))
        return decoded
    codes = has_codes(table) if needs_values else None
    if codes is not None:
        raise codes_without_config(codes, checkpoint)
    return table


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


def _refuse_shuffled_groups(checkpoint: Checkpoint, indices: Iterable[tuple[str, int, int]]) -> None:
    """Refuse weights whose groups are not consecutive columns, which is not supported.

    A remote checkpoint is not checked, because its plan is compiled from headers only. A load checks it.

    Args:
        indices: see ``group_indices``.

    Raises:
        UnsupportedError: the columns of a group are not consecutive.
    """
    if checkpoint.is_remote:
        return
    rows = {
        row: (columns, group) for name, columns, group in indices if (row := checkpoint.position.get(name)) is not None
    }
    in_order: dict[tuple[int, int], torch.Tensor] = {}
    for row, (columns, group) in rows.items():
        if (checkpoint.dtypes[row], checkpoint.shapes[row]) != ("I32", (columns,)):
            stored = f"{checkpoint.dtypes[row]} {list(checkpoint.shapes[row])}"
            raise _shuffled_groups(checkpoint.names[row], columns, group, stored)
        in_order.setdefault((columns, group), torch.arange(columns, dtype=torch.int32) // group)
    for row, stored in zip(rows, read_each(list(rows), checkpoint), strict=True):
        expected = in_order[rows[row]]
        if not torch.equal(stored, expected):
            first = int((stored != expected).nonzero()[0])
            raise _shuffled_groups(checkpoint.names[row], *rows[row], f"element {first} is {int(stored[first])}")


def _shuffled_groups(name: str, columns: int, group: int, found: str) -> UnsupportedError:
    text = "groups by activation order are not supported"
    expected = f"I32 [{columns}], in which element i is i // {group}"
    return UnsupportedError(message(text, where=name, expected=expected, found=found, do=[KEEP]))
