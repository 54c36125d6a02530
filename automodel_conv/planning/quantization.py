"""Match the codes and scales of a checkpoint to their weights, and describe how each weight is decoded.

A checkpoint states this twice: in the ``quantization_config`` of its ``config.json`` (see ``schemes.py``), and by the
names, dtypes and shapes of its tensors. Both must agree. The result is a source table that lists weights in place of
their codes, so that the rest of planning needs no notion of quantization until the bytes are read.

An element is ``value(code) * scale``. ``e4m3`` and ``e5m2`` are FP8 and ``e2m1`` is FP4. ``int4`` is an integer stored
with 8 added, less the zero point if it has one. ``int8`` is an integer in two's complement. Scales are floats, or
powers of two stored as one-byte exponents (``F8_E8M0``, and ``U8`` in MX formats), or FP8 values that a global scale
multiplies or divides (NVFP4).
Sources: OCP Microscaling Formats 1.0; transformers 5.24.0, ``integrations/finegrained_fp8.py`` and ``mxfp4.py``;
compressed-tensors 0.20.1, ``compressors/*/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from automodel_conv.errors import QuantizationError, listing, message
from automodel_conv.planning.arrangement import PLAIN, Arrangement
from automodel_conv.planning.code_matcher import CodeMatcher
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.methods.method import (
    part_name,
)
from automodel_conv.planning.methods.table import method_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.schemes import KEEP, read_config
from automodel_conv.planning.values import leaf


def quantized_table(
    table: SourceTable, config: Mapping[str, Any], *, like_upstream: bool = False, where: str | None = None
) -> SourceTable:
    """Return ``table`` with each row of codes described as its decoded weight, and all other parts hidden.

    The scales of a quantized KV cache are hidden too. They belong to no weight.

    Args:
        config: the ``quantization_config`` of the model's ``config.json``.
        like_upstream: round as transformers does where that differs.
        where: path of the file that holds the config, for errors.

    Raises:
        UnsupportedError: the method or a scheme is not supported; the error names it.
        QuantizationError: parts are missing, do not fit each other or contradict the config. The error lists all of
            them.
    """
    method, schemes = read_config(config, where)
    matcher = CodeMatcher(table, method, schemes, like_upstream)
    matcher.match_all()
    if schemes and not matcher.problems and not matcher.decodes and not method.model_types:
        matcher.problems.add("no tensor has codes and a scale, though the config says that weights are quantized")
    if matcher.problems:
        number = len(matcher.problems)
        raise QuantizationError(
            message(
                "the checkpoint's quantized tensors cannot be decoded",
                where=f"{where or 'config.json'}, quantization method {method.name}, {number} problems",
                found="\n" + listing(matcher.problems.texts()),
                do=["check that the config belongs to these files", KEEP],
            )
        )
    return matcher.decoded()


class PaddingSuspect(NamedTuple):
    """Codes whose rows may end in padding."""

    row: int
    """Row of the codes."""
    shape_name: str
    """Name of the tensor that holds the true shape of the weight."""
    codes_per_element: int
    """Number of codes in an element. Fewer of them are padding."""


def padding_suspects(stored: SourceTable, decoded: SourceTable, config: Mapping[str, Any]) -> Iterator[PaddingSuspect]:
    """Yield codes whose rows may end in padding.

    Rows of whole groups do not: compressed-tensors refuses to quantize others (compressed-tensors 0.20.1,
    ``quantization/lifecycle/forward_helpers.py``).

    Args:
        stored: the checkpoint's tensors as stored.
        decoded: ``quantized_table`` of ``stored`` and ``config``.
        config: the ``quantization_config``.
    """
    method = method_of(config)
    packings = [packing for packing in method.codes if packing.shape_suffix] if method is not None else []
    for row, decode in decoded.decodes.items() if packings else ():
        columns, group = decode.matrix[1], decode.block[1]
        if group < columns and columns % group == 0:
            continue
        for packing in packings:
            if stored.dtypes[row] == packing.dtype and stored.names[row].endswith(packing.suffix):
                shape_name = part_name(decoded.names[row], packing.shape_suffix)
                if shape_name is not None:
                    yield PaddingSuspect(row, shape_name, packing.codes_per_element)


def without_padding(decoded: SourceTable, widths: Mapping[int, int]) -> SourceTable:
    """Return a table whose weights have only the columns that are not padding.

    Args:
        decoded: the table.
        widths: true number of columns, by row.
    """
    if not widths:
        return decoded
    decodes = {
        row: decode._replace(arrangement=decode.arrangement._replace(width=widths[row])) if row in widths else decode
        for row, decode in decoded.decodes.items()
    }
    return replace(decoded, decodes=decodes)


def group_indices(decoded: SourceTable, config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors, if they exist, that hold the group of each column of a weight.

    Args:
        decoded: the decoded table.
        config: the ``quantization_config``.

    Yields:
        The name of the tensor, the number of columns of the weight, and the number of columns of a group.
    """
    method = method_of(config)
    suffix = method.group_index if method is not None else ""
    for row, decode in decoded.decodes.items() if suffix else ():
        name, shape = part_name(decoded.names[row], suffix), decode.arrangement.shape(decode.matrix)
        if name is not None and shape is not None:
            yield name, shape[1], decode.block[0] * shape[1] // max(1, decode.matrix[0])


def arranged_plan(table: SourceTable) -> CopyPlan:
    """Return the plan that views each quantized source as its weight, and copies all other sources unchanged."""
    copies_by_shape: dict[tuple[tuple[int, ...], Arrangement], Any] = {}
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if row in table.hidden:
            continue
        decode = table.decodes.get(row)
        key = shape, PLAIN if decode is None else decode.arrangement
        if key not in copies_by_shape:
            value = leaf(0, shape) if key[1] == PLAIN else key[1].view(leaf(0, shape))
            copies_by_shape[key] = value.shape, copies_of(value)
        target_shape, copies = copies_by_shape[key]
        targets.append(Target(name, dtype, target_shape, -1, (row,), copies))
    plan = CopyPlan(table, tuple(targets))
    plan.validate()
    return plan
