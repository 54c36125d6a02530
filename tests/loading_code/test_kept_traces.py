"""Tests of kept traces: a trace is found again only for all that it depends on, and only if it is whole."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from automodel_conv import ConversionError, load_with
from automodel_conv.loading_code.attributes import AttributeChange
from automodel_conv.loading_code.changes import Changes
from automodel_conv.loading_code.dry_run import Traced
from automodel_conv.loading_code.kept_traces import digest_of, keep_trace, kept_trace
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.origins import Unknown
from automodel_conv.planning.plan import CopyPlan
from tests.loading_code.loads import SOURCES, Model, checkpoint_of, described

TARGETS = {"y": torch.arange(3.0)}


class Counted:
    """Loading code that counts its calls; all fill ``model`` in the same way."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, pairs):
        self.calls += 1
        given = dict(pairs)
        self.model.first.weight.data.copy_(given["a"])
        self.model.second.weight = nn.Parameter(given["b"], requires_grad=False)
        self.model.register_buffer("saved", given["c"])
        self.model.register_buffer("new", given["c"].clone(), persistent=False)
        self.model.first.bias = None


def load(tmp_path, *, make=Model, key="key", sources=SOURCES, **options):
    """Load by a cache; return the model, and how often the loading code was called."""
    counted = Counted(make())
    options = {"trace_cache": tmp_path / "cache", "trace_key": key, **options}
    load_with(counted, checkpoint_of(tmp_path, sources), counted.model, **options)
    return counted.model, counted.calls


def kept_files(tmp_path):
    return list((tmp_path / "cache").iterdir())


def test_kept_trace_loads_the_same_without_the_code(tmp_path):
    first, calls = load(tmp_path)
    second, calls_again = load(tmp_path)
    assert (calls, calls_again) == (1, 0)
    assert described(first) == described(second)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert first.first.bias is second.first.bias is None


@pytest.mark.parametrize("options", [{"trace_key": None}, {"trace_cache": None}])
def test_nothing_is_kept_without_a_key_or_a_directory(options, tmp_path):
    assert [load(tmp_path, **options)[1] for _ in range(2)] == [1, 1]
    assert not (tmp_path / "cache").exists()


def cut(text):
    return text[: len(text) // 2]


def changed_digit(text):
    at = text.index(b'"plan"') + text[text.index(b'"plan"') :].index(b"1")
    return text[:at] + b"2" + text[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        changed_digit,
        lambda text: b"",
        lambda text: b"\xff\xfe\x00",
        lambda text: b"{}",
        lambda text: text[:-1],
        lambda text: text + b" ",
        lambda text: b"[" * 100_000,
        lambda text: b"\n" + text.partition(b"\n")[2],
    ],
)
def test_damaged_traces_are_traced_again(damage, tmp_path):
    expected, _ = load(tmp_path)
    [file] = kept_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    model, calls = load(tmp_path)
    assert calls == 1
    assert described(model) == described(expected)
    assert file.read_bytes() == whole


def test_trace_of_something_else_is_traced_again(tmp_path):
    load(tmp_path)
    [file] = kept_files(tmp_path)
    load(tmp_path, key="other")
    [other] = set(kept_files(tmp_path)) - {file}
    os.replace(file, other)
    assert load(tmp_path, key="other")[1] == 1


def test_directory_in_the_place_of_a_trace_is_an_error(tmp_path):
    load(tmp_path)
    [file] = kept_files(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConversionError, match="trace cannot be kept"):
        load(tmp_path)


def test_place_that_is_no_directory_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConversionError, match=r"trace cannot be kept\n *where: .*cache(.*\n)*.*do: .*trace_cache"):
        load(tmp_path)


def test_no_unfinished_files_are_left(tmp_path):
    load(tmp_path)
    assert [file.suffix for file in kept_files(tmp_path)] == [".json"]


def test_traces_are_kept_at_once_by_many(tmp_path):
    trace = Traced(CopyPlan(SourceTable(["a"], ["F32"], [(2,)]), ()), {}, (), Changes())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: keep_trace(str(tmp_path), "digest", TARGETS, trace), range(64)))
    assert kept_trace(str(tmp_path), "digest", TARGETS) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_trace_that_depends_on_values_is_not_kept(tmp_path):
    def code(pairs):
        nonlocal calls
        calls += 1
        given = dict(pairs)
        model.first.weight.data.copy_(given["a"] if given["c"].sum() > 0 else given["b"])

    calls = 0
    model = Model()
    for _ in range(2):
        load_with(code, checkpoint_of(tmp_path), model, trace_cache=tmp_path / "cache", trace_key="key")
    assert calls == 4  # each time without data, and with the values that it reads


@pytest.mark.parametrize(
    "change",
    [
        {"key": "other"},
        {"make": lambda: Model(tied=True)},
        {"make": lambda: Model(device="meta")},
        {"make": lambda: Model().half()},
        {"sources": {**SOURCES, "d": torch.zeros(3)}},
        {"sources": {**SOURCES, "a": SOURCES["a"].half()}},
    ],
)
def test_what_a_trace_depends_on_is_another_trace(change, tmp_path):
    load(tmp_path)
    assert load(tmp_path, **change)[1] == 1
    assert len(kept_files(tmp_path)) == 2


def digest(targets, **changes):
    values = {"load": load, "sources": SourceTable(["a"], ["F32"], [(2,)]), "calls": "pairs", "key": "key", **changes}
    return digest_of(values["load"], values["sources"], targets, values["calls"], values["key"])


@pytest.mark.parametrize(
    "changes",
    [
        {"load": Counted},
        {"calls": "dict"},
        {"key": ""},
        {"sources": SourceTable(["b"], ["F32"], [(2,)])},
        {"sources": SourceTable(["a"], ["F16"], [(2,)])},
        {"sources": SourceTable(["a"], ["F32"], [(1, 2)])},
    ],
)
def test_digest_differs(changes):
    assert digest(None, **changes) != digest(None)


def test_digest_differs_by_targets():
    memory = torch.zeros(2, 2)
    forms = [
        None,
        {},
        {"x": memory},
        {"y": memory},
        {"x": memory.t()},
        {"x": memory[0]},
        {"x": memory[1]},
        {"x": memory.half()},
        {"x": nn.Parameter(memory)},
        {"x": memory.to("meta")},
        {"x": memory, "y": memory},
        {"x": memory, "y": memory.clone()},
        {"x": memory, "y": memory.view(2, 2)},
        nn.Linear(2, 1),
        nn.Identity(),
    ]
    assert len({digest(targets) for targets in forms}) == len(forms)


@pytest.mark.parametrize("version", ["torch", "own"])
def test_digest_differs_by_versions(version, monkeypatch):
    before = digest(None)
    if version == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr("automodel_conv.loading_code.kept_traces._own_version", lambda: "0.0")
    assert digest(None) != before


def test_digest_is_that_of_other_tensors_of_the_same_form():
    assert digest({"x": torch.zeros(2)}) == digest({"x": torch.ones(2)})


class OwnParameter(nn.Parameter):
    """A class that a trace on disk cannot name."""


@pytest.mark.parametrize(
    "fields",
    [
        {"values_read": frozenset([0])},
        {"changes": Changes({"x": OwnParameter(torch.empty(2, device="meta"))})},
        {"changes": Changes({"x": torch.nn.Buffer(torch.empty(2, device="meta"))})},
        {"changes": Changes(attributes=(AttributeChange(("",), {"x": torch.ones(2)}),))},
        {"changes": Changes(attributes=(AttributeChange(("",), {"x": {"y": TARGETS.get}}),))},
    ],
)
def test_traces_that_a_file_cannot_hold_are_not_kept(fields, tmp_path):
    trace = Traced(CopyPlan(SourceTable(["a"], ["F32"], [(2,)]), ()), {}, (), Changes())
    keep_trace(str(tmp_path), "digest", TARGETS, replace(trace, **fields))
    assert kept_trace(str(tmp_path), "digest", TARGETS) is None
    keep_trace(str(tmp_path), "digest", TARGETS, trace)
    assert kept_trace(str(tmp_path), "digest", TARGETS) == trace


def test_all_fields_come_back(tmp_path):
    trace = Traced(
        plan=CopyPlan(SourceTable(["a"], ["F32"], [(2,)]), ()),
        computed={"x": Unknown("an operation", frozenset([0, 3]))},
        names=("x", "y"),
        changes=Changes(
            same=(("x", "z"),),
            unsaved=frozenset(["x"]),
            removed={"w": True, "v": False},
            attributes=(
                AttributeChange(("first",), {"is_loaded": True, "sizes": [1, {"a": (2.5, None)}]}, ("old",)),
                AttributeChange(("", "names", 0), {"b", "a"}),
            ),
        ),
        targets_read=frozenset(["y"]),
        needed=frozenset(["x", "y"]),
        rewritten=("y",),
    )
    keep_trace(str(tmp_path), "digest", TARGETS, trace)
    assert kept_trace(str(tmp_path), "digest", TARGETS) == trace


def test_trace_of_other_values_of_targets_is_traced_again(tmp_path):
    def code(pairs):
        nonlocal calls
        calls += 1
        model.first.weight.data.copy_(dict(pairs)["a" if model.saved.sum() > 0 else "b"])

    loaded = []
    for values in (torch.ones(2), torch.ones(2), -torch.ones(2)):
        calls, model = 0, Model()
        model.saved.data = values
        load_with(code, checkpoint_of(tmp_path), model, trace_cache=tmp_path / "cache", trace_key="key")
        loaded.append((calls, model.first.weight.tolist()))
    given = [SOURCES[name].tolist() for name in "aab"]
    assert loaded == list(zip([2, 0, 2], given, strict=True))
