"""Tests of adding a layout: with one entry of ``LAYOUTS``, loading, converting and saving support it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv.planning.buffers import Blocks, Buffer, Layout
from automodel_conv.planning.layouts import DOWN, GATE_UP, LAYOUTS

EXPERTS, SIZE, HIDDEN = 3, 4, 6
PATH = "model.layers.0.mlp.experts"

TOYS = {
    # Gate and up in a tensor each, transposed.
    "apart": Layout(
        first=(
            Buffer("gates", "E h i", ("gate",)),
            Buffer("gate_biases", "E i", ("gate",)),
            Buffer("ups", "E h i", ("up",)),
            Buffer("up_biases", "E i", ("up",)),
        ),
        ungated=(Buffer("ups", "E h i", ("up",)), Buffer("up_biases", "E i", ("up",))),
        down=(Buffer("downs", "E i h", DOWN), Buffer("down_biases", "E h", DOWN)),
    ),
    # Up before gate, alternating, with experts in the middle.
    "up_first": Layout(
        first=(Buffer("up_gate", "(i g) E h", ("up", "gate")), Buffer("up_gate_bias", "(i g) E", ("up", "gate"))),
        ungated=(Buffer("up", "i E h", ("up",)), Buffer("up_bias", "i E", ("up",))),
        down=(Buffer("back", "h E i", DOWN), Buffer("back_bias", "E h", DOWN)),
    ),
    # Columns in blocks of two, as a kernel might read them.
    "blocked": Layout(
        first=(
            Buffer("first", "E (g i) h", GATE_UP, Blocks("E g i (n k)", "E n g i k", (("k", 2),))),
            Buffer("first_bias", "E (g i)", GATE_UP),
        ),
        ungated=(
            Buffer("first", "E i h", ("up",), Blocks("E i (n k)", "E n i k", (("k", 2),))),
            Buffer("first_bias", "E i", ("up",)),
        ),
        down=(
            Buffer("second", "E h i", DOWN, Blocks("E h (n k)", "E n h k", (("k", 2),))),
            Buffer("second_bias", "E h", DOWN),
        ),
    ),
}


def element(projection, *index):
    return 1 + ("gate", "up", "down").index(projection) * 1000 + sum(i * 10**n for n, i in enumerate(index))


def array(shape, function):
    return torch.tensor(np.fromfunction(np.vectorize(function), shape, dtype=int), dtype=torch.float32)


def transformers():
    """Return the buffers of the layout "transformers", element by element."""

    def part(r):
        return ("gate", r) if r < SIZE else ("up", r - SIZE)

    return {
        f"{PATH}.gate_up_proj": array(
            (EXPERTS, 2 * SIZE, HIDDEN), lambda e, r, h: element(part(r)[0], e, part(r)[1], h)
        ),
        f"{PATH}.gate_up_proj_bias": array((EXPERTS, 2 * SIZE), lambda e, r: element(part(r)[0], e, part(r)[1], 9)),
        f"{PATH}.down_proj": array((EXPERTS, HIDDEN, SIZE), lambda e, h, i: element("down", e, i, h)),
        f"{PATH}.down_proj_bias": array((EXPERTS, HIDDEN), lambda e, h: element("down", e, 9, h)),
    }


def apart():
    return {
        f"{PATH}.gates": array((EXPERTS, HIDDEN, SIZE), lambda e, h, i: element("gate", e, i, h)),
        f"{PATH}.gate_biases": array((EXPERTS, SIZE), lambda e, i: element("gate", e, i, 9)),
        f"{PATH}.ups": array((EXPERTS, HIDDEN, SIZE), lambda e, h, i: element("up", e, i, h)),
        f"{PATH}.up_biases": array((EXPERTS, SIZE), lambda e, i: element("up", e, i, 9)),
        f"{PATH}.downs": array((EXPERTS, SIZE, HIDDEN), lambda e, i, h: element("down", e, i, h)),
        f"{PATH}.down_biases": array((EXPERTS, HIDDEN), lambda e, h: element("down", e, 9, h)),
    }


def up_first():
    def part(r):
        return ("up", "gate")[r % 2], r // 2

    return {
        f"{PATH}.up_gate": array((2 * SIZE, EXPERTS, HIDDEN), lambda r, e, h: element(part(r)[0], e, part(r)[1], h)),
        f"{PATH}.up_gate_bias": array((2 * SIZE, EXPERTS), lambda r, e: element(part(r)[0], e, part(r)[1], 9)),
        f"{PATH}.back": array((HIDDEN, EXPERTS, SIZE), lambda h, e, i: element("down", e, i, h)),
        f"{PATH}.back_bias": array((EXPERTS, HIDDEN), lambda e, h: element("down", e, 9, h)),
    }


def blocked():
    def in_blocks(rows, columns, function):  # element n of an expert is in row n // 2 of block n // 2 // rows
        def at(e, r, c):
            block, n = divmod(r * columns + c, 2 * rows)
            return function(e, n // 2, 2 * block + n % 2)

        return array((EXPERTS, rows, columns), at)

    plain = transformers()
    return {
        f"{PATH}.first": in_blocks(
            2 * SIZE, HIDDEN, lambda e, r, h: element("gate" if r < SIZE else "up", e, r % SIZE, h)
        ),
        f"{PATH}.first_bias": plain[f"{PATH}.gate_up_proj_bias"],
        f"{PATH}.second": in_blocks(HIDDEN, SIZE, lambda e, h, i: element("down", e, i, h)),
        f"{PATH}.second_bias": plain[f"{PATH}.down_proj_bias"],
    }


FORMS = {"transformers": transformers, "apart": apart, "up_first": up_first, "blocked": blocked}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, layout in TOYS.items():
        monkeypatch.setitem(LAYOUTS, name, layout)


def checkpoint(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({}))
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_it_is_loaded_and_converted_from_and_to_every_other(tmp_path, source, target):
    stored = checkpoint(tmp_path / "stored", FORMS[source]())
    options = {"rules": [], "layout": target, "source_layout": source}
    assert_same(amc.load_state_dict(stored, **options), FORMS[target]())
    amc.convert_checkpoint(stored, tmp_path / "converted", **options)
    files = list((tmp_path / "converted").glob("*.safetensors"))
    assert_same({name: tensor for file in files for name, tensor in load_file(file).items()}, FORMS[target]())


def test_its_name_is_suggested_for_a_misspelled_layout(tmp_path):
    stored = checkpoint(tmp_path / "stored", transformers())
    with pytest.raises(amc.UnsupportedError, match=r"unknown layout 'appart'(.|\n)*write 'apart'"):
        amc.load_state_dict(stored, rules=[], layout="appart", source_layout="transformers")


def test_gate_without_up_is_named(tmp_path):
    tensors = apart()
    del tensors[f"{PATH}.ups"]
    stored = checkpoint(tmp_path / "stored", tensors)
    with pytest.raises(amc.UnsupportedError, match=r"experts\.ups: missing"):
        amc.load_state_dict(stored, rules=[], layout="transformers", source_layout="apart")


def test_gate_and_up_of_two_dtypes_are_not_laid_out_together(tmp_path):
    tensors = apart()
    tensors[f"{PATH}.ups"] = tensors[f"{PATH}.ups"].to(torch.bfloat16)
    stored = checkpoint(tmp_path / "stored", tensors)
    with pytest.raises(amc.UnsupportedError, match=r"experts\.gates: F32(.|\n)*experts\.ups: BF16"):
        amc.load_state_dict(stored, rules=[], layout="transformers", source_layout="apart")


def test_shape_that_it_cannot_have_is_named(tmp_path):
    tensors = transformers()
    tensors[f"{PATH}.gate_up_proj"] = torch.zeros(EXPERTS, 2 * SIZE + 1, HIDDEN)
    stored = checkpoint(tmp_path / "stored", tensors)
    with pytest.raises(amc.UnsupportedError, match=r"gate_up_proj does not have a shape(.|\n)*9 cannot hold g by i"):
        amc.load_state_dict(stored, rules=[], layout="up_first", source_layout="transformers")
