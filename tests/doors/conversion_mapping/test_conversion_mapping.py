"""Tests of rule queries: the published signatures, which types merge tensors, and the rules of a type or a model."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from automodel_conv import conversion_mapping as queries
from automodel_conv.upstream.registry import transformers_available
from tests.doors.conversion_mapping.support import buildable_meta_model

try:
    import transformers
    from transformers import conversion_mapping as registry
    from transformers.core_model_loading import WeightConverter
except ModuleNotFoundError:
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

# Many of these tests request inexact mappings; one test checks the warning itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*first-match mapping")
ROOT = Path(queries.__file__).parent.parent

PUBLISHED_SIGNATURES = {
    "requires_tensor_merging": ("model_type",),
    "get_checkpoint_conversion_mapping": ("model_type",),
    "get_model_conversion_mapping": (
        "model",
        "key_mapping=None",
        "hf_quantizer=None",
        "add_legacy=True",
    ),
    "get_combined_key_mapping": ("model_type", "model_key_mapping=None", "*model=None"),
    "is_transformers_conversion_available": (),
    "get_hf_load_key_mapping": ("model",),
    "build_hf_export_key_renames": ("checkpoint_fqns", "key_mapping"),
}

PUBLISHED_SET = (
    "mixtral minimax phimoe qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 jamba olmoe lfm2_moe dots1 "
    "ernie4_5_moe glm4_moe glm4v_moe longcat_flash qwen3_omni_moe qwen3_next qwen3_vl_moe "
    "hunyuan_v1_moe flex_olmo"
).split()


# Registered with MergeModulelist in transformers 5.23 and absent from the published set.
MISSED_BY_THE_PUBLISHED_SET = (
    "afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v32 deepseek_v4 "
    "dots3_note_vision_encoder exaone_moe flint glm4_moe_lite glm5_next glm5_next_text glm_moe_dsa "
    "hy_v3 kimi_k25 kimi_linear kolibri1 laguna mellum mimo_v2_flash minimax_m2 minimax_m3_vl "
    "mistral_large4_text nemotron_h qwen3_5_moe_text qwen3_omni_moe_text qwen3_omni_moe_thinker "
    "qwen4_exp_text solar_open"
).split()


@pytest.mark.parametrize("name", PUBLISHED_SIGNATURES)
def test_signatures_are_the_published_ones(name):
    parameters = inspect.signature(getattr(queries, name)).parameters.values()
    written = tuple(
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else f"={p.default}")
        for p in parameters
    )
    assert written == PUBLISHED_SIGNATURES[name]


def test_published_set_is_unchanged():
    assert type(queries.MODELS_REQUIRING_TENSOR_MERGING) is set
    assert set(PUBLISHED_SET) == queries.MODELS_REQUIRING_TENSOR_MERGING
    assert isinstance(queries._TRANSFORMERS_AVAILABLE, bool)


@needs_transformers
def test_installed_transformers_is_detected_without_an_import():
    code = (
        "import sys; from automodel_conv import conversion_mapping as queries;"
        "print(queries.is_transformers_conversion_available(), 'transformers' in sys.modules);"
        "queries.get_checkpoint_conversion_mapping('mixtral'); print('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False", "True"]


WITHOUT_TRANSFORMERS = """
from torch import nn
from automodel_conv import conversion_mapping as queries
assert queries.is_transformers_conversion_available() is False
assert queries._TRANSFORMERS_AVAILABLE is False
assert queries.get_checkpoint_conversion_mapping("mixtral") is None
assert queries.get_model_conversion_mapping(nn.Linear(1, 1)) == []
assert queries.requires_tensor_merging("mixtral") is True
assert queries.requires_tensor_merging("minimax_m2") is False
assert queries.get_combined_key_mapping("mixtral") is None
assert queries.get_combined_key_mapping("mixtral", {}) is None
assert queries.get_combined_key_mapping("mixtral", {"a": "b"}) == {"a": "b"}
assert queries.get_combined_key_mapping("mixtral", {"a": "b"}, model=nn.Linear(1, 1)) == {"a": "b"}
assert queries.get_combined_key_mapping("gemma3")["^language_model\\\\.lm_head\\\\."] == "lm_head."
assert queries.get_hf_load_key_mapping(nn.Linear(1, 1)) is None
assert queries.build_hf_export_key_renames(["a"], None) == {}
assert queries.build_hf_export_key_renames(["a.x"], {"^a": "b"}) == {"b.x": "a.x"}
print("answered")
"""


@pytest.mark.parametrize("stub", ["package", "module"])
def test_without_transformers_queries_return_published_answers(tmp_path, stub):
    if stub == "package":
        (tmp_path / "transformers").mkdir()
        stub_file = tmp_path / "transformers" / "__init__.py"
    else:
        stub_file = tmp_path / "transformers.py"
    stub_file.write_text("raise ModuleNotFoundError('transformers is hidden')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH"), str(ROOT)]))
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert (run.stdout.strip(), run.stderr) == ("answered", "")


def test_unresolvable_transformers_counts_as_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))
    assert transformers_available.__wrapped__() is False
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert transformers_available.__wrapped__() is False


@needs_transformers
def test_tensor_merging_follows_every_installed_converter():
    registry.get_checkpoint_conversion_mapping("any")
    registered = registry._checkpoint_conversion_mapping_cache
    converting = {
        name for name, rules in registered.items() if any(isinstance(rule, WeightConverter) for rule in rules)
    }
    assert len(converting) >= 40
    answers = {name for name in registered if queries.requires_tensor_merging(name)}
    assert answers == converting | (set(PUBLISHED_SET) & set(registered))


@needs_transformers
@pytest.mark.parametrize("model_type", MISSED_BY_THE_PUBLISHED_SET)
def test_tensor_merging_covers_types_missing_from_the_published_set(model_type):
    if registry.get_checkpoint_conversion_mapping(model_type) is None:
        pytest.skip(f"this transformers has no rules for {model_type}")
    assert queries.requires_tensor_merging(model_type) is True


@pytest.mark.parametrize("model_type", PUBLISHED_SET)
def test_tensor_merging_keeps_the_published_answers(model_type):
    assert queries.requires_tensor_merging(model_type) is True


@pytest.mark.parametrize("model_type", ["llama", "bert", "llava", "no_such_model", "", None])
def test_tensor_merging_is_false_if_only_names_change(model_type):
    assert queries.requires_tensor_merging(model_type) is False


@needs_transformers
def test_registered_class_name_is_accepted_as_a_type():
    rule = WeightConverter("a.*.w", "a.w", [transformers.MergeModulelist(dim=0)])
    registry.register_checkpoint_conversion_mapping("SomeMergingModel", [rule], overwrite=True)
    try:
        assert queries.requires_tensor_merging("SomeMergingModel") is True
        assert queries.get_checkpoint_conversion_mapping("SomeMergingModel")[0] is not rule
    finally:
        registry._checkpoint_conversion_mapping_cache.pop("SomeMergingModel")
        getattr(registry, "USER_REGISTERED_MAPPINGS", set()).discard("SomeMergingModel")


@needs_transformers
def test_rules_of_a_type_are_fresh_copies():
    rules = queries.get_checkpoint_conversion_mapping("mixtral")
    expected = registry.get_checkpoint_conversion_mapping("mixtral")
    assert [repr(rule) for rule in rules] == [repr(rule) for rule in expected]
    again = queries.get_checkpoint_conversion_mapping("mixtral")
    assert not {id(rule) for rule in rules} & {id(rule) for rule in again}
    assert queries.get_checkpoint_conversion_mapping("no_such_model") is None


@needs_transformers
def test_rules_of_a_model_take_the_key_mapping_first_and_legacy_names_last():
    model = buildable_meta_model("mixtral")
    rules = queries.get_model_conversion_mapping(model, {"^foo": "bar"})
    expected = registry.get_model_conversion_mapping(model, {"^foo": "bar"})
    assert [repr(rule) for rule in rules] == [repr(rule) for rule in expected]
    assert rules[0].source_patterns == ["^foo"]
    plain = queries.get_model_conversion_mapping(model, add_legacy=False)
    assert 0 < len(plain) < len(queries.get_model_conversion_mapping(model))
