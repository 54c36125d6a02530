"""Lower rules to copies for sources of given shapes; equal rules over equal shapes are lowered once."""

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
    """One tensor that a rule makes: its key, shape and copies, and the ordinals of the sources they read."""

    key: str
    shape: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    reads: tuple[int, ...]


class Made(NamedTuple):
    """What a rule makes of sources of given shapes, and the ordinals of sources that it drops."""

    outputs: tuple[Output, ...]
    dropped: tuple[int, ...]


class RuleOutputs:
    """The outputs of rules, by the shapes of their sources.

    Args:
        parameters: shapes of the model's parameters, for operations that ask.
        lies_transposed: by an assignment's target, where its shape does not tell.
    """

    def __init__(
        self,
        sources: SourceTable,
        rules: Rules,
        parameters: Mapping[str, tuple[int, ...]],
        lies_transposed: Mapping[str, bool],
    ):
        self.sources = sources
        self.rules = rules
        self.parameters = parameters
        self.lies_transposed = lies_transposed
        self._whole: dict[int, tuple[StridedCopy, ...]] = {}
        self._lowered: dict[object, Made] = {}
        self._chains: dict[int, tuple[Operation, ...] | NotLowerable] = {}

    def whole(self, numel: int) -> tuple[StridedCopy, ...]:
        """The copies of a tensor that stays unchanged."""
        if numel not in self._whole:
            self._whole[numel] = copies_of(leaf(0, (numel,)))
        return self._whole[numel]

    def of(self, assignment: Assignment) -> Made:
        """What the rule of an assignment makes of its sources.

        Raises:
            NotLowerable, NotAffine: an operation cannot be copies.
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
        transposed = self.lies_transposed.get(assignment.target)
        wanted = self._target_shapes(assignment) if needs_target_shapes(chain, transposed) else ()
        key = (
            rule,
            wanted,
            transposed,
            *(
                (pattern, len(rows), *_distinct([shapes[row] for row in rows]))
                for pattern, rows in assignment.slots.items()
            ),
        )
        if key not in self._lowered:
            slots, ordinal = {}, 0
            for pattern, rows in assignment.slots.items():
                slots[pattern] = leaves(ordinal, [shapes[row] for row in rows])
                ordinal += len(rows)
            values = lower(chain, slots, Context(source_patterns, target_patterns, wanted, transposed))
            self._lowered[key] = _made(values, [shapes[row] for rows in assignment.slots.values() for row in rows])
        return self._lowered[key]

    def _target_shapes(self, assignment: Assignment) -> tuple[tuple[int, ...], ...]:
        names = all_targets(self.rules, assignment.rule, assignment.target)
        if any(name not in self.parameters for name in names):
            raise NotLowerable(f"the operation asks for the shapes of {', '.join(names)}, which only a model knows")
        return tuple(self.parameters[name] for name in names)


def _distinct(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """One shape if all are equal, else all of them: enough to tell one lowering from another."""
    return shapes[:1] if shapes.count(shapes[0]) == len(shapes) else shapes


def _made(values: Mapping[str, Value], shapes: Sequence[tuple[int, ...]]) -> Made:
    """The outputs of a rule for sources of these shapes, from the values that its operations leave."""
    outputs = []
    for key, value in values.items():
        copies = copies_of(value)
        reads = tuple(sorted({ordinal for copy in copies for ordinal in copy.ordinals}))
        place = {ordinal: i for i, ordinal in enumerate(reads)}
        copies = tuple(copy._replace(ordinals=tuple([place[o] for o in copy.ordinals])) for copy in copies)
        outputs.append(Output(key, value.shape, copies, reads))
    given = {ordinal for ordinal, shape in enumerate(shapes) if 0 not in shape}
    return Made(tuple(outputs), tuple(sorted(given.difference(*(output.reads for output in outputs)))))
