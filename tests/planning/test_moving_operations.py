"""Tests of moving operations: each is recorded as copies that do what torch does, element by element."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from automodel_conv.planning.moving_operations import FACTORIES, MOVERS
from tests.planning.random_loaders import addressed
from tests.planning.test_traced_copies import bits, executed, traced

INDEX = torch.tensor([2, 0, 1, 1, -1])
MASK = torch.tensor([True, False, True])


def sources():
    shapes = {"a": (3, 4), "b": (3, 4), "c": (4,), "d": (2, 3, 4), "e": (1,), "f": ()}
    return {name: addressed(n, torch.Size(shape), torch.float32) for n, (name, shape) in enumerate(shapes.items())}


def filled(shape, write):
    """Return a tensor of zeros after a write to it."""
    made = torch.zeros(shape)
    write(made)
    return made


PLANNED = {
    "copy": lambda a, **rest: torch.empty(3, 4).copy_(a),
    "copy broadcast": lambda a, c, **rest: torch.empty(3, 4).copy_(c),
    "copy of one element": lambda f, **rest: torch.empty(3, 4).copy_(f),
    "copy cast": lambda a, **rest: torch.empty(3, 4, dtype=torch.bfloat16).copy_(a),
    "foreach copy": lambda a, b, **rest: filled((2, 3, 4), lambda t: torch._foreach_copy_(list(t), [b, a])),
    "clone": lambda a, **rest: a.t().clone(),
    "contiguous": lambda a, **rest: a.t().contiguous(),
    "to dtype": lambda a, **rest: a.t().to(torch.float16),
    "to device": lambda a, **rest: a.to("cpu", copy=True),
    "cat": lambda a, b, **rest: torch.cat([a, b, a[:1]]),
    "cat of columns": lambda a, b, **rest: torch.cat([a, b[:, 1:3]], -1),
    "cat with nothing": lambda a, **rest: torch.cat([torch.empty(0), a]),
    "cat of dtypes": lambda a, b, **rest: torch.cat([torch.ones(1, 4, dtype=torch.float16), b]),
    "cat with constants": lambda a, **rest: torch.cat([torch.ones(2, 4), a, torch.full((1, 4), 0.1)]),
    "cat out": lambda a, b, **rest: torch.cat([a, b], out=torch.empty(6, 4)),
    "stack out": lambda a, b, **rest: torch.stack([a, b], out=torch.empty_strided((2, 3, 4), (1, 2, 6))),
    "cat out of another size": lambda a, b, **rest: torch.cat([a, b], out=torch.empty(0)),
    "index_select out": lambda a, **rest: torch.index_select(a, 1, INDEX[:2], out=torch.zeros(3, 2)),
    "concat": lambda a, b, **rest: torch.concat([a, b], 1),
    "hstack": lambda a, b, **rest: torch.hstack([a, b]),
    "vstack": lambda a, b, c, **rest: torch.vstack([a, b, c]),
    "dstack": lambda a, b, **rest: torch.dstack([a, b]),
    "column_stack": lambda a, b, **rest: torch.column_stack([a, b]),
    "stack": lambda a, b, **rest: torch.stack([a, b], 1),
    "stack at the end": lambda a, b, **rest: torch.stack([a, b, a], -1),
    "fill": lambda a, **rest: a.clone().fill_(0.1),
    "fill by a source": lambda a, f, **rest: a.clone().fill_(f),
    "fill of a part": lambda a, **rest: filled_part(a.clone(), 2),
    "zero": lambda a, **rest: a.clone().zero_(),
    "empty": lambda a, **rest: torch.empty_like(a).copy_(a),
    "empty strided": lambda a, **rest: torch.empty_strided((3, 4), (1, 3)).copy_(a),
    "new empty": lambda a, b, **rest: a.new_empty(3, 4).copy_(b),
    "new empty strided": lambda a, b, **rest: a.new_empty_strided((3, 4), (1, 3)).copy_(b),
    "zeros": lambda a, **rest: filled((4, 5), lambda t: t[1:, :4].copy_(a)),
    "zeros like": lambda a, **rest: torch.zeros_like(a),
    "new zeros": lambda a, **rest: filled_part(a.new_zeros(5, 4), 3),
    "ones": lambda a, **rest: torch.cat([torch.ones(3, 4), a]),
    "ones like": lambda a, **rest: torch.ones_like(a, dtype=torch.float16),
    "new ones": lambda a, **rest: a.new_ones(2, dtype=torch.bfloat16),
    "full": lambda a, **rest: torch.cat([torch.full((1, 4), 7.0), a]),
    "full like": lambda a, **rest: torch.full_like(a, 0.1, dtype=torch.bfloat16),
    "new full": lambda a, **rest: a.new_full((2, 3), 0.1),
    "scalar": lambda a, **rest: torch.cat([a.flatten(), torch.scalar_tensor(2.5)[None]]),
    "pad": lambda a, **rest: functional.pad(a, (1, 2)),
    "pad of rows": lambda a, **rest: functional.pad(a, (0, 1, 2, 3), value=0.5),
    "pad that cuts": lambda a, **rest: functional.pad(a, (-1, 2, 1, -2), value=3),
    "pad that only cuts": lambda a, **rest: functional.pad(a, (-1, -2)),
    "repeat": lambda a, **rest: a.repeat(2, 3),
    "repeat with new dimensions": lambda a, **rest: a.repeat(2, 1, 2),
    "repeat nothing": lambda a, **rest: a.repeat(0, 1),
    "tile": lambda c, **rest: c.tile(2, 2),
    "index": lambda a, **rest: a[INDEX],
    "index of columns": lambda a, **rest: a[:, INDEX],
    "index of shape": lambda a, **rest: a[INDEX[:4].reshape(2, 2)],
    "index between": lambda d, **rest: d[:, torch.tensor(1)],
    "index with steps": lambda a, **rest: a[:, torch.tensor([0, 2, 1, 3])],
    "index of nothing": lambda a, **rest: a[torch.tensor([], dtype=torch.long)],
    "index by mask": lambda a, **rest: a[MASK],
    "index by bytes": lambda a, **rest: a[:, torch.tensor([1, 0, 0, 1], dtype=torch.bool)],
    "index_select": lambda a, **rest: a.index_select(-1, torch.tensor([3, 0])),
    "take rows": lambda a, **rest: torch.index_select(a, 0, torch.tensor([1, 1])),
    "put": lambda a, b, **rest: put(a, INDEX[:2], b[:2]),
    "put by mask": lambda a, b, **rest: put(a, MASK, b[1:]),
    "put one": lambda a, c, **rest: put(a, torch.tensor(1), c),
    "put the same": lambda a, c, **rest: put(a, INDEX[:3], c),
    "put a constant": lambda a, **rest: put(a, MASK, torch.tensor(0.5)),
    "put columns": lambda a, b, **rest: put(a, (slice(None), torch.tensor([3, 1])), b[:, :2]),
    "put with steps": lambda a, b, **rest: put(a, (slice(None), torch.tensor([0, 2])), b[:, 1:3]),
    "put into a constant": lambda a, **rest: filled((4, 4), lambda t: t.index_copy_(0, INDEX[:2], a[:2])),
    "index_copy": lambda a, b, **rest: a.clone().index_copy_(-1, torch.tensor([2, 0]), b[:, :2]),
    "index_copy of rows": lambda a, b, **rest: a.clone().index_copy_(0, torch.tensor([2]), b[:1]),
    "split": lambda a, **rest: torch.cat(a.split([1, 2])[::-1]),
    "chunk": lambda a, **rest: torch.stack(a.chunk(2, -1)),
    "tensor_split": lambda a, **rest: torch.cat(a.tensor_split(3, 1)[::-1], 1),
    "unbind": lambda a, **rest: torch.stack(a.unbind(1)),
    "unfold": lambda a, **rest: a.unfold(1, 2, 2).clone(),
    "movedim": lambda d, **rest: d.movedim(0, 2).contiguous(),
    "permute": lambda d, **rest: d.reshape(2, 3, 2, 2).permute(2, 0, 3, 1).reshape(4, 6),
    "diagonal": lambda a, **rest: a.diagonal().clone(),
    "as_strided": lambda a, **rest: a.as_strided((3, 2), (4, 2), 1).clone(),
    "expand": lambda c, **rest: c.expand(3, 4).clone(),
    "squeeze": lambda e, **rest: e.squeeze().clone(),
    "flatten": lambda d, **rest: d.transpose(0, 2).flatten(),
    "data": lambda a, **rest: a.data.t().clone(),
    "view of bytes": lambda a, **rest: a.view(torch.uint8)[:, 4:8].clone().view(torch.float32),
    "t_": lambda a, **rest: a.t_().clone(),
}


def filled_part(tensor, value):
    tensor[1:].fill_(value)
    return tensor


def put(tensor, at, values):
    tensor = tensor.clone()
    tensor[at] = values
    return tensor


COMPUTED = {
    "flip": lambda a, **rest: a.flip(0),
    "roll": lambda a, **rest: a.roll(1),
    "rot90": lambda a, **rest: a.rot90(),
    "tril": lambda a, **rest: a.tril(),
    "where": lambda a, b, **rest: torch.where(a > 3, a, b),
    "masked_fill": lambda a, **rest: a.masked_fill(MASK[:, None], 0),
    "index_add": lambda a, b, **rest: a.clone().index_add_(0, INDEX[:3], b),
    "scatter": lambda a, b, **rest: a.clone().scatter_(0, torch.zeros(1, 4, dtype=torch.long), b[:1]),
    "accumulated": lambda a, b, **rest: a.clone().index_put_((INDEX[:3],), b, accumulate=True),
    "put by two": lambda a, c, **rest: put(a, (INDEX[:2], INDEX[:2]), c[:2]),
    "add out of another size": lambda a, b, **rest: torch.add(a, b, out=torch.empty(0)),
    "sum out of another size": lambda a, **rest: torch.sum(a, 0, out=torch.empty(0)),
    "cast twice": lambda a, **rest: a.half().float() if a.dtype == torch.float32 else a,
    "index by two": lambda a, **rest: a[INDEX[:2], INDEX[:2]],
    "index by a mask of all": lambda a, **rest: a[torch.arange(12).reshape(3, 4) > 4],
    "index of values": lambda a, b, **rest: torch.arange(200)[a.long()] + b,
    "sum": lambda a, **rest: a.sum(0),
    "index of a scalar": lambda f, **rest: f.index_select(0, torch.tensor([0])),
    "index_copy of a scalar": lambda f, e, **rest: f.clone().index_copy_(0, torch.tensor([0]), e[0]),
}


def result_of(code):
    """Return what traced code fills its result with, and the result itself."""

    def load(given, targets):
        return {"result": code(**given)}

    content = traced(load, sources(), {})["result"]
    return content, load({name: tensor.clone() for name, tensor in sources().items()}, {})["result"]


@pytest.mark.parametrize("code", PLANNED.values(), ids=PLANNED)
def test_operation_is_recorded_as_copies(code):
    content, result = result_of(code)
    assert content.unknown is None
    assert content.is_written
    assert bits(executed(content, list(sources().values()), result)) == bits(result)


@pytest.mark.parametrize("code", COMPUTED.values(), ids=COMPUTED)
def test_operation_that_computes_is_told(code):
    content, result = result_of(code)
    assert content.unknown is not None
    assert content.unknown.rows
    shapes = []
    traced(lambda given, targets: shapes.append(code(**given).shape) or {}, sources(), {})
    assert shapes == [result.shape]


@pytest.mark.parametrize(
    ("code", "rows"),
    [
        (lambda a, b, **rest: torch.cat([a, b * 2])[3:], {1}),
        (lambda a, b, **rest: a + b, {0, 1}),
        (lambda a, b, c, **rest: put(a, MASK, b[1:] * c), {0, 1, 2}),
        (lambda a, c, **rest: torch.stack([a[0], c]).flip(0), {0, 2}),
    ],
)
def test_rows_of_computed_results_are_those_that_they_need(code, rows):
    content, _ = result_of(code)
    assert content.unknown.rows == rows


@pytest.mark.parametrize(
    "code",
    [
        lambda: torch.cat([torch.ones(2), torch.zeros(1)]),
        lambda: torch.stack([torch.ones(2), torch.zeros(2)]),
        lambda: torch.ones(3)[torch.tensor([0, 2])] * 2,
        lambda: torch.arange(4.0).index_select(0, torch.tensor([3])),
        lambda: put(torch.arange(4.0), torch.tensor([1]), torch.tensor(7.0)),
        lambda: torch.zeros(2).index_copy_(0, torch.tensor([1]), torch.ones(1)),
        lambda: functional.pad(torch.arange(3.0), (1, 0)),
        lambda: torch.arange(3.0).repeat(2),
        lambda: torch.arange(3.0).clone().to(torch.int32),
        lambda: torch.empty(2).copy_(torch.arange(2.0)),
        lambda: torch.empty(2).fill_(torch.tensor(3.0)),
    ],
)
def test_operations_on_data_run_as_usual(code):
    seen = []
    traced(lambda given, targets: seen.append(code()) or {}, {"x": torch.zeros(2)}, {})
    assert bits(seen[0]) == bits(code())


def test_factories_are_moving_operations():
    assert FACTORIES <= MOVERS.keys()
    assert torch.ops.aten.copy_.default not in FACTORIES
