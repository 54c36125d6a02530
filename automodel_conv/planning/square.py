"""Square matrices of rules that transpose only what does not have the model's shape.

transformers' ``Transpose(check_dims=True)`` leaves a tensor as it is if its shape is the model's, and transposes it
otherwise, so that one rule loads both published experts and those that ``save_pretrained`` wrote. A square matrix has
the model's shape either way. It lies as the other matrices of its module do, whose shapes tell.
Source: transformers 5.23.0, ``core_model_loading.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from automodel_conv.errors import Advice, UnsupportedError, listing, message
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.lowering import lower
from automodel_conv.planning.operations import OPERATIONS, Context, NotLowerable, Operation
from automodel_conv.planning.resolve import Assignment, all_targets
from automodel_conv.planning.rules import Rules
from automodel_conv.planning.values import LoweringError, leaves

WHICH_SOURCE_LAYOUT = (
    'source_layout="transformers" if they lie as the model has them, '
    'or source_layout="per_expert" if they lie as the type is published, which is transposed'
)
"""What a caller can say of square matrices."""

_SAY = (
    'say {source_layout="transformers"} if they lie as the model has them, '
    'or {source_layout="per_expert"} if they lie as the type is published, which is transposed',
    "leave {reference} out, so that the rules say the names, or pass one that says how its experts lie: "
    '{convert_checkpoint(..., layout="transformers", source_layout=...)} writes it',
)


class Matrix(NamedTuple):
    """What a rule transposes if its shape is not the model's, as it comes to that operation."""

    target: str
    operation: Operation
    dims: tuple[int, int]
    shape: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def is_square(self) -> bool:
        """True if it has the model's shape both as it is and transposed, and these two differ."""
        size = [self.shape[dim] for dim in self.dims]
        return self.shape == self.wanted == self._transposed and min(size) > 1 and 0 not in self.shape

    @property
    def is_transposed(self) -> bool | None:
        """What the shape alone tells; None if it tells nothing."""
        fits, fits_swapped = self.shape == self.wanted, self._transposed == self.wanted
        return None if fits == fits_swapped else fits_swapped

    @property
    def _transposed(self) -> tuple[int, ...]:
        dim0, dim1 = self.dims
        shape = list(self.shape)
        shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
        return tuple(shape)


def square_matrices(
    assignments: Sequence[Assignment],
    rules: Rules,
    shapes: Sequence[tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
    transposed: bool | None = None,
    do: Sequence[Advice] = (_SAY,),
) -> dict[str, bool]:
    """Whether each square matrix is transposed, by the rule's first target; all others tell it by their own shapes.

    Rules that are reversed ask of no tensor how it lies: it is the model's.

    Args:
        shapes: of the sources.
        parameters: shapes of the model's parameters.
        transposed: of those of which no other matrix tells how they lie; None: they are an error.
        do: what to do about a matrix of which nothing tells how it lies.

    Raises:
        UnsupportedError: no other matrix of the module tells, or two of them lie differently.
    """
    matrices = [] if rules.reverse else _matrices(assignments, rules, shapes, parameters)
    seen: dict[tuple[str, Operation], set[bool]] = {}
    for matrix in matrices:
        if matrix.is_transposed is not None:
            seen.setdefault((matrix.module, matrix.operation), set()).add(matrix.is_transposed)
    square = [matrix for matrix in matrices if matrix.is_square]
    told = {matrix.target: seen.get((matrix.module, matrix.operation), set()) for matrix in square}
    unknown = [f"{matrix.target} {list(matrix.shape)}" for matrix in square if len(told[matrix.target]) != 1]
    if unknown and transposed is None:
        raise UnsupportedError(
            message(
                "square matrices may lie transposed or not, and no other matrix of their module tells which:\n"
                + listing(unknown),
                do=do,
            )
        )
    return {target: True in lies if len(lies) == 1 else bool(transposed) for target, lies in told.items()}


def _matrices(
    assignments: Sequence[Assignment],
    rules: Rules,
    shapes: Sequence[tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
) -> list[Matrix]:
    chains = conditional_transposes(rules)
    if not chains:
        return []
    matrices = []
    for assignment in assignments:
        if assignment.rule not in chains:
            continue
        names = all_targets(rules, assignment.rule, assignment.target)
        if any(name not in parameters for name in names):
            continue
        before, operation = chains[assignment.rule]
        wanted = tuple(parameters[name] for name in names)
        inputs = {pattern: leaves(0, [shapes[row] for row in rows]) for pattern, rows in assignment.slots.items()}
        try:
            made = lower(before, inputs, Context(*rules.patterns(assignment.rule), wanted))
        except (LoweringError, NotAffine):  # which whoever compiles the rule tells
            continue
        shape = next(iter(made.values())).shape
        options: dict[str, Any] = dict(operation.options)
        dims = options["dim0"], options["dim1"]
        if all(-len(shape) <= dim < len(shape) for dim in dims):
            matrices.append(Matrix(assignment.target, operation, dims, shape, wanted[0]))
    return matrices


def conditional_transposes(rules: Rules) -> dict[int, tuple[tuple[Operation, ...], Operation]]:
    """By rule, the operation that transposes what does not have the model's shape, after those that come before it."""
    found = {}
    for row in range(len(rules.converters)):
        try:
            chain = rules.operations(row)
        except NotLowerable:
            continue
        for i, operation in enumerate(chain):
            condition = OPERATIONS[operation.name].only_if
            if condition is not None and operation.option(condition):
                found[row] = (chain[:i], operation)
                break
    return found
