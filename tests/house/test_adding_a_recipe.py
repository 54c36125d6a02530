"""Tests of adding a recipe: with one entry of ``RECIPES``, errors and the command line name it."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

import automodel_conv as amc
from automodel_conv.recipes import RECIPES, grouped_experts
from tests.cli.support import run


def toy():
    """Return the rules of a model with names of its own."""
    return grouped_experts("brain.experts", gate="a", up="b", down="c")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "toy_moe", toy)
    shapes = {"a": (2, 3), "b": (2, 3), "c": (3, 2)}
    names = {f"0.brain.experts.{e}.{matrix}.weight": shape for e in range(4) for matrix, shape in shapes.items()}
    (tmp_path / "toy").mkdir()
    save_file({name: torch.ones(shape) for name, shape in names.items()}, tmp_path / "toy" / "model.safetensors")
    (tmp_path / "toy" / "config.json").write_text(json.dumps({"model_type": "toy_moe"}))
    return tmp_path / "toy"


def test_error_names_the_recipe_and_it_loads(checkpoint):
    with pytest.raises(amc.UnsupportedError, match=r"pass rules=automodel_conv\.recipes\.toy\(\)"):
        amc.load_state_dict(checkpoint)
    assert amc.load_state_dict(checkpoint, rules=toy())["0.brain.experts.gate_up_proj"].shape == (4, 4, 3)


def test_command_line_advises_the_recipe_and_has_it(checkpoint):
    assert "pass --recipe toy_moe;" in run("plan", checkpoint).stderr
    assert (
        "0.brain.experts.gate_up_proj"
        in run("plan", checkpoint, "--recipe", "toy_moe", "--explain", "0.brain.experts.gate_up_proj").stdout
    )
