"""Decide whether a square matrix is transposed by a rule that compares with the model's shape.

transformers' ``Transpose(check_dims=True)`` leaves a tensor as it is if its shape is the model's, and transposes it
otherwise. One rule thus loads both published experts and those that ``save_pretrained`` wrote. A square matrix has the
model's shape either way. It is oriented like the other matrices of its module, whose shapes show the orientation.
Source: transformers 5.24.0, ``core_model_loading.py``.
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
    'source_layout="transformers" if they are oriented as in the model, '
    'or source_layout="per_expert" if they are transposed, as in published checkpoints of the model type'
)
"""Values of ``source_layout`` that determine the orientation of square matrices, for advice in errors."""

_ADVICE = (
    'pass {source_layout="transformers"} if they are oriented as in the model, '
    'or {source_layout="per_expert"} if they are transposed, as in published checkpoints of the model type',
    "leave {reference} out, so that the rules determine the names, or pass one that states the layout of its experts: "
    '{convert_checkpoint(..., layout="transformers", source_layout=...)} writes it',
)


class Matrix(NamedTuple):
    """A tensor just before the operation that transposes it if it lacks the model's shape.

    Attributes:
        target: the rule's first target.
        operation: the operation that may transpose.
        dims: the two dimensions that it swaps.
        shape: shape of the tensor.
        wanted: shape of the model's parameter.
    """

    target: str
    operation: Operation
    dims: tuple[int, int]
    shape: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def module(self) -> str:
        """Name of the target's module."""
        return self.target.rpartition(".")[0]

    @property
    def is_square(self) -> bool:
        """Whether it has the model's shape both as stored and transposed, and transposing changes its elements."""
        size = [self.shape[dim] for dim in self.dims]
        return self.shape == self.wanted == self._transposed and min(size) > 1 and 0 not in self.shape

    @property
    def is_transposed(self) -> bool | None:
        """Whether the shape shows that it is stored transposed; None if it does not show either."""
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
    do: Sequence[Advice] = (_ADVICE,),
) -> dict[str, bool]:
    """Return whether each square matrix must be transposed, by the rule's first target.

    The shapes of all other matrices show their orientation. Reversed rules have no such matrices: their tensors are
    the model's own.

    Args:
        shapes: shapes of the sources.
        parameters: shapes of the model's parameters, by name.
        transposed: the answer for matrices whose module does not determine it; None: raise an error.
        do: advice for that error.

    Raises:
        UnsupportedError: no other matrix of the module shows the orientation, or two of them contradict each other.
    """
    matrices = [] if rules.reverse else _matrices(assignments, rules, shapes, parameters)
    orientations: dict[tuple[str, Operation], set[bool]] = {}
    for matrix in matrices:
        if matrix.is_transposed is not None:
            orientations.setdefault((matrix.module, matrix.operation), set()).add(matrix.is_transposed)
    square = [matrix for matrix in matrices if matrix.is_square]
    answers = {matrix.target: orientations.get((matrix.module, matrix.operation), set()) for matrix in square}
    unknown = [f"{matrix.target} {list(matrix.shape)}" for matrix in square if len(answers[matrix.target]) != 1]
    if unknown and transposed is None:
        raise UnsupportedError(
            message(
                "square matrices may be transposed or not, and no other matrix of their module shows which:\n"
                + listing(unknown),
                do=do,
            )
        )
    return {target: True in seen if len(seen) == 1 else bool(transposed) for target, seen in answers.items()}


def _matrices(
    assignments: Sequence[Assignment],
    rules: Rules,
    shapes: Sequence[tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
) -> list[Matrix]:
    """Return the inputs of all conditional transposes."""
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
            values = lower(before, inputs, Context(*rules.patterns(assignment.rule), wanted))
        except (LoweringError, NotAffine):  # the compiler reports this when it lowers the whole rule
            continue
        shape = next(iter(values.values())).shape
        options: dict[str, Any] = dict(operation.options)
        dims = options["dim0"], options["dim1"]
        if all(-len(shape) <= dim < len(shape) for dim in dims):
            matrices.append(Matrix(assignment.target, operation, dims, shape, wanted[0]))
    return matrices


def conditional_transposes(rules: Rules) -> dict[int, tuple[tuple[Operation, ...], Operation]]:
    """Return ``{converter row: (operations before, operation)}`` for rules that transpose depending on the shape."""
    transposes = {}
    for row in range(len(rules.converters)):
        try:
            chain = rules.operations(row)
        except NotLowerable:
            continue
        for i, operation in enumerate(chain):
            condition = OPERATIONS[operation.name].only_if
            if condition is not None and operation.option(condition):
                transposes[row] = (chain[:i], operation)
                break
    return transposes
