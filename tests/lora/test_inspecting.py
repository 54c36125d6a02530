"""Tests of summaries of adapters: which layers, experts and projections they change, and what the base model lacks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.lora.inspecting import AdapterRow, inspect_adapter
from automodel_conv.upstream.registry import transformers_available

LAYERS, EXPERTS = 3, 4
PREFIX = "base_model.model."


@pytest.fixture
def base(tmp_path):
    names = [f"layers.{n}.experts.{e}.up_proj" for n in range(LAYERS) for e in range(EXPERTS)]
    names += [f"layers.{n}.q_proj" for n in range(LAYERS)]
    tensors = {f"{name}.weight": torch.zeros(6, 5) for name in names} | {"head.weight": torch.zeros(6, 5)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def inspected(base, modules, config=(), whole=()):
    """Return the summary of an adapter with these modules, by rank."""
    directory = base.parent / "adapter"
    directory.mkdir()
    tensors = {PREFIX + name: torch.zeros(shape) for name, shape in dict(whole).items()}
    for module, rank in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.zeros(rank, 5)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(6, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": []} | dict(config)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return inspect_adapter(directory, base)


def test_modules_that_differ_in_layer_and_expert_have_one_row(base):
    modules = {f"layers.{n}.experts.{e}.up_proj": 2 for n in (0, 2) for e in (3, 1)}
    summary = inspected(base, modules | {"layers.1.q_proj": 2})
    assert summary.modules == 5
    assert summary.problems == ()
    assert summary.form == "per_expert"
    assert summary.rows == (
        AdapterRow("layers.*.experts.*.up_proj.weight", (0, 2), (1, 3), LAYERS, EXPERTS, 2, 1.5, None),
        AdapterRow("layers.*.q_proj.weight", (1,), (), LAYERS, 0, 2, 1.5, None),
    )


def test_layers_with_other_experts_have_a_row_of_their_own(base):
    modules = {f"layers.{n}.experts.{e}.up_proj": 2 for n, e in ((0, 0), (0, 1), (1, 2), (2, 0), (2, 1))}
    rows = inspected(base, modules).rows
    assert [(row.layers, row.experts) for row in rows] == [((0, 2), (0, 1)), ((1,), (2,))]


def test_last_of_several_numbers_is_that_of_the_expert(tmp_path):
    names = [f"layers.{n}.parts.1.experts.{e}.up" for n in (0, 20) for e in (3, 1000)]
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": torch.zeros(6, 5) for name in names}, tmp_path / "base" / "model.safetensors")
    [row] = inspected(tmp_path / "base", dict.fromkeys(reversed(names), 2)).rows
    assert row == AdapterRow("layers.*.parts.1.experts.*.up.weight", (0, 20), (3, 1000), 2, 2, 2, 1.5, None)


def test_other_ranks_and_scales_have_a_row_of_their_own(base):
    modules = {f"layers.{n}.q_proj": rank for n, rank in ((0, 2), (1, 4), (2, 2))}
    config = {"rank_pattern": {"layers.1.q_proj": 4}, "alpha_pattern": {"layers.2.q_proj": 8}, "use_rslora": True}
    rows = inspected(base, modules, config).rows
    found = {row.layers: (row.rank, row.scale) for row in rows}
    assert found == {(0,): (2, 3 / 2**0.5), (1,): (4, 3 / 2), (2,): (2, 8 / 2**0.5)}


def test_replaced_weights_have_neither_rank_nor_scale(base):
    [row] = inspected(base, {}, whole={"head.weight": (6, 5)}).rows
    assert row == AdapterRow("head.weight", (), (), 0, 0, None, None, None)


def test_modules_without_effect_have_a_row_and_a_reason(base):
    modules = {"layers.0.q_proj": 2, "layers.0.q_porj": 2, "layers.3.q_proj": 2, "layers.1.q_proj": 3}
    summary = inspected(base, modules, whole={"tail.weight": (6, 5)})
    assert {(row.name, row.layers): row.problem for row in summary.rows} == {
        ("layers.*.q_proj.weight", (0,)): None,
        ("layers.*.q_porj", (0,)): "not in the base",
        ("layers.*.q_proj", (3,)): "not in the base",
        ("layers.*.q_proj", (1,)): "of another shape",
        ("tail.weight", ()): "not in the base",
    }
    assert len(summary.problems) == 4
    assert any(text.startswith("layers.1.q_proj: A [3, 5], B [6, 3]") for text in summary.problems)
    assert summary.why_no_model is not None


@pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")
def test_stack_has_all_experts_of_its_parameter(tmp_path):
    from automodel_conv.cli.demo import TINY
    from automodel_conv.cli.demo_process import write_checkpoint

    base = tmp_path / "base"
    base.mkdir()
    write_checkpoint(TINY, str(base))
    directory, inputs, outputs = tmp_path / "adapter", TINY.intermediate_size, TINY.hidden_size
    directory.mkdir()
    module = f"{PREFIX}model.layers.1.mlp.experts"
    tensors = {
        f"{module}.lora_A.weight": torch.zeros(TINY.experts * 2, inputs),
        f"{module}.lora_B.weight": torch.zeros(outputs, 2 * TINY.experts),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.21.2"}))
    summary = inspect_adapter(directory, base)
    experts = tuple(range(TINY.experts))
    name = "model.layers.*.mlp.experts.down_proj"
    assert summary.rows == (AdapterRow(name, (1,), experts, TINY.layers, TINY.experts, 2, 1.0, None),)
    assert summary.form == "transformers"
