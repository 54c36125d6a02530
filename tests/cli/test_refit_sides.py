"""Tests of the sides of a refit forecast: what ranks of a trainer and of an engine hold of a model."""

import pytest
from torch import nn

pytest.importorskip("transformers", reason="builds transformers models")

from automodel_conv.cli.engine_mesh import Division, EngineMesh
from automodel_conv.cli.refit_sides import engine_tensors, trainer_parts
from automodel_conv.errors import UnsupportedError
from tests.model_zoo import build_on_meta

ONE = EngineMesh(1, 1, False, 1)


def parts_of(published):
    """Return the shape of each part and the ranks that hold it, by the name of the tensor."""
    parts = {}
    for part, ranks, *_ in published.parts:
        name = published.plan.sources.names[part.source]
        parts.setdefault(name, []).append((part.region.local_shape, ranks))
    return parts


@pytest.fixture(scope="module")
def model():
    return build_on_meta("deepseek_v3")


def test_a_trainer_holds_parameters_as_fsdp_and_ep_divide_them(model):
    parts = parts_of(trainer_parts(model, {"fsdp": 2, "ep": 2}, 1 << 20))
    experts, rows, columns = model.model.layers[-1].mlp.experts.gate_up_proj.shape
    path = f"model.layers.{len(model.model.layers) - 1}.mlp"
    quarter = (experts // 2, rows // 2, columns)
    assert parts[f"{path}.experts.gate_up_proj"] == [(quarter, (rank,)) for rank in range(4)]
    assert [ranks for _, ranks in parts["lm_head.weight"]] == [(0,), (1,), (2,), (3,)]


def test_each_rank_of_a_trainer_holds_whole_buffers(model):
    parts = parts_of(trainer_parts(model, {"fsdp": 2, "ep": 2}, 1 << 20))
    [name] = {name for name in parts if name.endswith("e_score_correction_bias") and ".1." in name}
    [(shape, ranks)] = parts[name]
    assert (shape, ranks) == (model.get_buffer(name).shape, (0, 1, 2, 3))


def test_one_rank_holds_everything(model):
    published = trainer_parts(model, {}, 1 << 20)
    assert all(each.part.region.is_whole for each in published.parts)
    assert {each.holders for each in published.parts} == {(0,)}
    assert {t.name for t in published.plan.targets} >= {"lm_head.weight", "model.layers.1.mlp.experts.0.up_proj.weight"}


def test_an_engine_holds_the_experts_in_the_layout_of_vllm(model):
    tensors = engine_tensors(model, trainer_parts(model, {}, 1 << 20), EngineMesh(2, 1, False, 1))
    w13 = tensors.plan.target("model.layers.1.mlp.experts.w13_weight")
    assert w13.shape == model.model.layers[1].mlp.experts.gate_up_proj.shape
    assert tensors.divisions[w13.name] is Division.INTERMEDIATE
    assert [regions[w13.name].local_shape[1] * 2 for regions in tensors.regions] == [w13.shape[1]] * 2


def test_tied_tensors_are_sent_once():
    model = build_on_meta("qwen3_moe")
    assert not model.config.tie_word_embeddings
    untied = len(trainer_parts(model, {}, 1 << 20).plan.targets)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert len(trainer_parts(model, {}, 1 << 20).plan.targets) == untied - 1


def test_heads_of_keys_come_from_the_config(model):
    model = build_on_meta("qwen3_moe")
    heads = model.config.num_key_value_heads
    mesh = EngineMesh(2 * heads, 1, True, 1)
    tensors = engine_tensors(model, trainer_parts(model, {}, 1 << 20), mesh)
    name = "model.layers.0.self_attn.k_proj.weight"
    regions = [regions[name] for regions in tensors.regions]
    assert len(set(regions)) == heads
    assert regions[0] == regions[1]


def test_a_model_without_experts_keeps_its_names():
    model = nn.Module()
    model.add_module("lm_head", nn.Linear(4, 64, bias=False, device="meta"))
    tensors = engine_tensors(model, trainer_parts(model, {"fsdp": 2}, 1 << 20), ONE)
    assert tensors.divisions == {"lm_head.weight": Division.VOCABULARY}
    assert tensors.regions[0]["lm_head.weight"].is_whole


def test_an_engine_that_does_not_divide_a_tensor_is_refused(model):
    with pytest.raises(UnsupportedError, match="the ranks of the engine do not divide"):
        engine_tensors(model, trainer_parts(model, {}, 1 << 20), EngineMesh(7, 1, False, 1))
