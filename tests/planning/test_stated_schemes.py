"""Tests of the schemes that a config states for modules, by the names of weights."""

import pytest

from automodel_conv.planning.methods.method import ANY_MODULE, FLOAT_SCALES, TENSOR, Modules, Scheme, modules_of
from automodel_conv.planning.stated_schemes import StatedSchemes


def scheme(*names, block=TENSOR):
    return Scheme("e4m3", block, FLOAT_SCALES, modules=modules_of(names))


STATED = {
    "exact": "model.layers.0.mlp.down_proj",
    "per expert": "model.layers.1.mlp.experts.3.gate_proj",
    "another expert": "model.layers.1.mlp.experts.4.down_proj",
    "shard": "model.layers.2.mlp.up_proj",
    "q": "model.layers.2.self_attn.q_proj",
    "parent": "model.layers.3.ffn.experts",
    "parent of that": "model.layers.3",
    "pattern": "model.layers.4.*_proj",
    "beside the experts": "model.layers.5.moe.gate_proj",
    "head": "lm_head",
    "wrapped": "language_model.model.layers.0.o_proj",
    "wrapped otherwise": "model.language_model.layers.1.o_proj",
}
SCHEMES = {label: scheme(name, block=(1, n + 1)) for n, (label, name) in enumerate(STATED.items())}


@pytest.mark.parametrize(
    ("weight", "labels"),
    [
        ("model.layers.0.mlp.down_proj.weight", ["exact"]),
        ("model.layers.0.mlp.down_proj", ["exact"]),
        ("model.layers.0.mlp.down_proj.weight_scale", ["exact"]),  # below the module
        ("model.layers.0.mlp.down_projection.weight", []),
        ("model.layers.1.mlp.experts.3.gate_proj.weight", ["per expert"]),
        ("model.layers.1.mlp.experts.gate_up_proj", ["per expert"]),
        ("model.layers.1.mlp.experts.down_proj", ["another expert"]),
        ("model.layers.1.mlp.experts.5.down_proj.weight", ["another expert"]),
        ("model.layers.2.mlp.gate_up_proj.weight", ["shard"]),
        ("model.layers.2.self_attn.qkv_proj.weight", ["q"]),
        ("model.layers.2.mlp.down_proj.weight", []),
        ("model.layers.3.ffn.experts.17.w1.weight", ["parent"]),
        ("model.layers.3.ffn.experts.gate_up_proj", ["parent"]),
        ("model.layers.3.attn.wq.weight", ["parent of that"]),
        ("model.layers.30.attn.wq.weight", []),
        ("model.layers.4.self_attn.q_proj.weight", ["pattern"]),
        ("model.layers.4.mlp.gate.weight", []),
        ("model.layers.5.moe.experts.0.gate_proj.weight", ["beside the experts"]),
        ("model.layers.5.moe.experts.gate_up_proj", ["beside the experts"]),
        ("model.lm_head.weight", ["head"]),
        ("lm_head.weight", ["head"]),
        ("model.language_model.layers.0.o_proj.weight", ["wrapped"]),
        ("language_model.model.layers.1.o_proj.weight", ["wrapped otherwise"]),
        ("weight", []),
        ("", []),
    ],
)
def test_weight_is_found_under_every_name_that_configs_use(weight, labels):
    assert StatedSchemes(list(SCHEMES.values())).of(weight) == [SCHEMES[label] for label in labels]


def test_most_exact_name_decides():
    pattern, parent, exact = scheme("*"), scheme("a.b", block=(1, 2)), scheme("a.b.c", block=(1, 3))
    stated = StatedSchemes([pattern, parent, exact])
    assert stated.of("a.b.c.weight") == [exact]
    assert stated.of("a.b.d.weight") == [parent]
    assert stated.of("a.d.weight") == [pattern]


def test_all_schemes_of_a_module_are_returned_once():
    first, second = scheme("a", "b.*"), scheme("a", "b.c*", block=(1, 2))
    stated = StatedSchemes([first, second, first])
    assert stated.of("a.weight") == [first, second]
    assert stated.of("b.c.weight") == [first, second]
    assert stated.of("b.d.weight") == [first]


def test_schemes_for_any_module_are_stated_for_none():
    assert StatedSchemes([Scheme("e4m3", TENSOR, FLOAT_SCALES)]).of("a.weight") == []
    assert modules_of([]) == ANY_MODULE == Modules()


@pytest.mark.parametrize(
    ("pattern", "matches"), [("a.*", "a.b.c"), ("*.attn.*", "x.attn.q"), ("a.[01]", "a.1"), ("a?", "ab")]
)
def test_names_with_wildcards_are_patterns_of_whole_names(pattern, matches):
    modules = modules_of([pattern, "a"])
    assert modules.names == {"a"}
    assert [bool(p.fullmatch(matches)) for p in modules.patterns] == [True]
    assert not modules.patterns[0].fullmatch("y")


def test_name_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="1 is not the name of a module"):
        modules_of(["a", 1])
