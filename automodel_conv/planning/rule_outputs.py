"""Lower rules to copies for sources of given shapes.

Equal rules over equal shapes are lowered once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from automodel_conv.planning.copies import SourceTable, StridedCopy
from automodel_conv.planning.lowering import copies_of, lower, needs_target_shapes
from automodel_conv.planning.operations import Context, NotLowerable, Operation
from automodel_conv.planning.resolve import Assignment, all_targets
from automodel_conv.planning.rules import Rules
from automodel_conv.planning.values import Value, leaf, leaves


class Output(NamedTuple):
    """One output tensor of a rule."""

    key: str
    """Key of the tensor in the output of transformers' operations."""
    shape: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    """Copies that fill the tensor; their ordinals index ``reads``."""
    reads: tuple[int, ...]
    """Ordinals of the sources that the copies read, among all sources of the rule."""
    zero_rows: int = 0
    """Number of the last rows that no copy fills, because they are zero."""


class Lowered(NamedTuple):
    """A rule that is lowered for sources of given shapes."""

    outputs: tuple[Output, ...]
    dropped: tuple[int, ...]
    """Ordinals of the sources that no output reads."""


class RuleOutputs:
    """The outputs of rules, cached by the shapes of their sources.

    Args:
        sources: tensors of a checkpoint.
        rules: the rules.
        parameters: shapes of the model's parameters, for operations that read them.
        transposed_by_target: whether a square matrix is transposed, by the target of its assignment.
    """

    def __init__(
        self,
        sources: SourceTable,
        rules: Rules,
        parameters: Mapping[str, tuple[int, ...]],
        transposed_by_target: Mapping[str, bool],
    ):
        self.sources = sources
        self.rules = rules
        self.parameters = parameters
        self.transposed_by_target = transposed_by_target
        self._whole: dict[int, tuple[StridedCopy, ...]] = {}
        self._cache: dict[object, Lowered] = {}
        self._chains: dict[int, tuple[Operation, ...] | NotLowerable] = {}

    def whole(self, numel: int) -> tuple[StridedCopy, ...]:
        """Return the copies of a tensor of ``numel`` elements that stays unchanged."""
        if numel not in self._whole:
            self._whole[numel] = copies_of(leaf(0, (numel,)))
        return self._whole[numel]

    def lower_rule(self, assignment: Assignment) -> Lowered:
        """Return the rule of an assignment, lowered for the shapes of its sources.

        Raises:
            NotLowerable, NotAffine: an operation cannot be expressed as copies.
            LoweringError: the shapes of the sources do not fit each other.
        """
        rule = assignment.rule
        if rule not in self._chains:
            try:
                self._chains[rule] = self.rules.operations(rule)
            except NotLowerable as error:
                self._chains[rule] = error
        chain = self._chains[rule]
        if isinstance(chain, NotLowerable):
            raise chain
        source_patterns, target_patterns = self.rules.patterns(rule)
        shapes = self.sources.shapes
        transposed = self.transposed_by_target.get(assignment.target)
        target_shapes = self._target_shapes(assignment) if needs_target_shapes(chain, transposed) else ()
        key = (
            rule,
            target_shapes,
            transposed,
            *(
                (pattern, len(rows), *_distinct([shapes[row] for row in rows]))
                for pattern, rows in assignment.slots.items()
            ),
        )
        if key not in self._cache:
            slots, ordinal = {}, 0
            for pattern, rows in assignment.slots.items():
                slots[pattern] = leaves(ordinal, [shapes[row] for row in rows])
                ordinal += len(rows)
            values = lower(chain, slots, Context(source_patterns, target_patterns, target_shapes, transposed))
            self._cache[key] = _with_outputs(
                values, [shapes[row] for rows in assignment.slots.values() for row in rows]
            )
        return self._cache[key]

    def _target_shapes(self, assignment: Assignment) -> tuple[tuple[int, ...], ...]:
        names = all_targets(self.rules, assignment.rule, assignment.target)
        if any(name not in self.parameters for name in names):
            raise NotLowerable(f"the operation needs the shapes of {', '.join(names)}, which only a model has")
        return tuple(self.parameters[name] for name in names)


def _distinct(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return one shape if all are equal, else all of them.

    That is enough to distinguish lowerings.
    """
    return shapes[:1] if shapes.count(shapes[0]) == len(shapes) else shapes


def _with_outputs(values: Mapping[str, Value], shapes: Sequence[tuple[int, ...]]) -> Lowered:
    """Return the outputs of a rule for sources of these shapes, from the results of its operations."""
    outputs = []
    for key, value in values.items():
        copies = copies_of(value)
        reads = tuple(sorted({ordinal for copy in copies for ordinal in copy.ordinals}))
        index = {ordinal: i for i, ordinal in enumerate(reads)}
        copies = tuple(copy._replace(ordinals=tuple([index[o] for o in copy.ordinals])) for copy in copies)
        outputs.append(Output(key, value.shape, copies, reads, value.zero_rows))
    not_empty = {ordinal for ordinal, shape in enumerate(shapes) if 0 not in shape}
    return Lowered(tuple(outputs), tuple(sorted(not_empty.difference(*(output.reads for output in outputs)))))
