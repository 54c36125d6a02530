"""Tests of one load under the hook: the rules it marks as used, and its report."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from transformers.core_model_loading import WeightRenaming

import automodel_conv as amc
from automodel_conv.integrations import hooked_load
from tests.integrations.toys import PARTS, joined, load, same_under_the_hook


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()


def test_rules_that_a_plan_has_used_are_marked_as_used(tmp_path):
    unused = WeightRenaming(["nothing"], ["else"])
    renaming = WeightRenaming(["old_"], [""])  # only for converted tensors
    tensors = {f"old_{name}": tensor for name, tensor in PARTS.items()} | {"q__weight": torch.ones(2, 2)}
    done = same_under_the_hook(tmp_path, [renaming, unused, joined()], **tensors)
    assert done.lowered == ("k.weight",), done.left


def test_a_load_that_fails_is_not_reported_as_done(tmp_path, monkeypatch):
    with amc.accelerate_transformers() as done, monkeypatch.context() as patch:
        patch.setattr(hooked_load, "fill", lambda *args: (_ for _ in ()).throw(amc.ReadError("no")))
        with pytest.raises(amc.ReadError):
            load(tmp_path, [joined()], **PARTS)
        assert done.loads == []


def test_printed_report_groups_names_by_reason_and_is_short():
    left = {f"layers.{layer}.w": "it is sharded while it is loaded" for layer in range(200)} | {"other": "no"}
    text = str(hooked_load.HookedLoad("Toy", ("a", "b"), left, ("spare",), (("stale", "b.safetensors"),), 3 << 20))
    assert text.splitlines() == [
        "Toy: 2 converted by plan, 201 by transformers; all other tensors need no conversion",
        "  mapped: 3.1 MB",
        "  200 by transformers: it is sharded while it is loaded",
        "    layers.0.w",
        "    layers.1.w",
        "    layers.2.w",
        "    ... and 197 more",
        "  1 by transformers: no",
        "    other",
        "  1 left out: no parameter consumes them",
        "    spare",
        "  1 not loaded: the index assigns them to another file or to none",
        "    stale of b.safetensors",
    ]


def test_printed_report_has_the_reason_if_nothing_is_planned():
    text = str(hooked_load.HookedLoad("Toy", (), {hooked_load.ALL: "opened before install()"}))
    assert text == "Toy: 0 converted by plan, all by transformers\n  by transformers: opened before install()"
