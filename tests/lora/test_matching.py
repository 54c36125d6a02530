"""Tests of matching adapters to their base model: every module has its place, or is named in one error."""

import re
from dataclasses import replace

import pytest
import torch

from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.lora.matching import match_adapters
from automodel_conv.planning.deltas import blocks_of
from tests.lora.support import (
    EXPERTS,
    HIDDEN,
    INNER,
    PREFIX,
    base_of_matrices,
    dyadic,
    in_memory,
    lora,
    per_expert,
    product_of,
    product_of_delta,
    toy_base,
    values_of,
)

KINDS = ("linear", "transposed", "interleaved")
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def changes(base, *adapters):
    """Return what adapters add to each tensor of the checkpoint that they change, by name, in float64."""
    matches = match_adapters(adapters, base)
    products = {i: product_of_delta(delta, adapters[delta.adapter]) for i, delta in enumerate(matches.deltas)}
    table = base.table
    return {
        table.names[row]: values_of(blocks_of(pieces, matches.deltas), products, table.shapes[row])
        for row, pieces in matches.placed.items()
    }


def assert_changes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def error_of(base, *adapters):
    """Return the error, after checking that it is one of names."""
    with pytest.raises(NameProblems) as caught:
        match_adapters(adapters, base)
    return caught.value


def expected_of(tensors, scale=2.0):
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    return {f"{module}.weight": product_of(tensors, module, scale) for module in modules}


def stacks(gate_up=(2 * INNER, HIDDEN), down=(HIDDEN, INNER)):
    """Return an adapter of both stacks, given the sizes of B and of A."""
    inner = lora("mlp.experts.base_layer", *gate_up, count=EXPERTS, seed=1)
    return inner | lora("mlp.experts", *down, count=EXPERTS, seed=2)


def expected_of_stacks(tensors, is_transposed):
    """Return what an adapter of both stacks adds to the published matrices."""
    expected = {}
    for e in range(EXPERTS):
        products = []
        for module in ("mlp.experts.base_layer", "mlp.experts"):
            a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
            product = 2.0 * (b[:, e::EXPERTS] @ a[2 * e : 2 * e + 2])
            products.append(product.T if is_transposed else product)
        gate_up, down = products
        expected |= {
            f"mlp.experts.{e}.gate_proj.weight": gate_up[:INNER],
            f"mlp.experts.{e}.up_proj.weight": gate_up[INNER:],
            f"mlp.experts.{e}.down_proj.weight": down,
        }
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_published_modules_change_their_own_weights(kind):
    tensors = per_expert((0, 2)) | lora("q_proj", 6, HIDDEN)
    assert_changes(changes(toy_base(kind), in_memory(tensors)), expected_of(tensors))


def test_published_modules_need_no_model():
    tensors = lora("layers.0.q_proj", 4, 3)
    base = base_of_matrices(layers__0__q_proj__weight=(4, 3))
    assert_changes(changes(base, in_memory(tensors)), expected_of(tensors))
    assert base.why_no_model is None


def test_stacks_of_linear_experts_change_every_matrix():
    tensors = stacks()
    found = changes(toy_base(), in_memory(tensors, target_parameters=BOTH))
    assert_changes(found, expected_of_stacks(tensors, is_transposed=False))


def test_stacks_of_transposed_experts_are_transposed():
    tensors = stacks()
    found = changes(toy_base("transposed"), in_memory(tensors, target_parameters=BOTH))
    assert_changes(found, expected_of_stacks(tensors, is_transposed=False))


def test_stacks_of_old_peft_have_inputs_and_outputs_exchanged():
    tensors = stacks((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    found = changes(toy_base(), in_memory(tensors, target_parameters=BOTH, peft_version="0.18.1"))
    assert_changes(found, expected_of_stacks(tensors, is_transposed=True))


@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize(("version", "turned"), [("0.18.0", True), ("0.19.1", False), ("0.19.0", True)])
def test_version_decides_the_order_of_square_matrices(kind, version, turned):
    """Old releases read [in, out], 0.19.0 exchanged the kinds of modules; the sizes do not show it here."""
    hidden, inner = 6, 3
    tensors = lora("mlp.experts", 2 * inner, hidden, count=EXPERTS)
    names = ["mlp.experts.gate_up_proj"]
    adapter = in_memory(tensors, target_parameters=names, peft_version=version)
    found = changes(toy_base(kind, hidden=hidden, inner=inner), adapter)
    a, b = (tensors[f"{PREFIX}mlp.experts.lora_{part}.weight"].double() for part in "AB")
    is_stored_turned = kind == "transposed"
    for e in range(EXPERTS):
        product = 2.0 * (b[:, e::EXPERTS] @ a[2 * e : 2 * e + 2])  # [out, in] of PEFT
        reads_last = (version == "0.19.1" and kind == "linear") or (version == "0.19.0" and kind == "transposed")
        stored = product if reads_last else product.T
        published = stored.T if is_stored_turned else stored
        assert torch.equal(found[f"mlp.experts.{e}.gate_proj.weight"], published[:inner]), turned
        assert torch.equal(found[f"mlp.experts.{e}.up_proj.weight"], published[inner:])


@pytest.mark.parametrize("parameter", BOTH)
def test_one_stack_alone_is_the_one_that_the_config_states(parameter):
    sizes = (2 * INNER, HIDDEN) if parameter.endswith("gate_up_proj") else (HIDDEN, INNER)
    tensors = lora("mlp.experts", *sizes, count=EXPERTS)
    matches = match_adapters([in_memory(tensors, target_parameters=[parameter])], toy_base())
    assert [match.name for match in matches.matches] == [parameter]


def test_one_stack_alone_is_the_only_one_of_its_shape_if_the_config_states_none():
    tensors = lora("mlp.experts", HIDDEN, INNER, count=EXPERTS)
    matches = match_adapters([in_memory(tensors)], toy_base())
    assert [match.name for match in matches.matches] == ["mlp.experts.down_proj"]


def test_scales_are_those_of_the_config_and_the_weight_of_the_adapter():
    tensors = per_expert((1,)) | lora("q_proj", 6, HIDDEN, 4)
    adapter = in_memory(tensors, rank_pattern={"q_proj": 4}, alpha_pattern={"up_proj": 3}, use_rslora=True)
    scales = {d.module: d.scale for d in match_adapters([replace(adapter, weight=-0.5)], toy_base()).deltas}
    root = 2**0.5
    assert scales["q_proj"] == -0.5 * (4 / 2)
    assert scales["mlp.experts.1.up_proj"] == -0.5 * (3 / root)
    assert scales["mlp.experts.1.down_proj"] == -0.5 * (4 / root)


def test_several_adapters_add_up():
    first, second = per_expert((0, 1)), lora("mlp.experts.1.up_proj", INNER, HIDDEN, seed=77)
    expected = expected_of(first)
    expected["mlp.experts.1.up_proj.weight"] += expected_of(second)["mlp.experts.1.up_proj.weight"]
    assert_changes(changes(toy_base(), in_memory(first), in_memory(second)), expected)


def test_embedding_adds_the_transposed_product():
    a, b = dyadic(2, 7), dyadic(HIDDEN, 2, seed=1)
    adapter = in_memory({f"{PREFIX}embed.lora_embedding_A": a, f"{PREFIX}embed.lora_embedding_B": b})
    found = changes(toy_base(), adapter)
    assert_changes(found, {"embed.weight": 2.0 * (b.double() @ a.double()).T})


def test_weight_of_a_router_may_be_targeted_as_a_parameter():
    tensors = lora("mlp.gate", EXPERTS, HIDDEN)
    adapter = in_memory(tensors, target_parameters=["gate.weight"], alpha_pattern={"mlp.gate.weight": 8})
    assert_changes(changes(toy_base(), adapter), expected_of(tensors, scale=4.0))


def test_whole_tensors_have_a_place_and_no_b():
    tensors = {f"{PREFIX}norm.weight": dyadic(3), f"{PREFIX}embed.weight": dyadic(7, HIDDEN)}
    base = toy_base()
    matches = match_adapters([in_memory(tensors)], base)
    assert [(match.name, match.delta.shape, match.delta.b) for match in matches.matches] == [
        ("norm.weight", (1, 1, 3), None),
        ("embed.weight", (1, 7, HIDDEN), None),
    ]
    assert matches.placed.keys() == {base.rows["norm.weight"], base.rows["embed.weight"]}


def test_whole_stack_of_the_model_is_placed_in_all_published_matrices():
    base = toy_base("interleaved")
    values = dyadic(EXPERTS, HIDDEN, 2 * INNER)
    matches = match_adapters([in_memory({f"{PREFIX}mlp.experts.gate_up_proj": values})], base)
    places = {base.table.names[row]: blocks_of(pieces, matches.deltas) for row, pieces in matches.placed.items()}
    products = {0: values.double().view(1, EXPERTS * HIDDEN, 2 * INNER)}
    for e in range(EXPERTS):
        for start, name in enumerate(("gate_proj", "up_proj")):
            found = values_of(places[f"mlp.experts.{e}.{name}.weight"], products, (INNER, HIDDEN))
            assert torch.equal(found, values[e, :, start::2].T.double())


# One error, with the names of all modules that would have no effect.


def test_one_misspelt_module_among_many_is_named():
    tensors = per_expert() | lora("mlp.experts.1.gate_porj", INNER, HIDDEN)
    error = error_of(toy_base(), in_memory(tensors))
    assert error.unexpected == ("mlp.experts.1.gate_porj",)
    assert "1 of 10 modules would have no effect" in str(error)


def test_expert_and_layer_that_the_base_lacks_are_named():
    tensors = per_expert((0, EXPERTS)) | lora("layers.9.q_proj", 6, HIDDEN)
    error = error_of(toy_base(), in_memory(tensors))
    assert set(error.unexpected) == {
        *(f"mlp.experts.{EXPERTS}.{name}_proj" for name in ("gate", "up", "down")),
        "layers.9.q_proj",
    }


def test_adapter_of_another_model_is_named_with_all_modules():
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in range(4)]
    error = error_of(toy_base(), in_memory({k: v for name in names for k, v in lora(name, 4, 4).items()}))
    assert error.unexpected == tuple(names)
    assert "4 of 4 modules" in str(error)
    assert all(name in str(error) for name in names)


def test_whole_tensor_without_a_place_is_named():
    error = error_of(toy_base(), in_memory(per_expert() | {f"{PREFIX}nrom.weight": dyadic(3)}))
    assert error.unexpected == ("nrom.weight",)


def test_whole_tensor_of_another_shape_is_named():
    error = error_of(toy_base(), in_memory({f"{PREFIX}norm.weight": dyadic(4)}))
    assert re.search(r"norm.weight: \[4\] for norm.weight \[3\]", str(error))


def swapped(tensors):
    def other(name):
        return name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")

    return {other(name): tensor for name, tensor in tensors.items()}


def test_swapped_matrices_are_named_as_such():
    error = error_of(toy_base(), in_memory(swapped(lora("q_proj", 6, HIDDEN))))
    assert re.search(
        r"q_proj: A \[6, 2\], B \[2, 8\] for q_proj.weight \[6, 8\] at rank 2; A and B are swapped", str(error)
    )


def test_transposed_matrices_do_not_fit():
    tensors = {name: tensor.T.contiguous() for name, tensor in lora("q_proj", 6, HIDDEN).items()}
    assert "q_proj: A [8, 2], B [2, 6]" in str(error_of(toy_base(), in_memory(tensors)))


@pytest.mark.parametrize("settings", [{"r": 4}, {"rank_pattern": {"q_proj": 1}}])
def test_rank_that_the_config_contradicts_is_named(settings):
    error = error_of(toy_base(), in_memory(lora("q_proj", 6, HIDDEN), **settings))
    assert f"at rank {settings.get('r', 1)}" in str(error)
    assert "A [2, 8], B [6, 2]" in str(error)


def test_base_of_another_size_is_named_with_all_modules():
    error = error_of(toy_base(hidden=2 * HIDDEN), in_memory(per_expert() | lora("q_proj", 6, HIDDEN)))
    assert "10 of 10 modules would have no effect" in str(error)
    assert "do not fit (10)" in str(error)
    assert error.unexpected == ()


def test_names_and_shapes_are_in_one_error():
    tensors = lora("q_proj", 5, HIDDEN) | lora("k_proj", 6, HIDDEN) | per_expert((0,))
    text = str(error_of(toy_base(), in_memory(tensors)))
    assert "2 of 5 modules" in text
    assert "unexpected: the base model has no weight for (1):\n    k_proj" in text
    assert "do not fit (1):\n    q_proj" in text


def test_problems_of_all_adapters_are_in_one_error():
    error = error_of(toy_base(), in_memory(lora("first", 2, 2)), in_memory(lora("second", 2, 2)))
    assert error.unexpected == ("first", "second")


@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS + 1])
def test_stack_of_another_number_of_experts_is_named(count):
    tensors = lora("mlp.experts", HIDDEN, INNER, count=count)
    error = error_of(toy_base(), in_memory(tensors, target_parameters=["experts.down_proj"]))
    assert f"mlp.experts: A {[2 * count, INNER]}" in str(error)


def test_swapped_stack_is_named():
    tensors = swapped(lora("mlp.experts", HIDDEN, INNER, count=EXPERTS))
    assert "mlp.experts: A" in str(error_of(toy_base(), in_memory(tensors, target_parameters=["experts.down_proj"])))


def test_stated_parameter_is_the_end_of_a_name_after_a_dot():
    tensors = lora("mlp.experts", 2 * INNER, HIDDEN, count=EXPERTS)
    adapter = in_memory(tensors, target_parameters=["perts.down_proj", "experts.gate_up_proj"])
    assert [match.name for match in match_adapters([adapter], toy_base()).matches] == ["mlp.experts.gate_up_proj"]


def test_more_wrappers_than_parameters_are_named():
    tensors = {**stacks(), **lora("mlp.experts.base_layer.base_layer", HIDDEN, INNER, count=EXPERTS)}
    assert "state which in target_parameters" in str(error_of(toy_base(), in_memory(tensors, target_parameters=BOTH)))


def test_stack_that_the_config_attributes_to_the_wrong_parameter_is_named():
    tensors = lora("mlp.experts", 2 * INNER, HIDDEN, count=EXPERTS)
    error = error_of(toy_base(), in_memory(tensors, target_parameters=["experts.down_proj"]))
    assert "for mlp.experts.down_proj [3, 8, 5]" in str(error)


def test_names_of_the_model_are_unknown_without_a_model_and_the_error_says_why():
    base = base_of_matrices(q_proj__weight=(4, 3))
    error = error_of(base, in_memory(lora("q_proj", 4, 3) | lora("mlp.experts", 4, 3, count=2)))
    assert error.unexpected == ("mlp.experts",)
    assert "names of the model are not known: no config" in str(error)


def test_quantized_tensors_are_named_and_the_error_says_what_to_do():
    base = base_of_matrices(q_proj__weight=(4, 3), k_proj__weight=(4, 3), v_proj__weight=(4, 3))
    base.table.dtypes[0] = base.table.dtypes[1] = "F8_E4M3"
    tensors = {k: v for name in ("q_proj", "k_proj", "v_proj") for k, v in lora(name, 4, 3).items()}
    with pytest.raises(
        UnsupportedError, match=r"(?s)2 tensors that are quantized.*q_proj.*k_proj.*dequantize"
    ) as caught:
        match_adapters([in_memory(tensors)], base)
    assert "v_proj" not in str(caught.value)
