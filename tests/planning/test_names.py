"""Tests of names without the components that wrappers of torch add."""

import pytest

from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.names import plain_names, plain_table, plain_tensors


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["_orig_mod.a.w", "_orig_mod.b"], ["a.w", "b"]),
        (["layers.0._orig_mod.w", "layers.1.w"], ["layers.0.w", "layers.1.w"]),
        (["_orig_mod.a._orig_mod.w"], ["a.w"]),
        (["not_orig_mod.w", "a._orig_mods"], ["not_orig_mod.w", "a._orig_mods"]),
        ([], []),
    ],
)
def test_component_of_a_compiled_module_is_removed(names, plain):
    assert plain_names(names) == plain


def test_model_that_has_such_a_component_itself_keeps_it():
    names = ["a._orig_mod.w", "b"]
    assert plain_names(names, ["a._orig_mod.w"]) == names


@pytest.mark.parametrize(
    ("names", "known", "plain"),
    [
        (["module.a", "module.b.w"], ["a", "b.w"], ["a", "b.w"]),
        (["module._orig_mod.a"], ["a"], ["a"]),
        (["module.a", "b"], ["a", "b"], ["module.a", "b"]),
        (["module.a"], ["module.a"], ["module.a"]),
        (["module.a"], None, ["module.a"]),
    ],
    ids=str,
)
def test_first_component_of_data_parallelism_is_removed_if_all_names_have_it(names, known, plain):
    assert plain_names(names, known) == plain


def test_two_names_that_become_one_are_listed():
    with pytest.raises(NameProblems, match=r"a\.w <- a\.w, a\._orig_mod\.w") as caught:
        plain_names(["a.w", "b", "a._orig_mod.w"])
    assert caught.value.duplicated == (("a.w", ("a.w", "a._orig_mod.w")),)


def test_names_of_adapters_are_refused():
    with pytest.raises(UnsupportedError, match=r"PEFT(.|\n)*q_proj\.base_layer\.weight"):
        plain_names(["norm", "q_proj.base_layer.weight"])
    assert plain_names(["my_base_layer.w"]) == ["my_base_layer.w"]


def test_tables_and_tensors_keep_everything_but_their_names():
    table = SourceTable(["_orig_mod.b", "_orig_mod.a"], ["F32", "BF16"], [(2,), (3,)], hidden=frozenset({1}))
    assert plain_table(table) == SourceTable(["b", "a"], ["F32", "BF16"], [(2,), (3,)], hidden=frozenset({1}))
    assert plain_tensors({"_orig_mod.b": 1, "_orig_mod.a": 2}) == {"b": 1, "a": 2}
