"""From a chain of operations to strided copies; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from automodel_conv.planning.copies import SPAN, StridedCopy, by_source, group_copies
from automodel_conv.planning.operations import OPERATIONS, Context, Inputs, Operation, single
from automodel_conv.planning.values import LoweringError, Value


def needs_target_shapes(operations: Sequence[Operation], transposed: bool | None = None) -> bool:
    """True if the chain cannot be lowered without the shapes of the model's parameters.

    Args:
        transposed: see ``Context``.
    """
    return any(OPERATIONS[op.name].asks_for_shapes(op, transposed is not None) for op in operations)


def lower(operations: Sequence[Operation], inputs: Mapping[str, list[Value]], context: Context) -> dict[str, Value]:
    """Run a chain of operations on values; the result is keyed as upstream's ``convert`` keys it.

    Raises:
        LoweringError: the sources do not fit an operation; the message names the operation.
        NotAffine: the copies are not boxes; the caller falls back to upstream's own ``convert``.
    """
    values: Inputs = dict(inputs)
    for operation in operations:
        try:
            values = OPERATIONS[operation.name].lower(values, context, **dict(operation.options))
        except LoweringError as error:
            raise LoweringError(f"{operation}: {error}") from None
    return {name: single(value) for name, value in values.items()}


def copies_of(value: Value) -> tuple[StridedCopy, ...]:
    """The copies that make a value; their ordinals are the numbers of the sources."""
    moved = [piece._replace(source_offset=piece.source_offset + value.source * SPAN) for piece in value.pieces]
    return group_copies([by_source(walk) for walk in moved])
