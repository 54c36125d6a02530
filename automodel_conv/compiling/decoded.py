"""The tensors of a checkpoint as a table of sources, in which quantized tensors stand for their decoded values."""

from __future__ import annotations

from collections.abc import Iterable

from automodel_conv.errors import QuantizationError, message
from automodel_conv.execution.reading import read_whole
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import MODELOPT_NAME, quantization
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.quantization import padding_suspects, quantized_table
from automodel_conv.planning.schemes import KEEP


def decoded_table(checkpoint: Checkpoint, wants_numbers: bool) -> SourceTable:
    """The tensors that a checkpoint offers; quantized ones as the numbers that they stand for.

    Args:
        wants_numbers: whether codes that nothing says how to decode are an error.

    Raises:
        CheckpointError: ``config.json``, or modelopt's own file, is malformed.
        QuantizationError: see ``quantized_table``; or codes and scales without a config, where numbers are wanted.
    """
    table = SourceTable.from_checkpoint(checkpoint)
    told = quantization(checkpoint.directory)
    if told is not None:
        decoded = quantized_table(table, told.settings, where=told.path)
        _check_padding(checkpoint, padding_suspects(table, decoded, told.settings), decoded)
        return decoded
    codes = has_codes(table) if wants_numbers else None
    if codes is not None:
        raise unknown_codes(codes, checkpoint)
    return table


def unknown_codes(codes: str, checkpoint: Checkpoint) -> QuantizationError:
    """The error for codes of which no config says how they decode."""
    return QuantizationError(
        message(
            f"{codes} has the form of quantized codes, and nothing says how they decode",
            where=checkpoint.path,
            expected=f"a quantization_config in the config.json beside the files, or modelopt's {MODELOPT_NAME}",
            do=["put there what the release has of the two", KEEP],
        )
    )


def _check_padding(checkpoint: Checkpoint, tellers: Iterable[tuple[int, str]], table: SourceTable) -> None:
    """Rows of packed codes may end in padding, which is not left out here.

    A plan of what is not on this machine comes from headers alone; who reads the data makes another one.

    Args:
        tellers: rows, and the names of the tensors that tell their shapes.

    Raises:
        QuantizationError: they do.
    """
    if checkpoint.is_remote:
        return
    for row, teller in tellers:
        shape = checkpoint.position.get(teller)
        if shape is None:
            continue
        is_shape = checkpoint.shapes[shape] == (len(table.shapes[row]),)
        said = read_whole(shape, checkpoint).tolist() if is_shape else checkpoint.shapes[shape]
        if said != list(table.shapes[row]):
            name = checkpoint.names[row]
            text = "the rows of packed codes end in padding, which is not left out here"
            raise QuantizationError(message(text, where=name, expected=list(table.shapes[row]), found=said))
