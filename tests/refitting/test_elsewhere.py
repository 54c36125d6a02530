"""Tests of ``forecast_elsewhere``: it equals what the ranks of a refit compute one by one."""

import pytest
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Part, box, parts_of, whole
from automodel_conv.planning.sharding import placed
from automodel_conv.refitting.agreement import Roles
from automodel_conv.refitting.costs import forecast_of
from automodel_conv.refitting.elsewhere import forecast_elsewhere, published_by
from automodel_conv.refitting.engine import Engine
from automodel_conv.refitting.held import Held
from automodel_conv.refitting.planned import bucket_for, incoming
from automodel_conv.schedule.rounds import rounds_of, sizes_by_round

# Layers of equal geometry, a square matrix, one element, a scalar, and nothing.
TENSORS = {
    **{f"layers.{layer}.w": ("BF16", (12, 10)) for layer in range(3)},
    **{f"layers.{layer}.experts": ("BF16", (4, 6, 8)) for layer in range(3)},
    **{f"layers.{layer}.norm": ("F32", (7,)) for layer in range(3)},
    "square": ("BF16", (8, 8)),
    "one": ("F32", (1,)),
    "scalar": ("F32", ()),
    "empty": ("BF16", (0, 4)),
}
TABLE = SourceTable(list(TENSORS), [dtype for dtype, _ in TENSORS.values()], [shape for _, shape in TENSORS.values()])
SAVING = saving_plan(TABLE, rules=[])


def trainer(mesh, *placements):
    """Return what the ranks of a mesh hold if each tensor has these placements, and the number of ranks."""
    coordinates = [(0,), (1,), (2,), (3,)][: mesh[0]]
    if len(mesh) == 2:
        coordinates = [(first, second) for first in range(mesh[0]) for second in range(mesh[1])]
    ranks = [[placed(shape, mesh, at, _of(shape, placements)) for shape in TABLE.shapes] for at in coordinates]
    return published_by(SAVING, ranks, None, 1 << 20), len(coordinates)


def _of(shape, placements):
    return [p if p.is_replicate() or p.dim < len(shape) else Replicate() for p in placements]


def engine(*parts):
    """Return the plan of an engine with all tensors, and with further parts of them."""
    parts = [*(Part(t.name, t.name, whole(t.shape)) for t in SAVING.targets), *parts]
    return CopyPlan(table_of(SAVING.targets), tuple(parts_of(SAVING.targets, parts)))


def divided(plan, ranks, dim):
    return [
        {t.name: placed(t.shape, [ranks], [rank], _of(t.shape, [Shard(dim)])) for t in plan.targets}
        for rank in range(ranks)
    ]


def one_by_one(published, plan, receivers, senders, bucket_bytes):
    """Return the forecast as the ranks of a refit compute it."""
    roles = Roles(tuple(range(senders)), tuple(range(senders, senders + len(receivers))))
    bucket = bucket_for(bucket_bytes, roles)
    units = [
        incoming(published, Engine(Held({}, regions), plan, ()), rank, bucket.unit_bytes).sizes()
        for rank, regions in zip(roles.receivers, receivers, strict=True)
    ]
    rounds = rounds_of(units, roles.receivers, bucket.round_bytes)
    return forecast_of(sizes_by_round(units, roles.receivers, rounds), *roles, plan.left_out)


TRAINERS = {
    "one rank": ((1,), Replicate()),
    "rows": ((4,), Shard(0)),
    "columns": ((3,), Shard(1)),
    "replicas": ((3,), Replicate()),
    "replicas of rows": ((2, 2), Replicate(), Shard(0)),
    "rows and columns": ((2, 2), Shard(0), Shard(1)),
}
# Names for the same tensor, or for parts of it that overlap, and a cast.
ENGINES = {
    "equal": engine(),
    "tied": engine(Part("layers.1.w", "tied", whole((12, 10)))),
    "overlapping": engine(
        Part("square", "rows", box((8, 8), (2, 0), (4, 8))), Part("square", "block", box((8, 8), (3, 1), (2, 5)))
    ),
    "cast": engine(Part("layers.0.norm", "cast", whole((7,)), "BF16")),
}


@pytest.mark.parametrize("bucket_bytes", [400, 1600, 1 << 20])
@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("source", TRAINERS)
def test_forecast_equals_that_of_ranks_one_by_one(source, target, bucket_bytes):
    published, senders = trainer(*TRAINERS[source])
    plan = ENGINES[target]
    for receivers in ([{}], [{}, {}], divided(plan, 2, 0), divided(plan, 3, 1)):
        expected = one_by_one(published, plan, receivers, senders, bucket_bytes)
        assert forecast_elsewhere(published, plan, receivers, senders, bucket_bytes) == expected
        assert sum(expected.links.values()) >= sum(t.nbytes for t in SAVING.targets)


def test_layers_of_equal_geometry_are_computed_once(monkeypatch):
    from automodel_conv.refitting import elsewhere

    calls = []

    def counted(plan, parts):
        calls.append(plan.targets[0].name)
        return plan_from_parts(plan, parts)

    plan_from_parts = elsewhere.plan_from_parts
    monkeypatch.setattr(elsewhere, "plan_from_parts", counted)
    published, senders = trainer((4,), Shard(0))
    forecast_elsewhere(published, engine(), [{}, {}, {}], senders, 1 << 20)
    assert sorted(calls) == sorted(
        ["layers.0.w", "layers.0.experts", "layers.0.norm", "square", "one", "scalar", "empty"]
    )


def test_what_the_engine_does_not_need_is_left_out():
    published, senders = trainer((2,), Shard(0))
    plan = CopyPlan(table_of(SAVING.targets), tuple(parts_of(SAVING.targets, [Part("one", "one", whole((1,)))])))
    forecast = forecast_elsewhere(published, plan, [{}], senders, 1 << 20)
    assert forecast.links == {(0, 2): 4}
    assert set(forecast.left_out) == TENSORS.keys() - {"one"}


def test_parts_have_all_ranks_that_hold_them():
    published, _ = trainer((2, 2), Replicate(), Shard(0))
    held = {}
    for part, ranks, *_ in published.parts:
        held.setdefault(TABLE.names[part.source], []).append(ranks)
    assert held["square"] == [(0, 2), (1, 3)]
    assert held["scalar"] == [(0, 1, 2, 3)]
    assert held["one"] == [(0, 2)]
    assert "empty" not in held


def test_elements_that_no_rank_holds_are_named():
    regions = [[box(shape, [0] * len(shape), [min(1, n) for n in shape]) for shape in TABLE.shapes]]
    with pytest.raises(CoverageError, match=r"layers\.0\.w"):
        forecast_elsewhere(published_by(SAVING, regions, None, 1 << 20), engine(), [{}], 1, 1 << 20)


def test_bucket_that_is_too_small_is_refused():
    published, senders = trainer((4,), Shard(0))
    with pytest.raises(UnsupportedError, match="bucket_bytes= is too small"):
        forecast_elsewhere(published, engine(), [{}], senders, 64)
