"""Tests of the base model of an adapter: its names, and the places of its parameters in the checkpoint."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.lora.base import Base, Loading, base_of, published_path
from automodel_conv.planning.boxes import Box, Piece, run_of
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.quantization import arranged_plan
from automodel_conv.upstream.registry import transformers_available
from tests.lora.support import EXPERTS, HIDDEN, INNER, base_of_matrices, toy_base

GATE_UP = "mlp.experts.gate_up_proj"
needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


def test_rows_are_those_that_names_may_mean():
    table = SourceTable(["a", "a.scale", "b"], ["F32"] * 3, [(1,)] * 3, hidden=frozenset({1}))
    assert Base("here", table, pytest.fail).rows == {"a": 0, "b": 2}


def test_model_is_built_only_when_it_is_needed():
    built = []

    def build():
        built.append(1)
        return toy_base().loading

    base = Base("here", toy_base().table, build)
    assert (base.rows["q_proj.weight"], base.why_no_model) == (9, None)
    assert built == []
    assert base.targets.keys() >= {GATE_UP, "q_proj.weight"}
    assert base.loading.model is base.loading.model
    assert built == [1]


def test_reason_is_kept_if_there_is_no_model():
    base = base_of_matrices(a__weight=(2, 2))
    assert base.why_no_model is None
    assert (base.targets, base.published_targets, base.same_name("a.weight"), base.has_stacks) == ({}, {}, None, False)
    assert base.why_no_model == "no config"
    with pytest.raises(UnsupportedError, match=r"no config"):
        _ = base.loading


def test_other_errors_of_building_are_not_kept_back():
    def build():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _ = Base("here", toy_base().table, build).targets


def test_names_of_one_tied_parameter_are_one_target():
    loading = toy_base().loading
    tied = Loading(loading.model, _with_ties(loading.plan, (("embed.weight", "lm_head.weight"), ("x", "y"))))
    base = Base("here", loading.plan.sources, lambda: tied)
    assert base.targets["lm_head.weight"] is base.targets["embed.weight"]
    assert "x" not in base.targets


def test_parameter_is_tied_to_its_other_names():
    loading = toy_base().loading
    tied = Loading(loading.model, _with_ties(loading.plan, (("embed.weight", "lm_head.weight"), ("x", "y"))))
    base = Base("here", loading.plan.sources, lambda: tied)
    assert base.tied_to("lm_head.weight") == ["embed.weight"]
    assert base.tied_to("norm.weight") == []


def _with_ties(plan, tied):
    return replace(plan, tied=tied)


@pytest.mark.parametrize("kind", ["linear", "transposed", "interleaved"])
def test_every_element_of_a_parameter_has_its_place_in_the_checkpoint(kind):
    base = toy_base(kind)
    for name in (GATE_UP, "mlp.experts.down_proj"):
        target = base.targets[name]
        numbers = torch.arange(torch.Size(target.shape).numel())
        found = {}
        for row, piece in base.to_rows(target, [Piece(0, run_of(numbers.numel()), 0, 0)]):
            part = found.setdefault(row, torch.full(base.table.shapes[row], -1))
            place = part.as_strided(piece.box.shape, piece.box.target_strides, piece.target_offset)
            place.copy_(numbers.as_strided(piece.box.shape, piece.box.source_strides, piece.source_offset))
        stack = numbers.view(target.shape)
        stack = stack if kind == "linear" else stack.transpose(1, 2)
        for row, part in found.items():
            _, _, expert, projection, _ = base.table.names[row].split(".")
            matrix = stack[int(expert)]
            if projection != "down_proj":
                number = projection == "up_proj"
                halves = (matrix[0::2], matrix[1::2]) if kind == "interleaved" else matrix.split(INNER)
                matrix = halves[number]
            assert torch.equal(part, matrix)
        assert len(found) == EXPERTS * (2 if name == GATE_UP else 1)


def test_published_tensor_that_the_checkpoint_lacks_is_placed_through_the_model():
    """A checkpoint in the model's own layout has stacks; the published names are places in them."""
    published = toy_base()
    own = SourceTable(*map(list, zip(*((t.name, "F32", t.shape) for t in published.loading.plan.targets), strict=True)))
    base = Base("own layout", own, lambda: Loading(published.loading.model, arranged_plan(own)))
    base.published = published.published
    target = base.published_targets["mlp.experts.2.up_proj.weight"]
    numel = INNER * HIDDEN
    [(row, piece)] = base.published_to_rows(target, Piece(0, run_of(numel), 0, 0))
    assert own.names[row] == GATE_UP
    assert piece == Piece(0, Box((numel,), (1,), (1,)), 0, (2 * 2 + 1) * numel)


def test_parameters_of_a_module_are_in_the_order_of_the_model():
    base = toy_base()
    assert base.parameters_of("mlp.experts") == ["gate_up_proj", "down_proj"]
    assert base.parameters_of("q_proj") == ["weight"]
    assert base.parameters_of("mlp") == base.parameters_of("nowhere.at.all") == []


@pytest.mark.parametrize("kind", ["linear", "transposed", "interleaved"])
def test_module_states_whether_it_is_transposed(kind):
    base = toy_base(kind)
    assert base.is_transposed("mlp.experts") == (kind != "linear")
    assert not base.is_transposed("q_proj")
    assert base.has_inputs_last(base.targets[GATE_UP]) == (kind == "linear")
    assert base.has_inputs_last(base.targets["q_proj.weight"])
    assert base.has_stacks


def test_paths_of_experts_are_known_by_both_names():
    base = toy_base()
    assert base.paths_when_published == base.published_paths == {"mlp.experts": "mlp.experts"}
    assert base.layers_when_published["q_proj"] == "q_proj"


def test_path_that_several_modules_have_when_published_names_none_of_them():
    base = toy_base()
    base.paths_when_published = {"first": "experts", "second": "experts", "third": "other"}
    assert base.published_paths == {"other": "third"}


@pytest.mark.parametrize(
    ("name", "shape", "path"),
    [
        ("layers.0.experts.3.w1.weight", (2, 2), "layers.0.experts"),
        ("layers.0.experts.down_proj", (4, 2, 2), "layers.0.experts"),
        ("layers.0.mlp.input_linear.weight", (4, 2, 2), "layers.0.mlp.input_linear"),
        ("experts.w1.weight", (2, 2), "experts.w1"),
    ],
)
def test_published_path_is_that_of_all_experts(name, shape, path):
    assert published_path(Target(name, "F32", shape, -1, (0,), ())) == path


@needs_transformers
def test_model_of_a_checkpoint_is_that_of_its_config(tmp_path):
    from automodel_conv.cli.demo import TINY
    from automodel_conv.cli.demo_process import write_checkpoint

    write_checkpoint(TINY, str(tmp_path))
    base = base_of(open_checkpoint(tmp_path), dequantize=False)
    experts = "model.layers.1.mlp.experts"
    assert base.parameters_of(experts) == ["gate_up_proj", "down_proj"]
    assert base.targets[f"{experts}.down_proj"].shape == (TINY.experts, TINY.hidden_size, TINY.intermediate_size)
    assert base.renamed(experts) == experts
    assert base.same_name("model.layers.1.mlp.gate.weight") == "model.layers.1.mlp.gate.weight"
    assert base.same_name("model.layers.7.mlp.gate.weight") is None
    assert base.where == str(tmp_path)


def test_checkpoint_without_a_config_has_names_and_no_model(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    base = base_of(open_checkpoint(tmp_path), dequantize=False)
    assert base.rows == {"a.weight": 0}
    assert base.targets == {}
    assert "config" in base.why_no_model


def test_error_of_a_base_without_a_model_has_only_the_reason():
    def build():
        raise UnsupportedError(message("no such type", where="config.json", do="install it"))

    base = Base("here", toy_base().table, build)
    assert base.targets == {}
    assert base.why_no_model.startswith("no such type")
    assert "help:" not in base.why_no_model
