"""Tests of ``repr`` of public objects: one short line, even for a checkpoint of 100,000 tensors."""

import json
import struct
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch import nn

import automodel_conv as amc
from automodel_conv.files.remote.connections import Traffic
from automodel_conv.in_memory import ConvertedStateDict, StateDictReport
from automodel_conv.integrations.transformers import Acceleration
from tests.docs.test_completeness import TYPES

MANY = 100_000
LONGEST = 200
NAME = "model.layers.{}.a_module_with_a_name_of_its_own.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of 100,000 tensors of one element in 100 files, of which most data is a hole."""
    directory = tmp_path_factory.mktemp("many") / ("a_long_name_" * 12)
    directory.mkdir()
    weight_map = {}
    for file in range(100):
        names = [NAME.format(row) for row in range(file, MANY, 100)]
        places = [{"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(len(names))]
        header = dict(zip(names, places, strict=True))
        text = json.dumps(header).encode()
        shard = directory / f"model-{file:05}-of-00100.safetensors"
        shard.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4 * len(names))
        weight_map |= dict.fromkeys(names, shard.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return amc.open_checkpoint(directory)


def assert_short(thing):
    text = repr(thing)
    assert len(text) <= LONGEST, f"{len(text)} characters: {text[:1000]}"
    assert text.isprintable()
    assert text.startswith(f"<{type(thing).__name__}")


@pytest.fixture(scope="module")
def objects(checkpoint, tmp_path_factory):
    """An object of each public type that a call returns, by the name of the type."""
    loaded = amc.load_state_dict(checkpoint.path, rules=[])
    plan = amc.compile_plan(checkpoint, rules=[])
    directory = tmp_path_factory.mktemp("written")
    converted = amc.convert_state_dict(dict(loaded), rules=[])
    names = tuple(checkpoint.names)
    links = {(sender, receiver): 1 << 40 for sender in range(100) for receiver in range(100)}
    found = [
        checkpoint,
        loaded,
        loaded.report,
        loaded.report.timeline,
        plan,
        plan.sources,
        plan.sources.places,
        plan.targets[0],
        converted,
        converted.report,
        replace(amc.save_checkpoint({"a": torch.ones(2)}, directory / "saved", rules=[]), left_out=names, files=names),
        replace(amc.convert_checkpoint(directory / "saved", directory / "new", rules=[]), left_out=names, files=names),
        amc.AdapterReport((), names, names, names, names, 1 << 40, names, 1000.0),
        amc.RefitReport(1 << 40, 1 << 40, MANY, 1000.0, 1 << 40, names, names),
        amc.RefitForecast(links, MANY, MANY, 1 << 40, tuple(range(MANY)), tuple(range(MANY)), names),
        Traffic(),
        Acceleration(),
    ]
    return {type(thing).__name__: thing for thing in found}


def test_every_public_type_is_tried(objects):
    """A refit and a load under the hook are tried below."""
    public = [getattr(amc, name) for name in amc.__all__]
    public += [getattr(import_module(module), name) for module, _, name in (kind.rpartition(".") for kind in TYPES)]
    classes = {one.__name__ for one in public if isinstance(one, type) and not issubclass(one, Exception)}
    options = {"CompileOptions", "LoadOptions", "SourceOptions", "TraceOptions"}
    small = {"PageUse", "Matrices", "Span"}
    assert classes - options - small - {"Refit", "HookedLoad"} <= objects.keys()


@pytest.mark.parametrize(
    "name",
    [
        *("Checkpoint", "CopyPlan", "SourceTable", "Places", "Target", "LoadedStateDict", "ConvertedStateDict"),
        *("LoadReport", "SaveReport", "ConvertReport", "AdapterReport", "StateDictReport", "RefitReport"),
        *("RefitForecast", "Traffic", "Acceleration", "Timeline"),
    ],
)
def test_repr_is_one_short_line(objects, name):
    assert_short(objects[name])


@pytest.mark.parametrize("name", ["LoadReport", "SaveReport", "ConvertReport", "AdapterReport", "RefitForecast"])
def test_print_shows_the_whole_report(objects, name):
    report = objects[name]
    assert len(str(report).splitlines()) >= 6
    assert len(str(report)) > len(repr(report))


def test_tensors_are_counted_and_their_values_are_not_shown():
    loaded = ConvertedStateDict({"a": torch.full((1000,), 0.125), "b": torch.full((3,), 0.125)})
    loaded["tied"] = loaded["a"]
    assert repr(loaded) == str(loaded) == "<ConvertedStateDict: 3 tensors, 4.0 kB; report says more>"
    assert repr(StateDictReport(())) == "<StateDictReport: left out: 0; print() shows all>"


def test_a_target_of_many_copies_is_one_line(checkpoint):
    from automodel_conv.planning.boxes import run_of
    from automodel_conv.planning.copies import StridedCopy, Target

    many = tuple(range(MANY))
    assert_short(Target("x" * 500, "BF16", (MANY,), 0, many, (StridedCopy(run_of(1), many, many, many),)))


def test_a_refit_says_what_it_sends():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        refit = amc.Refit(nn.Linear(3, 2), sends=True, engine=nn.Linear(3, 2))
        assert repr(refit).startswith("<Refit on rank 0: sends 0 bytes and receives 0 bytes")
        assert_short(refit)
    finally:
        dist.destroy_process_group()
    assert_short(refit)


def test_a_load_under_the_hook_is_counted():
    pytest.importorskip("transformers")
    from automodel_conv.integrations.hooked_load import HookedLoad
    from automodel_conv.integrations.hooked_plan import ALL

    names = tuple(map(str, range(MANY)))
    load = HookedLoad("Qwen3MoeForCausalLM", names, dict.fromkeys(names, "a reason"), names)
    assert_short(load)
    assert "all by transformers" in repr(HookedLoad("Own", (), {ALL: "a reason"}))


def test_a_notebook_shows_a_checkpoint_as_a_table(checkpoint):
    html = checkpoint._repr_html_()
    assert html.startswith("<table>")
    assert "100000, 400.0 kB" in html
    assert len(html) < 5000
