"""Describe the two matrices of a new module of an adapter as parts of the matrices of old ones; pure.

A new module belongs to a tensor of the base model. Each old module that changes a part of that tensor contributes a
component to it: its B fills rows of the new B, and its A fills columns of the new A, at ranks of its own. Therefore the
product of the new matrices is the sum of the old products, each in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, product
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.lora.matching import Match
from automodel_conv.planning.deltas import Block


class Steps(NamedTuple):
    """Indices ``start, start + step, ...`` of a dimension."""

    start: int
    step: int
    count: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)


class Part(NamedTuple):
    """A rectangle of a new product, and the rectangle of an old one that it equals."""

    outputs: Steps
    """Rows of the new B."""
    inputs: Steps
    """Columns of the new A."""
    old_rows: Steps
    """Rows of the old B."""
    old_columns: Steps
    """Columns of the old A."""
    is_transposed: bool
    """Whether outputs are columns of the old A, and inputs are rows of the old B."""

    @property
    def old_outputs(self) -> Steps:
        """The indices of the old product that become outputs."""
        return self.old_columns if self.is_transposed else self.old_rows

    @property
    def old_inputs(self) -> Steps:
        """The indices of the old product that become inputs."""
        return self.old_rows if self.is_transposed else self.old_columns


class Component(NamedTuple):
    """The contribution of one matrix of an old module to one matrix of a new one."""

    old: int
    """Number of the match of the old module."""
    matrix: int
    """Number of the old matrix in its stack."""
    parts: tuple[Part, ...]
    ranks: slice
    """Ranks of the old module that are used."""

    @property
    def rank(self) -> int:
        """Number of ranks."""
        return self.ranks.stop - self.ranks.start

    @property
    def place(self) -> tuple[tuple[Steps, Steps], ...]:
        """Place in the new product; components of different experts in equal places have the same ranks."""
        return tuple((part.outputs, part.inputs) for part in self.parts)


class NewModule(NamedTuple):
    """A module of the new adapter."""

    name: str
    """Name of the module in the new adapter, without the prefix of adapters."""
    weight: str
    """Name of the tensor of the base model."""
    stated: str
    """Name by which the config states its rank and alpha."""
    shape: tuple[int, int, int]
    """Matrices, outputs and inputs."""
    components: tuple[tuple[Component, ...], ...]
    """Components of each matrix, in any order."""
    slots: tuple[tuple[tuple[Steps, Steps], ...], ...]
    """Place of each slot."""
    starts: tuple[int, ...]
    """First rank of each slot."""
    rank: int
    """Rank of the module."""
    scale: float
    is_embedding: bool = False
    is_parameter: bool = False
    """Whether the module is that of a parameter, which the config lists in ``target_parameters``."""

    def untrained(self) -> list[int]:
        """Return the matrices that lack a component, so that a part of them is zero."""
        return [matrix for matrix, components in enumerate(self.components) if len(components) < len(self.slots)]


RanksOf = Callable[[Block], slice]
"""Returns the ranks of an old module that contribute to a block."""


def new_module(
    weight: str,
    shape: Sequence[int],
    blocks: Iterable[Block],
    matches: Sequence[Match],
    ranks_of: RanksOf,
    *,
    inputs_last: bool = True,
) -> NewModule:
    """Return the module of one tensor, named after the tensor.

    Args:
        weight: name of the tensor.
        shape: its shape: a matrix or a stack of matrices.
        blocks: the blocks of old modules in it.
        matches: the old modules.
        ranks_of: returns the ranks of an old module that contribute to a block.
        inputs_last: whether the last dimension of the tensor holds its inputs.

    Raises:
        UnsupportedError: ranks or scales of modules that become one module differ.
    """
    count, rows, columns = (1, *shape)[-3:]
    numel = rows * columns
    grouped: list[dict[tuple[int, int, int, int], list[Part]]] = [{} for _ in range(count)]
    for block in blocks:
        ranks = ranks_of(block)
        key = (block.delta, block.matrix, ranks.start, ranks.stop)
        part = _part(block, numel, columns, inputs_last)
        grouped[block.offset // numel].setdefault(key, []).append(part)
    components = [
        tuple(
            Component(old, matrix, _as_product(parts, weight), slice(first, last))
            for (old, matrix, first, last), parts in group.items()
        )
        for group in grouped
    ]
    every = [component for group in components for component in group]
    slots = sorted({component.place for component in every})
    ranks = _equal(
        {slot: [c for c in every if c.place == slot] for slot in slots}, lambda c: c.rank, weight, "rank", matches
    )
    scales = _equal({(): every}, lambda c: matches[c.old].delta.scale, weight, "scale", matches)
    outputs, inputs = (rows, columns) if inputs_last else (columns, rows)
    return NewModule(
        name=weight,
        weight=weight,
        stated=weight,
        shape=(count, outputs, inputs),
        components=tuple(components),
        slots=tuple(slots),
        starts=tuple(accumulate(map(int, ranks[:-1]), initial=0)),
        rank=int(sum(ranks)),
        scale=scales[0],
        is_embedding=any(matches[component.old].is_embedding for component in every),
    )


def _part(block: Block, numel: int, columns: int, inputs_last: bool) -> Part:
    """Return a block of a tensor as a part of the new product."""
    row, column = divmod(block.offset % numel, columns)
    old_rows = Steps(block.row, block.row_step, block.rows)
    old_columns = Steps(block.column, block.column_step, block.columns)
    down, across = (
        _steps(block.rows, block.row_stride, columns),
        _steps(block.columns, block.column_stride, columns),
    )
    rows_lie_down = down[0] if block.rows > 1 else not across[0] if block.columns > 1 else True
    if rows_lie_down:
        lies = Steps(row, down[1], block.rows), Steps(column, across[1], block.columns)
    else:
        lies = Steps(row, across[1], block.columns), Steps(column, down[1], block.rows)
    outputs, inputs = lies if inputs_last else lies[::-1]
    return Part(outputs, inputs, old_rows, old_columns, rows_lie_down != inputs_last)


def _steps(count: int, stride: int, columns: int) -> tuple[bool, int]:
    """Return whether a walk in a matrix goes down its rows, and its steps."""
    if count == 1:
        return True, 1
    return (True, stride // columns) if stride >= columns else (False, stride)


def _as_product(parts: Sequence[Part], weight: str) -> tuple[Part, ...]:
    """Return the parts of a component in order, if they are all rectangles of some outputs and some inputs.

    Raises:
        UnsupportedError: they are not, so no two matrices have their product.
    """
    outputs, inputs = {part.outputs for part in parts}, {part.inputs for part in parts}
    if {(part.outputs, part.inputs) for part in parts} != set(product(outputs, inputs)):
        text = f"the adapter of {weight} cannot be written as a product of two matrices"
        raise UnsupportedError(message(text, do="merge it instead: {merge_adapter(...)}"))
    return tuple(sorted(parts))


def _equal(
    groups: dict[tuple[tuple[Steps, Steps], ...], list[Component]],
    value_of: Callable[[Component], float],
    weight: str,
    what: str,
    matches: Sequence[Match],
) -> list[float]:
    """Return the value of each group, whose components must agree.

    Raises:
        UnsupportedError: they do not.
    """
    values = []
    for group in groups.values():
        by_value = {value_of(component): matches[component.old].delta.module for component in group}
        if len(by_value) > 1:
            found = listing(f"{value} of {module}" for value, module in by_value.items())
            do = "keep the form of the adapter, or merge it: {merge_adapter(...)}"
            text = f"modules that become one module of {weight} have different values of {what}"
            raise UnsupportedError(message(text, expected=f"one {what}", found="\n" + found, do=do))
        values += by_value
    return values
