"""Tests of what the page of a plan holds; ``tests/pictures`` looks at it in a browser."""

import json

import pytest

from automodel_conv.errors import CoverageError
from automodel_conv.planning.copies import Places, SourceTable
from automodel_conv.planning.plan_picture import plan_data, plan_page
from automodel_conv.planning.regions import Region, box
from tests.planning.plans import experts_plan, padded_plan, plan_of, table, targets_of


def data_of(plan, ranks=None):
    """Return what the page shows, as a browser reads it."""
    return json.loads(json.dumps(plan_data(plan, plan.unused_sources, "a title", ranks or {})))


def renamed(sources):
    """Return a plan that gives every source the name "new" and its own."""
    targets = [target for name in sources.names for target in targets_of(sources, [[name]], [], [f"new {name}"])]
    return plan_of(sources, targets)


def test_every_source_and_target_is_listed():
    plan = experts_plan("F32")
    data = data_of(plan)
    assert data["names"] == list(plan.sources.names)
    assert [data["shapes"][shape] for shape in data["shapeOf"]] == [list(shape) for shape in plan.sources.shapes]
    assert data["bytesOf"] == [24, 24, 24, 24, 8]
    assert data["rules"] == list(plan.rules)
    assert [[row[0], row[1], data["shapes"][row[2]], row[3], row[4]] for row in data["targets"]] == [
        ["gate_up", "F32", [2, 6, 4], 0, [0, 2, 1, 3]],
        ["norm", "BF16", [4], -1, [4]],
    ]
    assert [data["ways"][row[6]] for row in data["targets"]] == ["cast", "read"]
    assert [row[7] for row in data["targets"]] == [2 * 6 * 4 * 4, 8]


def test_copies_and_shapes_that_repeat_are_written_once():
    data = data_of(renamed(table(a=(3, 4), b=(3, 4), c=(12,))))
    assert data["shapes"] == [[3, 4], [12]] or data["shapes"] == [[12], [3, 4]]
    layers = experts_plan()
    again = layers.targets[0]._replace(name="another gate_up")
    assert len(data_of(plan_of(layers.sources, [*layers.targets, again]))["copies"]) == 2


def test_constants_are_written_with_their_places():
    (target,) = data_of(padded_plan(2, 5))["targets"]
    assert target[8] == [[0, [12], [1], 8]]


@pytest.mark.parametrize(("value", "text"), [(float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "nan")])
def test_constants_that_json_has_no_number_for_are_text(value, text):
    plan = padded_plan()
    (target,) = plan.targets
    target = target._replace(fills=tuple(fill._replace(value=value) for fill in target.fills))
    (row,) = data_of(plan_of(plan.sources, [target]))["targets"]
    assert row[8][0][0] == text


def test_sources_without_files_have_no_places():
    assert data_of(experts_plan())["places"] is None


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (
            ("/home/me/model-1.safetensors", "/home/me/model-2.safetensors"),
            ["model-1.safetensors", "model-2.safetensors"],
        ),
        (
            ("/home/me/text/a.safetensors", "/home/me/vision/a.safetensors"),
            ["text/a.safetensors", "vision/a.safetensors"],
        ),
        (("hf://org/name@main/a.safetensors",), ["a.safetensors"]),
        (("a.safetensors", "b.safetensors"), ["a.safetensors", "b.safetensors"]),
        (("/data/a", "/data2/a"), ["data/a", "data2/a"]),
        ((), []),
    ],
)
def test_folders_that_all_files_share_are_not_shown(files, shown):
    names = [str(number) for number in range(len(files))]
    places = Places(files, range(len(files)), [0] * len(files))
    sources = SourceTable(names, ["BF16"] * len(names), [(2,)] * len(names), places=places)
    assert data_of(renamed(sources))["places"] == {
        "files": shown,
        "file": [*range(len(files))],
        "offset": [0] * len(files),
    }


def test_bytes_that_are_read_as_another_dtype_are_named():
    sources = SourceTable(["a", "b"], ["F32", "F32"], [(2,), (2,)]).read_as({0: "U8"})
    data = data_of(renamed(sources))
    assert data["kinds"] == ["F32 as U8", "F32"]
    assert data["viewed"] == {"0": "U8"}


def test_left_out_sources_and_missing_targets_are_listed():
    sources = table(a=(2,), b=(3,))
    plan = plan_of(sources, targets_of(sources, [["a"]], [], ["a"]), missing=("c",))
    assert (data_of(plan)["leftOut"], data_of(plan)["missing"]) == ([1], ["c"])


def test_parts_of_ranks_are_written_once_and_counted():
    plan = renamed(table(a=(4, 2), b=(4, 2), c=(6,)))
    halves = [{f"new {name}": box((4, 2), (start, 0), (2, 2)) for name in "ab"} for start in (0, 2)]
    ranks = data_of(plan, {"first": halves[0], "second": halves[1]})["ranks"]
    assert ranks["labels"] == ["first", "second"]
    assert ranks["held"] == [(4 + 4 + 6) * 2] * 2
    assert ranks["of"] == [0, 0, 1]
    runs = [[ranks["regions"][number] for number in numbers] for numbers in ranks["combinations"]]
    assert runs == [[[[[0, 2]], [[0, 2]]], [[[2, 2]], [[0, 2]]]], [[[[0, 6]]], [[[0, 6]]]]]


def test_a_plan_without_ranks_has_none():
    assert data_of(experts_plan())["ranks"] is None


@pytest.mark.parametrize("region", [Region((4, 3), (((0, 4),), ((0, 3),))), Region((4,), (((0, 2),),))], ids=str)
def test_a_region_of_another_shape_is_refused(region):
    plan = renamed(table(a=(4, 2)))
    with pytest.raises(CoverageError) as caught:
        plan_page(plan, (), "a title", {"rank 0": {}, "rank 1": {"new a": region}})
    text = str(caught.value)
    assert "new a" in text
    assert "rank 1" in text
    assert "[4, 2]" in text
    assert str(list(region.shape)) in text


def test_the_same_plan_gives_the_same_page():
    plan = experts_plan()
    assert plan_page(plan, (), "a title", {}) == plan_page(experts_plan(), (), "a title", {})
    assert plan_page(plan, (), "a title", {}) != plan_page(experts_plan("F32"), (), "a title", {})
