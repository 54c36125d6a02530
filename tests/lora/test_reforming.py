"""Tests of the modules of an adapter in another form: the same products, and the same matrices after the way back."""

from dataclasses import replace

import pytest
import torch

from automodel_conv.errors import UnsupportedError
from automodel_conv.execution.factors import Factors
from automodel_conv.lora.config import config_of
from automodel_conv.lora.matching import match_adapters
from automodel_conv.lora.reforming import codes_of, matrices, reform
from automodel_conv.lora.writing import _names, new_settings
from automodel_conv.planning.deltas import blocks_of
from tests.lora.support import (
    EXPERTS,
    HIDDEN,
    INNER,
    PREFIX,
    SETTINGS,
    dyadic,
    in_memory,
    lora,
    per_expert,
    product_of_delta,
    toy_base,
    values_of,
)

KINDS = ("linear", "transposed", "interleaved")
STACKS = ("transformers", "vllm")


def reformed(adapter, base, form):
    """Return the content of an adapter in a form, and that form as an adapter."""
    matches = match_adapters([adapter], base)
    factors = Factors([adapter.tensors], matches.deltas)
    result = reform(matches, base, form, factors)
    tensors = {}
    for module in result.modules:
        tensors |= dict(zip(_names(module), matrices(module, factors), strict=True))
    for name, number in result.whole.items():
        tensors[PREFIX + name] = factors.of(number)[0].view(factors.stored_shape(number))
    settings = new_settings(adapter.config, result, base, form)
    return result, tensors, replace(in_memory(tensors, **settings), form=form)


def changes(base, adapter):
    """Return what an adapter adds to each tensor of the checkpoint that it changes, in float64."""
    matches = match_adapters([adapter], base)
    products = {i: product_of_delta(delta, adapter) for i, delta in enumerate(matches.deltas)}
    table = base.table
    found = {
        table.names[row]: values_of(blocks_of(pieces, matches.deltas), products, table.shapes[row])
        for row, pieces in matches.placed.items()
    }
    return {name: tensor for name, tensor in found.items() if tensor.any()}


def assert_same_changes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", STACKS)
@pytest.mark.parametrize("experts", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_every_form_has_the_same_products_and_leads_back(kind, form, experts):
    base = toy_base(kind)
    first = per_expert(experts) | lora("q_proj", 6, HIDDEN, seed=50)
    adapter = in_memory(first)
    result, tensors, stacked = reformed(adapter, base, form)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".experts" in name}
    wide, narrow = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    if kind != "linear" and form == "transformers":
        # PEFT takes the dimension before the last for the inputs of modules that say is_transposed.
        assert base.is_transposed("mlp.experts")
    assert shapes == {
        f"{PREFIX}mlp.experts.base_layer.lora_A.weight": (EXPERTS * 4, wide[1]),
        f"{PREFIX}mlp.experts.base_layer.lora_B.weight": (wide[0], EXPERTS * 4),
        f"{PREFIX}mlp.experts.lora_A.weight": (EXPERTS * 2, narrow[1]),
        f"{PREFIX}mlp.experts.lora_B.weight": (narrow[0], EXPERTS * 2),
    }
    assert (result.shared, result.left_out, result.whole) == ((), (), {})
    assert_same_changes(changes(base, stacked), changes(base, adapter))
    back, tensors, _ = reformed(stacked, base, "per_expert")
    assert tensors.keys() == first.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in first.items())
    untrained = {
        f"mlp.experts.{e}.{n}_proj.weight" for e in {*range(EXPERTS)} - {*experts} for n in ("gate", "up", "down")
    }
    assert set(back.left_out) == untrained
    assert back.shared == ()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_gate_and_up_may_differ(kind):
    base = toy_base(kind)
    first = {}
    for e in range(EXPERTS):
        first |= lora(f"mlp.experts.{e}.gate_proj", INNER, HIDDEN, 1, seed=e)
        first |= lora(f"mlp.experts.{e}.up_proj", INNER, HIDDEN, 3, seed=10 + e)
    adapter = in_memory(
        first, rank_pattern={"gate_proj": 1, "up_proj": 3}, alpha_pattern={"gate_proj": 2, "up_proj": 6}
    )
    _, tensors, stacked = reformed(adapter, base, "transformers")
    assert tensors[f"{PREFIX}mlp.experts.lora_A.weight"].shape == (EXPERTS * 4, HIDDEN)
    assert_same_changes(changes(base, stacked), changes(base, adapter))
    back, tensors, again = reformed(stacked, base, "per_expert")
    assert back.shared == ()
    assert tensors.keys() == first.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in first.items())
    assert_same_changes(changes(base, again), changes(base, adapter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_only_one_of_gate_and_up_may_be_trained(kind, name):
    base = toy_base(kind)
    first = {k: v for e in range(EXPERTS) for k, v in lora(f"mlp.experts.{e}.{name}", INNER, HIDDEN, seed=e).items()}
    adapter = in_memory(first)
    _, _, stacked = reformed(adapter, base, "transformers")
    assert_same_changes(changes(base, stacked), changes(base, adapter))
    _, _, again = reformed(stacked, base, "per_expert")
    assert_same_changes(changes(base, again), changes(base, adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_stack_with_full_ranks_gives_them_to_both_projections(kind):
    base = toy_base(kind)
    first = lora("mlp.experts", 2 * INNER, HIDDEN, 3, count=EXPERTS)
    adapter = in_memory(first, r=3, target_parameters=["experts.gate_up_proj"])
    result, tensors, split = reformed(adapter, base, "per_expert")
    assert {len(result.modules), len(result.shared)} == {2 * EXPERTS}
    assert all(tensor.shape == (3, HIDDEN) for name, tensor in tensors.items() if ".lora_A." in name)
    assert_same_changes(changes(base, split), changes(base, adapter))
    _, tensors, again = reformed(split, base, "transformers")
    assert_same_changes(changes(base, again), changes(base, adapter))
    assert tensors.keys() == first.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_needs_both_stacks_and_has_zeros_for_the_other(kind):
    base = toy_base(kind)
    first = lora("mlp.experts.0.down_proj", HIDDEN, INNER)
    result, tensors, _ = reformed(in_memory(first), base, "vllm")
    by_name = {module.name: module for module in result.modules}
    assert by_name.keys() == {"mlp.experts", "mlp.experts.base_layer"}
    zeros = (
        tensors[f"{PREFIX}mlp.experts.base_layer.lora_A.weight"],
        tensors[f"{PREFIX}mlp.experts.base_layer.lora_B.weight"],
    )
    assert [tuple(tensor.shape) for tensor in zeros] == [(EXPERTS * 2, HIDDEN), (2 * INNER, EXPERTS * 2)]
    assert not any(map(torch.any, zeros))
    assert by_name["mlp.experts"].untrained() == [1, 2]


@pytest.mark.parametrize("form", STACKS)
@pytest.mark.parametrize(("what", "settings"), [("rank", {"r": 4}), ("scale", {"lora_alpha": 8})])
def test_experts_that_differ_cannot_be_stacked(form, what, settings):
    first = per_expert((0, 1))
    rank = settings.get("r", 2)
    first |= lora("mlp.experts.2.down_proj", HIDDEN, INNER, rank)
    key, value = ("rank_pattern", rank) if "r" in settings else ("alpha_pattern", 8)
    more = {"alpha_pattern": {"experts.2.down_proj": 8}} if "r" in settings else {}
    adapter = in_memory(first, **more, **{key: {"experts.2.down_proj": value}})
    with pytest.raises(UnsupportedError, match=rf"(?s)mlp.experts.down_proj.*{what}.*mlp.experts.2.down_proj"):
        reformed(adapter, toy_base(), form)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_matrices_of_several_dtypes_keep_all_values(dtypes):
    first = per_expert()
    for number, name in enumerate(list(first)):
        first[name] = first[name].to(dtypes[number // 6 % 2])
    adapter, base = in_memory(first), toy_base()
    result, tensors, stacked = reformed(adapter, base, "transformers")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_same_changes(changes(base, stacked), changes(base, adapter))
    matches = match_adapters([adapter], base)
    factors = Factors([adapter.tensors], matches.deltas)
    assert {codes_of(module, factors) for module in result.modules} == {("F32", "F32")}


def test_matrices_that_exchange_their_places_keep_their_dtypes():
    """PEFT 0.18 took the dimension before the last for the inputs, so its B becomes A."""
    old = lora("mlp.experts", INNER, HIDDEN, count=EXPERTS)
    name = f"{PREFIX}mlp.experts.lora_B.weight"
    old[name] = old[name].bfloat16()
    adapter = in_memory(old, target_parameters=["experts.down_proj"], peft_version="0.18.1")
    _, tensors, again = reformed(adapter, toy_base(), "per_expert")
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_A." in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_B." in name} == {torch.float32}
    assert_same_changes(changes(toy_base(), again), changes(toy_base(), adapter))


def test_one_dtype_is_kept():
    first = {name: tensor.bfloat16() for name, tensor in per_expert().items()}
    _, tensors, _ = reformed(in_memory(first), toy_base(), "transformers")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["per_expert", *STACKS])
def test_whole_tensors_and_embeddings_are_kept(form):
    first = {
        f"{PREFIX}norm.weight": dyadic(3),
        f"{PREFIX}embed.lora_embedding_A": dyadic(2, 7),
        f"{PREFIX}embed.lora_embedding_B": dyadic(HIDDEN, 2, seed=1),
    }
    result, tensors, _ = reformed(in_memory(first | per_expert()), toy_base(), form)
    assert result.whole.keys() == {"norm.weight"}
    for name, tensor in first.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_whole_stack_has_no_form_for_single_experts(kind):
    base = toy_base(kind)
    first = {f"{PREFIX}mlp.experts.gate_up_proj": dyadic(*base.targets["mlp.experts.gate_up_proj"].shape)}
    _, tensors, _ = reformed(in_memory(first), base, "transformers")
    assert torch.equal(tensors[f"{PREFIX}mlp.experts.gate_up_proj"], *first.values())
    with pytest.raises(UnsupportedError, match=r"(?s)replaces a part of.*merge"):
        reformed(in_memory(first), base, "per_expert")


@pytest.mark.parametrize("name", ["0.gate_proj", "1.up_proj"])
def test_whole_matrix_of_one_expert_has_no_form_for_stacks(name):
    first = {f"{PREFIX}mlp.experts.{name}.weight": dyadic(INNER, HIDDEN)}
    result, _, _ = reformed(in_memory(first), toy_base(), "per_expert")
    assert result.whole.keys() == {f"mlp.experts.{name}.weight"}
    with pytest.raises(UnsupportedError, match=r"(?s)replaces a part of mlp.experts.gate_up_proj"):
        reformed(in_memory(first), toy_base(), "transformers")


def test_weight_of_a_router_that_is_a_parameter_is_one_again():
    first = lora("mlp.gate", EXPERTS, HIDDEN)
    adapter = in_memory(first, target_parameters=["mlp.gate.weight"])
    for form in ("transformers", "per_expert"):
        result, tensors, again = reformed(adapter, toy_base(), form)
        assert tensors.keys() == first.keys()
        assert [module.is_parameter for module in result.modules] == [form == "transformers"]
        assert_same_changes(changes(toy_base(), again), changes(toy_base(), adapter))


def test_settings_of_the_new_form_state_its_ranks():
    adapter = in_memory(per_expert(), lora_alpha=6)
    result, _, _ = reformed(adapter, toy_base(), "transformers")
    settings = new_settings(adapter.config, result, toy_base(), "transformers")
    assert {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters"} <= settings.keys()
    ranks = {module.stated: module.rank for module in result.modules}
    assert ranks == {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 2}
    stated = config_of(SETTINGS | settings, "new")
    assert {name: stated.rank(name) for name in ranks} == ranks
    assert {stated.scale(name) for name in ranks} == {3.0}
