"""Lower a chain of operations to strided copies; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from automodel_conv.planning.boxes import SPAN
from automodel_conv.planning.copies import StridedCopy, by_source, group_copies
from automodel_conv.planning.operations import OPERATIONS, Context, Inputs, Operation, single
from automodel_conv.planning.values import LoweringError, Value


def needs_target_shapes(operations: Sequence[Operation], transposed: bool | None = None) -> bool:
    """Return whether the chain cannot be lowered without the shapes of the model's parameters.

    Args:
        operations: the chain.
        transposed: as in ``Context``.
    """
    return any(OPERATIONS[op.name].reads_shapes(op, transposed is not None) for op in operations)


def lower(operations: Sequence[Operation], inputs: Mapping[str, list[Value]], context: Context) -> dict[str, Value]:
    """Run a chain of operations on symbolic tensors; the result has the keys of transformers' own ``convert``.

    Raises:
        LoweringError: the sources do not fit an operation; the message names the operation.
        NotAffine: the copies are not boxes; the caller falls back to transformers' own ``convert``.
    """
    values: Inputs = dict(inputs)
    for operation in operations:
        try:
            values = OPERATIONS[operation.name].lower(values, context, **dict(operation.options))
        except LoweringError as error:
            raise LoweringError(f"{operation}: {error}") from None
    return {name: single(value) for name, value in values.items()}


def copies_of(value: Value) -> tuple[StridedCopy, ...]:
    """Return the copies that fill a value; their ordinals are the numbers of its sources."""
    pieces = [piece._replace(source_offset=piece.source_offset + value.source * SPAN) for piece in value.pieces]
    return group_copies([by_source(piece) for piece in pieces])
