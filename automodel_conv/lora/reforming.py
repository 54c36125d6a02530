"""Plan the modules of an adapter in another form, and compute their matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import promoted
from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.factors import Factors
from automodel_conv.lora.adapter import WRAPPED
from automodel_conv.lora.base import Base
from automodel_conv.lora.forms import PER_EXPERT, TRANSFORMERS, VLLM
from automodel_conv.lora.matching import Matches
from automodel_conv.lora.naming import named
from automodel_conv.lora.parts import Component, NewModule, Steps, new_module
from automodel_conv.planning.boxes import Piece
from automodel_conv.planning.deltas import Block, Delta, blocks_of, through
from automodel_conv.planning.plan import CopyPlan


class Reformed(NamedTuple):
    """The content of an adapter in another form."""

    modules: tuple[NewModule, ...]
    whole: dict[str, int]
    """Number of the match of each tensor that replaces one of the base model, by its new name."""
    shared: tuple[str, ...]
    """Tensors whose modules have all ranks of an old module, because these also belong to other tensors."""
    left_out: tuple[str, ...]
    """Tensors whose modules were zero in a stack, and are not in the new form."""


class _Place(NamedTuple):
    """A tensor of the base model that the new form has a module for."""

    name: str
    shape: tuple[int, ...]
    blocks: list[Block]

    @property
    def is_stack(self) -> bool:
        return len(self.shape) == 3


def reform(matches: Matches, base: Base, form: str, factors: Factors) -> Reformed:
    """Plan the modules of an adapter in another form.

    Args:
        matches: the adapter, matched to its base model.
        base: the base model.
        form: name of the new form.
        factors: the old matrices. Those of stacks are read, because only their values show what is not trained, and
            which ranks belong to which projection.

    Raises:
        UnsupportedError: the new form cannot hold the adapter.
    """
    deltas = matches.deltas
    places = [part for place in _places(matches, base, form) for part in _with_tied_names(place, matches, base)]
    places, whole = _without_replaced(places, deltas)
    ranks = _ranks_of_lines(places, deltas, factors)
    modules, shared, left_out = [], [], []
    for place in places:
        is_embedding = any(matches.matches[block.delta].is_embedding for block in place.blocks)
        module = new_module(
            place.name,
            place.shape,
            place.blocks,
            matches.matches,
            lambda block: ranks[block.delta].get(_lines(block)) or slice(0, deltas[block.delta].rank),
            inputs_last=not is_embedding and (not place.is_stack or _has_inputs_last(place.name, base, form)),
        )
        module = _with_common_ranks(module, factors)
        was_in_stack = any(deltas[block.delta].shape[0] > 1 for block in place.blocks)
        is_needed = form == VLLM or not was_in_stack or any(map(torch.any, matrices(module, factors)))
        if not (module.rank and is_needed):
            left_out.append(place.name)
            continue
        modules.append(module)
        if any(_lines(block) in ranks[block.delta] and not ranks[block.delta][_lines(block)] for block in place.blocks):
            shared.append(place.name)
    return Reformed(tuple(named(modules, base, form)), whole, tuple(shared), tuple(left_out))


def matrices(module: NewModule, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return A ``[matrices * rank, inputs]`` and B ``[outputs, rank * matrices]`` of a new module."""
    count, outputs, inputs = module.shape
    a_type, b_type = (dtype_of(code, module.weight) for code in codes_of(module, factors))
    a = torch.zeros(count, module.rank, inputs, dtype=a_type)
    b = torch.zeros(count, outputs, module.rank, dtype=b_type)
    starts = dict(zip(module.slots, module.starts, strict=True))
    for matrix, components in enumerate(module.components):
        for component in components:
            old_a, old_b = (factor[component.matrix] for factor in factors.of(component.old) if factor is not None)
            old_a, old_b = old_a[component.ranks], old_b[:, component.ranks]
            first = starts[component.place]
            ranks = slice(first, first + component.rank)
            for part in component.parts:
                left, right = (old_a.T, old_b.T) if part.is_transposed else (old_b, old_a)
                rows, columns = part.old_outputs.slice, part.old_inputs.slice
                b[matrix, part.outputs.slice, ranks] = left[rows].to(b_type)
                a[matrix, ranks, part.inputs.slice] = right[:, columns].to(a_type)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()


def _with_common_ranks(module: NewModule, factors: Factors) -> NewModule:
    """Return a module whose slots have the same ranks if they have the same A and inputs, or the same B and outputs.

    Then the product needs these ranks only once. They come from one module that belonged to several tensors.
    """
    counts = {len(components) for components in module.components}
    ranks = {component.rank for components in module.components for component in components}
    if len(module.slots) < 2 or counts - {0, len(module.slots)} or len(ranks) != 1:
        return module
    is_common = [
        all(
            len({sides[side] for place in module.slots for sides in place}) == 1
            and _are_equal([_factor(component, side, factors) for component in components])
            for components in module.components
            if components
        )
        for side in (0, 1)
    ]
    return module._replace(starts=(0,) * len(module.slots), rank=ranks.pop()) if any(is_common) else module


def _factor(component: Component, side: int, factors: Factors) -> Tensor:
    """Return B of a component as ``[outputs, rank]`` (side 0), or A as ``[inputs, rank]`` (side 1)."""
    a, b = (factor[component.matrix] for factor in factors.of(component.old) if factor is not None)
    part = component.parts[0]
    is_a = bool(side) != part.is_transposed
    return (a[component.ranks].T if is_a else b[:, component.ranks])[(part.old_outputs, part.old_inputs)[side].slice]


def _are_equal(tensors: Sequence[Tensor]) -> bool:
    first, *others = tensors
    return all(other.dtype == first.dtype and torch.equal(other, first) for other in others)


def codes_of(module: NewModule, factors: Factors) -> tuple[str, str]:
    """Return the dtype codes of A and B of a new module, which hold all values of the old matrices."""
    kinds = {("F32", "F32")} if not any(module.components) else set()
    for component in (component for components in module.components for component in components):
        codes = factors.dtypes(component.old)
        kinds |= {codes[::-1] if part.is_transposed else codes for part in component.parts}
    a, b = zip(*sorted(kinds), strict=True)
    return promoted(a), promoted(b)


def _places(matches: Matches, base: Base, form: str) -> list[_Place]:
    if form == PER_EXPERT:
        published = _published(matches.placed, base, matches.deltas)
        stacks = [place.name for place in published if place.is_stack]
        if stacks:
            text = "the adapter has no form for single experts: the model is published with stacks of experts"
            do = f'layout="{TRANSFORMERS}" or "{VLLM}" of convert_adapter, adapter="fused" of save_checkpoint'
            raise UnsupportedError(message(text, where=base.where, found="\n" + listing(stacks), do=do))
        return published
    in_model = _in_model(matches.placed, base, matches.deltas)
    if form == TRANSFORMERS:
        return in_model
    stacks = [place for place in in_model if place.is_stack]
    stacked = {block.delta for place in stacks for block in place.blocks}
    others = {
        row: kept
        for row, pieces in matches.placed.items()
        if (kept := [piece for piece in pieces if piece.source not in stacked])
    }
    return [*stacks, *_published(others, base, matches.deltas)]


def _in_model(placed: Mapping[int, Sequence[Piece]], base: Base, deltas: Sequence[Delta]) -> list[_Place]:
    """Return the places in the parameters of the model."""
    plan = base.loading.plan
    shapes = {target.name: target.shape for target in plan.targets}
    pieces = through(plan, placed)
    return [_Place(name, shapes[name], blocks_of(group, deltas)) for name, group in pieces.items()]


def _published(placed: Mapping[int, Sequence[Piece]], base: Base, deltas: Sequence[Delta]) -> list[_Place]:
    """Return the places in published tensors; those of the checkpoint, unless it has stacks of experts."""
    weights = [base.weights[base.table.names[row]] for row in placed]
    if all(len(weight.shape) < 3 for weight in weights):
        pieces = through(CopyPlan(base.table, tuple(weights)), placed)
        return [_Place(weight.name, weight.shape, blocks_of(pieces[weight.name], deltas)) for weight in weights]
    in_model = through(base.loading.plan, placed)
    rows = {name: row for row, name in enumerate(base.published.sources.names)}
    pieces = through(base.published, {rows[name]: group for name, group in in_model.items()})
    shapes = {target.name: target.shape for target in base.published.targets}
    return [_Place(name, shapes[name], blocks_of(group, deltas)) for name, group in pieces.items()]


def _with_tied_names(place: _Place, matches: Matches, base: Base) -> Iterator[_Place]:
    """Yield a place for each name that old modules have for its tensor, if that is tied to others."""
    blocks: dict[str, list[Block]] = {}
    for block in place.blocks:
        old = matches.matches[block.delta].name
        blocks.setdefault(old if base.is_tied(old) else place.name, []).append(block)
    for name, group in blocks.items():
        yield place._replace(name=name, blocks=group)


def _has_inputs_last(name: str, base: Base, form: str) -> bool:
    """Return whether a stack of matrices has its inputs in the last dimension, in the view of a form.

    vLLM means the inputs of the layer. PEFT means the last dimension, unless the module states that it is transposed.
    """
    if form == VLLM:
        return base.has_inputs_last(base.targets[name])
    return not base.is_transposed(name.rpartition(".")[0])


def _without_replaced(places: Sequence[_Place], deltas: Sequence[Delta]) -> tuple[list[_Place], dict[str, int]]:
    """Return places without what the adapter replaces, and the old tensors that replace it, by their new names.

    An adapter of PEFT may have the weight of an embedding and matrices for it. The weight then has the name that it has
    in the wrapped module. Source: PEFT 0.21.2, ``save_embedding_layers`` in ``utils/save_and_load.py``.
    """
    kept, whole = [], {}
    for place in places:
        products = [block for block in place.blocks if deltas[block.delta].b is not None]
        replaced = [block for block in place.blocks if deltas[block.delta].b is None]
        if replaced:
            path, _, parameter = place.name.rpartition(".")
            name = f"{path}{WRAPPED}.{parameter}" if products else place.name
            whole[name] = _only_delta(place._replace(blocks=replaced), deltas)
        if products:
            kept.append(place._replace(blocks=products))
    return kept, whole


def _only_delta(place: _Place, deltas: Sequence[Delta]) -> int:
    """Return the number of the old tensor that is all of a new one.

    Raises:
        UnsupportedError: it is only a part, or is arranged in another way.
    """
    numel = sum(block.rows * block.columns for block in place.blocks)
    numbers = {block.delta for block in place.blocks}
    number = place.blocks[0].delta
    in_order = all(_keeps_order(block, deltas[number].shape[2]) for block in place.blocks)
    if len(numbers) > 1 or not in_order or not numel == deltas[number].numel == prod(place.shape):
        text = f"the adapter replaces a part of {place.name}, which no form of an adapter can state"
        raise UnsupportedError(message(text, do="merge it instead: {merge_adapter(...)}"))
    return number


def _keeps_order(block: Block, columns: int) -> bool:
    """Return whether the elements of a block have the same numbers in the tensor as in their delta of one matrix."""
    steps = (
        (block.rows, block.row_step * columns, block.row_stride),
        (block.columns, block.column_step, block.column_stride),
    )
    same_steps = all(count == 1 or old == new for count, old, new in steps)
    return same_steps and block.offset == block.row * columns + block.column


_Lines = tuple[Steps, Steps]
"""Rows and columns of an old matrix that belong to one tensor."""


def _lines(block: Block) -> _Lines:
    rows = Steps(block.row, block.row_step, block.rows)
    return rows, Steps(block.column, block.column_step, block.columns)


def _ranks_of_lines(
    places: Sequence[_Place], deltas: Sequence[Delta], factors: Factors
) -> dict[int, dict[_Lines, slice | None]]:
    """Return, for each old module whose matrices belong to several tensors, the ranks that each tensor needs.

    A stack for gate and up is the product of a B of two blocks, one for each, if the two were adapted separately. Then
    each needs half of the ranks. Otherwise all ranks belong to both, and the result has None.
    """
    lines: dict[int, dict[_Lines, set[str]]] = {number: {} for number in range(len(deltas))}
    for place in places:
        for block in place.blocks:
            if block.matrix == 0:
                lines[block.delta].setdefault(_lines(block), set()).add(place.name)
    ranks: dict[int, dict[_Lines, slice | None]] = {}
    for number, names in lines.items():
        divided = len(set().union(*names.values())) > 1
        ranks[number] = _divided(sorted(names), number, factors) if divided else {}
    return ranks


def _divided(lines: Sequence[_Lines], number: int, factors: Factors) -> dict[_Lines, slice | None]:
    a, b = factors.of(number)
    shared: dict[_Lines, slice | None] = dict.fromkeys(lines)
    if b is None:
        return shared
    rows, columns = {pair[0] for pair in lines}, {pair[1] for pair in lines}
    if len(rows) == len(lines) and len(columns) == 1:
        used = [torch.any(b[:, pair[0].slice] != 0, dim=(0, 1)) for pair in lines]
    elif len(columns) == len(lines) and len(rows) == 1:
        used = [torch.any(a[:, :, pair[1].slice] != 0, dim=(0, 2)) for pair in lines]
    else:
        return shared
    bounds = _bounds([torch.nonzero(mask).flatten().tolist() for mask in used], a.shape[1])
    if bounds is None:
        return shared
    return dict(zip(lines, (slice(*pair) for pair in pairwise(bounds)), strict=True))


def _bounds(used: Sequence[Sequence[int]], rank: int) -> list[int] | None:
    """Return where to divide ranks so that each part of a module has those that it uses; None if they are shared.

    Args:
        used: ranks that each part uses.
        rank: number of ranks.
    """
    if not any(used):
        return None
    count = len(used)
    equal = [rank * part // count for part in range(count + 1)]
    if rank % count == 0 and all(
        low <= index < high for indices, (low, high) in zip(used, pairwise(equal), strict=True) for index in indices
    ):
        return equal
    bounds = [0]
    for indices in used:
        if indices and indices[0] != bounds[-1]:
            return None
        bounds.append(indices[-1] + 1 if indices else bounds[-1])
    return bounds if bounds[-1] == rank else None
