"""Tests of loads by a given plan: the same result as loads that plan, without planning, and only if it fits."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", reason="the models, their rules and their checkpoints are those of transformers")

import automodel_conv as amc
from automodel_conv.compiling import opening, planned, to_model
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import Decode, Fallback, SourceTable, Target, group_pieces
from automodel_conv.planning.given_plan import Misfits, fit_sources
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.comparing import assert_same, assert_same_in_order, tensors_of
from tests.model_zoo import build_model, write_checkpoint
from tests.quantized.producers import fine_grained
from tests.quantized.test_models import quantized


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Return a model, its checkpoint in several files, and its plan."""
    path = tmp_path_factory.mktemp("mixtral")
    model = build_model("mixtral")
    write_checkpoint(model, path, 20_000)
    return SimpleNamespace(model=model, path=path, plan=amc.compile_plan(path, model))


@pytest.fixture
def changed(mixtral, tmp_path):
    """Return a function that writes the tensors again after a change, and returns the directory."""

    def change(edit, **metadata):
        tensors = tensors_of(mixtral.path)
        edit(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata)
        return tmp_path

    return change


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


def poisoned(name):
    model = build_model(name)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    return model


def reported(report):
    """Return everything that a report contains, except times."""
    return replace(report, seconds={})


@pytest.fixture
def never_planned(monkeypatch):
    """Turn planning, and building a model, into an error."""

    def refuse(*arguments, **keywords):
        raise AssertionError("a plan was given")

    for module, name in [(opening, "load_plan"), (planned, "meta_model"), (to_model, "RuleSet")]:
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def never_opened(monkeypatch):
    """Turn opening a checkpoint, and so downloading it, into an error."""
    monkeypatch.setattr(opening, "open_source", None)


@pytest.mark.parametrize("form", ["plan", "json"])
@pytest.mark.parametrize("home", ["new tensors", "no model", "in place", "meta"])
def test_load_by_a_plan_equals_the_load_that_plans(mixtral, form, home, request):
    plan = mixtral.plan if form == "plan" else mixtral.plan.to_json()
    expected = amc.load_state_dict(mixtral.path, mixtral.model)
    request.getfixturevalue("never_planned")
    if home in ("new tensors", "no model"):
        loaded = amc.load_state_dict(mixtral.path, mixtral.model if home == "new tensors" else None, plan=plan)
        assert_same_in_order(loaded, expected)
        assert loaded.layout is expected.layout is None
        report = loaded.report
    else:
        model = poisoned("mixtral") if home == "in place" else on_meta(mixtral.model)
        report = amc.load_model(model, mixtral.path, plan=plan)
        assert_same_in_order(model.state_dict(), expected)
    assert reported(report) == reported(expected.report)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma3"])
def test_every_kind_of_rule_loads_by_its_plan(tmp_path, name):
    write_checkpoint(build_model(name), tmp_path, 1 << 30)
    expected = amc.load_state_dict(tmp_path)
    loaded = amc.load_state_dict(tmp_path, plan=amc.compile_plan(tmp_path).to_json())
    assert_same(loaded, expected)
    assert reported(loaded.report) == reported(expected.report)


class Tied(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(3, device=device))
        self.head = self.embed


@pytest.mark.parametrize("given", [True, False], ids=["model", "no model"])
def test_names_that_are_one_tensor_are_one_tensor(tmp_path, given):
    save_file({"embed": torch.ones(3)}, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, Tied()).to_json()
    loaded = amc.load_state_dict(tmp_path, Tied() if given else None, plan=plan)
    assert loaded["head"] is loaded["embed"]
    assert_bytes_equal(loaded["embed"], torch.ones(3))
    assert loaded.report.missing_keys == ()
    model = Tied("meta")
    amc.load_model(model, tmp_path, plan=plan)
    assert model.head is model.embed


def test_quantized_tensors_are_decoded_by_the_plan(tmp_path):
    quantized("qwen3_moe", tmp_path)
    expected = amc.load_state_dict(tmp_path)
    plan = amc.compile_plan(tmp_path)
    assert plan.sources.decodes
    assert_same_in_order(amc.load_state_dict(tmp_path, plan=plan), expected)
    stored = load_file(tmp_path / "model.safetensors")
    for number, names in enumerate((sorted(stored)[::2], sorted(stored)[1::2])):  # two files: other rows
        save_file({n: stored[n] for n in names}, tmp_path / f"part-{number}.safetensors")
    weight_map = {name: f"part-{sorted(stored).index(name) % 2}.safetensors" for name in stored}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = amc.load_state_dict(tmp_path, plan=plan.to_json())
    assert_same_in_order(loaded, expected)
    assert loaded.report.left_out == ()


def test_codes_are_kept_if_the_plan_keeps_them(tmp_path):
    quantized("qwen3_moe", tmp_path)
    plan = amc.compile_plan(tmp_path, rules=[], dequantize=False)
    assert_same(amc.load_state_dict(tmp_path, plan=plan.to_json()), tensors_of(tmp_path))


def test_codes_with_another_decoding_do_not_fit(tmp_path):
    quantized("qwen3_moe", tmp_path / "a")
    plan = amc.compile_plan(tmp_path / "a")
    quantized("qwen3_moe", tmp_path / "b", fine_grained((4, 4)))
    with pytest.raises(amc.NameProblems, match=r"_scale_inv: the plan reads F32 \[24, 22\], found F32 \[12, 11\]"):
        amc.load_state_dict(tmp_path / "b", plan=plan)


@pytest.mark.parametrize("other", [{"block": (2, 8)}, {"divides": True}, {"format": "e5m2"}, {"scales": 2}], ids=str)
def test_how_a_source_decodes_is_part_of_it(other):
    decode = Decode("e4m3", (4, 4), (4, 4), 1)
    names, dtypes, shapes = ["w", "w_scale", "w_scale_2"], ["BF16", "F32", "F32"], [(4, 4), (1, 1), (1, 1)]
    target = Target("w", "BF16", (4, 4), -1, (0,), group_pieces([Piece(0, Box((16,), (1,), (1,)), 0, 0)]))
    plan = CopyPlan(SourceTable(names, dtypes, shapes, {0: decode}), (target,))
    for table, fits in (
        (plan.sources, True),
        (SourceTable(names, dtypes, shapes, {0: decode._replace(**other)}), False),
        (SourceTable(names[::-1], dtypes[::-1], shapes[::-1], {2: decode}), True),
        (SourceTable(names[::-1], dtypes[::-1], shapes[::-1], {2: decode._replace(scales=0)}), False),
    ):
        misfits = Misfits()
        fitted = fit_sources(plan, table, misfits, strict=True)
        assert [name for name, _, _ in misfits.unlike] == ([] if fits else ["w"])
        if fits:
            assert fitted.sources == table
            assert [table.names[row] for row in fitted.targets[0].sources] == ["w"]


@pytest.mark.parametrize("form", ["plan", "json"])
def test_offsets_and_files_may_differ(mixtral, changed, form):
    path = changed(lambda tensors: tensors.update({name: tensors.pop(name) + 1 for name in reversed(list(tensors))}))
    assert amc.open_checkpoint(path).names != amc.open_checkpoint(mixtral.path).names
    plan = mixtral.plan if form == "plan" else mixtral.plan.to_json()
    loaded = amc.load_state_dict(path, mixtral.model, plan=plan)
    assert_same_in_order(loaded, amc.load_state_dict(path, mixtral.model))


def test_targets_of_transformers_code_follow_moved_rows(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.arange(6.0) + 10}, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, rules=[])
    row = plan.sources.names.index("b")
    fallback = Fallback("for a test", lambda sources: {"b": sources[row] * 2})
    own = plan.target("b")._replace(copies=(), fallback=fallback)
    plan = replace(plan, targets=(plan.target("a"), own))
    save_file({"b": torch.arange(6.0) + 10, "a": torch.arange(6.0)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "z.safetensors", "b": "b.safetensors"}}
    save_file({"a": torch.arange(6.0)}, tmp_path / "z.safetensors")
    save_file({"b": torch.arange(6.0) + 10}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert amc.open_checkpoint(tmp_path).names == ["b", "a"]
    loaded = amc.load_state_dict(tmp_path, plan=plan)
    assert_bytes_equal(loaded["b"], (torch.arange(6.0) + 10) * 2)
    assert_bytes_equal(loaded["a"], torch.arange(6.0))
    assert loaded.report.fallbacks == ("b",)


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"


def edited(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(EXPERT), rf"the checkpoint lacks \(1\):\n *{re.escape(EXPERT)}"),
        (edited(EXPERT, torch.Tensor.double), rf"{re.escape(EXPERT)}: the plan reads BF16 \[\d.*found F64 \["),
        (edited(EXPERT, lambda t: t.t().contiguous()), rf"{re.escape(EXPERT)}: the plan reads BF16 \[\d"),
    ],
    ids=["absent", "dtype", "shape"],
)
def test_source_that_does_not_fit_is_named_and_nothing_is_written(mixtral, changed, edit, message, strict):
    model = poisoned("mixtral")
    path = changed(edit)
    for load in (
        lambda: amc.load_model(model, path, plan=mixtral.plan, strict=strict),
        lambda: amc.load_state_dict(path, plan=mixtral.plan, strict=strict),
    ):
        with pytest.raises(amc.NameProblems, match=message) as caught:
            load()
        assert "compile_plan" in str(caught.value)
        assert "leave plan out" in str(caught.value)
        assert "strict" not in str(caught.value)
    assert all((t.reshape(-1).view(torch.uint8) == POISON).all() for t in model.state_dict().values())


def test_targets_of_absent_sources_are_incomplete(mixtral, changed):
    path = changed(lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(path, plan=mixtral.plan)
    assert caught.value.incomplete == (("model.layers.0.mlp.experts.down_proj", (EXPERT,)),)


def test_tensor_outside_the_plan_is_an_error_or_left_out(mixtral, changed):
    path = changed(lambda tensors: tensors.update(extra=torch.ones(2)))
    with pytest.raises(amc.NameProblems, match=r"the plan does not have \(1\):\n *extra(.|\n)*strict=False"):
        amc.load_state_dict(path, plan=mixtral.plan)
    loaded = amc.load_state_dict(path, plan=mixtral.plan, strict=False)
    assert loaded.report.left_out == ("extra",)
    assert_same_in_order(loaded, amc.load_state_dict(mixtral.path))


def test_unused_tensor_may_be_absent_in_a_lenient_load(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    whole = amc.compile_plan(tmp_path, rules=[])
    plan = replace(whole, targets=(whole.target("a"),))
    assert amc.load_state_dict(tmp_path, plan=plan).report.left_out == ("b",)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(amc.NameProblems, match=r"lacks \(1\):\n *b"):
        amc.load_state_dict(tmp_path, plan=plan)
    loaded = amc.load_state_dict(tmp_path, plan=plan, strict=False)
    assert list(loaded) == ["a"]
    assert loaded.report.left_out == ()


@pytest.mark.parametrize("strict", [True, False])
def test_plan_of_another_model_does_not_fit(tmp_path, mixtral, strict):
    other = build_model("qwen3_moe")
    for load in (
        lambda: amc.load_model(other, mixtral.path, plan=mixtral.plan, strict=strict),
        lambda: amc.load_state_dict(mixtral.path, other, plan=mixtral.plan, strict=strict),
    ):
        with pytest.raises(amc.NameProblems, match=r"the model (lacks|has other shapes)"):
            load()
    wider = nn.Linear(4, 2, bias=False)
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, nn.Linear(3, 2, bias=False))
    with pytest.raises(amc.NameProblems, match=r"weight: the plan produces \[2, 3\], expected \[2, 4\]") as caught:
        amc.load_model(wider, tmp_path, plan=plan, strict=strict)
    assert caught.value.mismatched == (("weight", (2, 3), (2, 4)),)


def test_names_that_the_plan_does_not_produce_are_missing(tmp_path):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, nn.Linear(3, 2, bias=False))
    model = nn.Linear(3, 2)
    before = model.bias.detach().clone()
    for load in (
        lambda **more: amc.load_model(model, tmp_path, plan=plan, **more),
        lambda **more: amc.load_state_dict(tmp_path, model, plan=plan, **more).report,
    ):
        with pytest.raises(amc.NameProblems, match=r"the plan does not produce \(1\):\n *bias") as caught:
            load()
        assert caught.value.missing == ("bias",)
        assert load(strict=False).missing_keys == ("bias",)
    assert_bytes_equal(model.weight.detach(), torch.ones(2, 3))
    assert_bytes_equal(model.bias.detach(), before)


def test_names_that_the_model_ignores_are_not_missing(mixtral):
    plan = replace(mixtral.plan, targets=tuple(t for t in mixtral.plan.targets if t.name != "lm_head.weight"))
    model = build_model("mixtral")
    with pytest.raises(amc.NameProblems, match=r"the plan does not produce \(1\):\n *lm_head\.weight"):
        amc.load_model(model, mixtral.path, plan=plan)
    model._keys_to_ignore_on_load_missing = ["lm_head"]
    assert amc.load_model(model, mixtral.path, plan=plan).missing_keys == ()
    assert "lm_head.weight" not in amc.load_state_dict(mixtral.path, model, plan=plan)


def test_sources_left_out_by_a_plan_are_an_error_or_reported(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, rules=[])
    left_out = {"missing": ("m",), "unexpected": ("u",), "mismatched": (("x", (1,), (2,)),)}
    for name, value in left_out.items():
        lacking = replace(plan, **{name: value}).to_json()
        with pytest.raises(amc.NameProblems) as caught:
            amc.load_state_dict(tmp_path, plan=lacking)
        assert getattr(caught.value, name) == value
        assert getattr(amc.load_state_dict(tmp_path, plan=lacking, strict=False).report, f"{name}_keys") == value


def test_dtypes_come_from_the_plan(mixtral):
    plan = amc.compile_plan(mixtral.path, mixtral.model, dtype=torch.bfloat16)
    expected = amc.load_state_dict(mixtral.path, mixtral.model, dtype=torch.bfloat16)
    model = build_model("mixtral")
    amc.load_model(model, mixtral.path, plan=plan)
    assert_same_in_order(model.state_dict(), expected)


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm", "transformers"])
def test_layout_comes_from_the_plan(mixtral, layout):
    plan = amc.compile_plan(mixtral.path, mixtral.model, layout=layout).to_json()
    expected = amc.load_state_dict(mixtral.path, mixtral.model, layout=layout)
    for model in (mixtral.model, None):
        loaded = amc.load_state_dict(mixtral.path, model, plan=plan)
        assert_same(loaded, expected)
        assert loaded.layout == expected.layout == layout
    model = build_model("mixtral")
    if layout == "transformers":
        amc.load_model(model, mixtral.path, plan=plan)
        assert_same_in_order(model.state_dict(), expected)
    else:
        with pytest.raises(amc.UnsupportedError, match=f"the model's experts are not in the layout '{layout}'"):
            amc.load_model(model, mixtral.path, plan=plan)


def test_files_in_another_layout_than_the_plan_are_refused(mixtral, tmp_path):
    for layout in ("transformers", "gpt_oss"):
        amc.convert_checkpoint(mixtral.path, tmp_path / layout, layout=layout)
    plan = amc.compile_plan(tmp_path / "transformers", mixtral.model)
    assert plan.source_layout == "transformers"
    loaded = amc.load_state_dict(tmp_path / "transformers", mixtral.model, plan=plan)
    assert_same(loaded, mixtral.model.state_dict())
    with pytest.raises(amc.UnsupportedError, match=r"compiled for\n.*\n.*'transformers'\n.*'gpt_oss'"):
        amc.load_state_dict(tmp_path / "gpt_oss", mixtral.model, plan=plan)
    kept = amc.compile_plan(tmp_path / "gpt_oss", rules=[])
    assert amc.load_state_dict(tmp_path / "gpt_oss", plan=kept).layout == "gpt_oss"


@pytest.mark.parametrize(
    "decided",
    [
        {"rules": []},
        {"layout": "nemo"},
        {"source_layout": "per_expert"},
        {"key_mapping": {"a": "b"}},
        {"dtype": torch.float16},
        {"dequantize": False},
        {"layout": "vllm", "dtype": torch.float32},
    ],
    ids=lambda decided: ", ".join(decided),
)
def test_arguments_that_a_plan_decides_are_refused_in_one_error(mixtral, never_opened, decided):
    model = build_model("mixtral")
    for load in (
        lambda: amc.load_model(model, mixtral.path, plan=mixtral.plan, **decided),
        lambda: amc.load_state_dict(mixtral.path, plan=mixtral.plan, **decided),
    ):
        with pytest.raises(amc.ConversionError, match="plan= already determines") as caught:
            load()
        assert all(f"{name}={value!r}" in str(caught.value) for name, value in decided.items())


PLANS_IN_FILES = ["path/to/plan.json", Path("plan.json"), ""]


@pytest.mark.parametrize("plan", [3, b"{}", {"version": 4}, "{}", *PLANS_IN_FILES], ids=repr)
def test_invalid_plan_is_refused_before_anything_is_opened(mixtral, never_opened, plan):
    for load in (
        lambda: amc.load_state_dict(mixtral.path, plan=plan),
        lambda: amc.load_model(build_model("mixtral"), mixtral.path, plan=plan),
    ):
        with pytest.raises(amc.UnsupportedError, match=r"no plan|not a plan") as caught:
            load()
        assert ("pass its text" in str(caught.value)) == (plan != "{}")


def test_reading_a_plan_is_planning(mixtral, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds = amc.load_state_dict(mixtral.path, plan=mixtral.plan.to_json(), threads=1).report.seconds
    assert list(seconds) == ["open", "plan", "read"]
    assert seconds["open"] == 1
    assert seconds["plan"] == 4  # the plan is read, and then what to read, to map and to create is decided


def test_plan_from_json_is_proved(mixtral):
    data = json.loads(mixtral.plan.to_json())
    data["copies"][0][0][-1][0] = 1
    with pytest.raises(amc.CoverageError):
        amc.load_state_dict(mixtral.path, plan=json.dumps(data))


def test_names_that_wrappers_have_changed_fit(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    stored = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    plan = amc.compile_plan(tmp_path, model)
    loaded = amc.load_state_dict(tmp_path, nn.DataParallel(model), plan=plan)
    assert_same_in_order(loaded, model.state_dict())


def test_device_maps_fit_the_plan(mixtral):
    loaded = amc.load_state_dict(mixtral.path, plan=mixtral.plan, device_map={"": "cpu"})
    assert_same_in_order(loaded, amc.load_state_dict(mixtral.path))
    with pytest.raises(amc.ConversionError, match="has no device"):
        amc.load_state_dict(mixtral.path, plan=mixtral.plan, device_map={"model": "cpu"})
