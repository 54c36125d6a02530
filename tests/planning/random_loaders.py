"""Random loading code: steps that move, cast, reinterpret, overwrite and compute tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
VIEWS = (torch.uint8, torch.int16, torch.bfloat16, torch.int32)
MOST_ELEMENTS = 2000


class Step(NamedTuple):
    """One step of a loader."""

    name: str
    """Name of a function in ``STEPS``."""
    choices: tuple[int, ...]
    """Numbers that decide what it does."""


class Choices:
    """Numbers that are used one after the other."""

    def __init__(self, numbers: Sequence[int]):
        self._numbers: Iterator[int] = iter(numbers)

    def below(self, count: int) -> int:
        """Return a number from 0 to below ``count``."""
        return next(self._numbers, 0) % count

    def one_of(self, items: Sequence):
        return items[self.below(len(items))]


def _transposed(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.transpose(0, -1)


def _narrowed(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    start = choices.below(tensor.shape[0])
    return tensor.narrow(0, start, 1 + choices.below(tensor.shape[0] - start))


def _selected(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.select(-1, choices.below(tensor.shape[-1]))


def _every_second(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor[choices.below(2) :: 2]


def _concatenated(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    fitting = [other for other in others if other.dim() == tensor.dim() and other.shape[1:] == tensor.shape[1:]]
    return torch.cat([tensor, choices.one_of(fitting)])


def _stacked(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    fitting = [other for other in others if other.shape == tensor.shape]
    return torch.stack([tensor, choices.one_of(fitting)], choices.below(tensor.dim() + 1))


def _copied(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return choices.one_of(
        [tensor.clone, tensor.contiguous, lambda: tensor.clone(memory_format=torch.contiguous_format)]
    )()


def _cast(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.to(choices.one_of(DTYPES))


def _reinterpreted(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.view(choices.one_of(VIEWS))


def _padded(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    sizes = choices.below(4) - 1, choices.below(3)
    return torch.nn.functional.pad(tensor, sizes, value=choices.one_of([0.0, 1.5, 0.1]))


def _indexed(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor[torch.tensor([choices.below(tensor.shape[0]) for _ in range(1 + choices.below(4))])]


def _masked(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor[torch.tensor([bool(choices.below(2)) for _ in range(tensor.shape[0])], dtype=torch.bool)]


def _index_selected(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    index = torch.tensor([choices.below(tensor.shape[-1]) for _ in range(1 + choices.below(3))])
    return tensor.index_select(-1, index)


def _broadcast(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.unsqueeze(0).expand(1 + choices.below(3), *tensor.shape)


def _repeated(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.repeat(1 + choices.below(2), *(1 + choices.below(2) for _ in tensor.shape))


def _in_zeros(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = torch.zeros((tensor.shape[0] + 1, *tensor.shape[1:]), dtype=tensor.dtype)
    made[choices.below(2) :][: tensor.shape[0]].copy_(tensor)
    return made


def _in_empty(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = torch.empty_like(tensor)
    made.copy_(tensor)
    return made


def _overwritten(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = choices.one_of(others).clone()
    made[..., :1] = tensor.flatten()[:1].to(made.dtype)
    return made


def _partly_constant(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = tensor.clone()
    made[-1:].fill_(choices.one_of([0, 1, 0.1]))
    return made


def _put(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = tensor.clone()
    made[torch.tensor([choices.below(made.shape[0])])] = made[-1:].clone()
    return made


def _reshaped(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.reshape(2, -1)


def _computed(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return choices.one_of([lambda: tensor.float().exp(), lambda: tensor + 1, lambda: tensor.flip(0)])()


def _computed_in_place(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = tensor.clone()
    made[:1].mul_(2)
    return made


def _split(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    dim = choices.below(tensor.dim())
    parts = choices.one_of(
        [
            lambda: tensor.split(1 + choices.below(3), dim),
            lambda: tensor.chunk(1 + choices.below(3), dim),
            lambda: tensor.tensor_split(1 + choices.below(3), dim),
        ]
    )()
    return choices.one_of([lambda: torch.cat(parts[::-1], dim), lambda: choices.one_of(parts)])()


def _unbound(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return torch.stack(tensor.unbind(choices.below(tensor.dim())), choices.below(tensor.dim()))


def _unfolded(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.unfold(choices.below(tensor.dim()), 1 + choices.below(2), 1 + choices.below(2)).clone()


def _moved(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.movedim(choices.below(tensor.dim()), choices.below(tensor.dim()))


def _in_pairs(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.reshape(2, -1, 2).permute(2, 1, 0).reshape(-1, 2)


def _diagonal(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor.diagonal(choices.below(2))


def _restrided(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    shape, strides = [1 + choices.below(3) for _ in range(2)], [choices.below(4) for _ in range(2)]
    flat = tensor.flatten()
    if sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= flat.numel():
        raise IndexError  # torch lets tensors without data grow
    return flat.as_strided(shape, strides, flat.storage_offset()).clone()


def _side_by_side(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return choices.one_of([torch.hstack, torch.vstack, torch.dstack])([tensor, choices.one_of(others)])


def _joined_into(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    size = choices.one_of([0, 2 * tensor.numel()])
    return torch.cat([tensor.flatten(), tensor.flatten()], out=torch.zeros(size, dtype=tensor.dtype))


def _parameter(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return torch.nn.Parameter(tensor, requires_grad=False).data


def _turned_in_place(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return choices.one_of([lambda: tensor.clone().transpose_(0, -1), lambda: tensor.clone().unsqueeze_(0)])()


def _copied_by_index(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    index = torch.tensor([choices.below(tensor.shape[0])])
    return torch.zeros_like(tensor).index_copy_(0, index, tensor[:1])


def _written_in_place(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    target = choices.one_of(others)
    if 0 not in target.stride():  # torch refuses to write to one element twice
        part = target.narrow(0, choices.below(target.shape[0]), 1)
        part.copy_(tensor.flatten()[: part.numel()].reshape(part.shape).clone())
    return tensor


def _all_at_once(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    made = tensor.new_zeros((2, *tensor.shape))
    torch._foreach_copy_(list(made.unbind()), [tensor, choices.one_of(others)])
    return made


def _part_of_bytes(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return tensor[..., : 1 + choices.below(3)].view(choices.one_of(VIEWS))


def _blended(tensor: Tensor, choices: Choices, others: Sequence[Tensor]) -> Tensor:
    return choices.one_of(
        [
            lambda: torch.where(tensor > 2, tensor, 0),
            lambda: tensor.masked_fill(tensor > 2, 0),
            lambda: tensor.roll(1),
            lambda: tensor.tril(),
            lambda: tensor.rot90(),
            lambda: tensor.clone().index_add_(0, torch.tensor([0]), tensor[:1]),
            lambda: tensor.clone().scatter_(0, torch.zeros_like(tensor, dtype=torch.long)[:1], tensor[:1]),
        ]
    )()


STEPS: Mapping[str, Callable[[Tensor, Choices, Sequence[Tensor]], Tensor]] = {
    function.__name__.strip("_"): function
    for function in (
        *(_transposed, _narrowed, _selected, _every_second, _concatenated, _stacked, _copied, _cast, _reinterpreted),
        *(_padded, _indexed, _masked, _index_selected, _broadcast, _repeated, _in_zeros, _in_empty, _overwritten),
        *(_partly_constant, _put, _reshaped, _computed, _computed_in_place, _split, _unbound, _unfolded, _moved),
        *(_in_pairs, _diagonal, _restrided, _side_by_side, _joined_into, _parameter, _turned_in_place),
        *(_copied_by_index, _written_in_place, _all_at_once, _part_of_bytes, _blended),
    )
}

COMPUTING = frozenset({"computed", "computed_in_place", "blended", "cast", "reinterpreted", "part_of_bytes"})
"""Steps that do more than move elements and write constants."""
OVERLAPPING = frozenset({"unfolded", "restrided"})
"""Steps that may read elements by two dimensions of one stride."""


class Loader(NamedTuple):
    """Loading code that fills targets and returns tensors."""

    steps: tuple[Step, ...]
    writes: tuple[tuple[int, ...], ...]
    """Numbers that decide which tensor each target is filled with, and where."""

    def __call__(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = list(sources.values())
        for name, numbers in self.steps:
            choices = Choices(numbers)
            try:
                made = STEPS[name](choices.one_of(tensors), choices, tensors)
            except (RuntimeError, IndexError, ZeroDivisionError):  # the step does not fit the tensor
                continue
            if made.numel() <= MOST_ELEMENTS:
                tensors.append(made)
        for target, numbers in zip(targets.values(), self.writes, strict=False):
            choices = Choices(numbers)
            source = choices.one_of(tensors).flatten()
            count = min(source.numel(), target.numel())
            if count == target.numel():
                target.copy_(source[:count].reshape(target.shape))
            elif target.is_contiguous():
                target.view(-1)[:count].copy_(source[:count])
        return {f"made {number}": tensor for number, tensor in enumerate(tensors[len(sources) :])}


numbers = st.lists(st.integers(0, 11), min_size=8, max_size=8).map(tuple)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def loaders_of(names: Collection[str]):
    """Return a strategy of loaders with steps of these names."""
    steps = st.builds(Step, st.sampled_from(sorted(names)), numbers)
    return st.builds(
        Loader, st.lists(steps, min_size=1, max_size=9).map(tuple), st.lists(numbers, max_size=2).map(tuple)
    )


loaders = loaders_of(STEPS)
"""Strategy of loaders."""


def tensors_named(
    prefix: str, value: Callable[[int, torch.Size, torch.dtype], Tensor], dtypes: Sequence[torch.dtype] = DTYPES
):
    """Return a strategy of up to three tensors by name, all elements of which differ if ``value`` makes them so."""
    kinds = st.lists(st.tuples(shapes, st.sampled_from(dtypes)), min_size=1, max_size=3)
    return kinds.map(
        lambda chosen: {
            f"{prefix}{number}": value(number, torch.Size(shape), dtype) for number, (shape, dtype) in enumerate(chosen)
        }
    )


def addressed(number: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose elements differ from each other, and from those of other numbers."""
    return (torch.arange(shape.numel()) + 64.0 * number + 1).reshape(shape).to(dtype)
