"""Rule queries: the published signatures, and names that come out as transformers renames them.

The oracle for names is the way back: transformers reverts the state dict of a model on the meta
device to checkpoint names, and hands a tensor that is only renamed through as the same object. So
each checkpoint name is known to belong to one model name without renaming anything forwards.
"""

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from automodel_conv import conversion_mapping as queries
from automodel_conv.errors import NameProblems
from automodel_conv.upstream.registry import transformers_available

try:
    import transformers
    from transformers import AutoConfig
    from transformers import conversion_mapping as registry
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
except ModuleNotFoundError:
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

# Inexact mappings are what many of these tests ask for; one test is about the warning itself.
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

RENAMED_TYPES = (
    "llava llava_next llava_onevision internvl paligemma mistral3 got_ocr2 vipllava video_llava "
    "gemma3 qwen2_vl qwen2_5_vl qwen2_audio gemma4_unified fuyu kimi_k25 inkling_mm_model "
    "inkling2 inkling2_text mixtral minimax_m2 deepseek_v2 deepseek_v3 deepseek_v4 qwen2_moe "
    "qwen3_moe qwen3_next qwen3_vl_moe ernie4_5_vl_moe nemotron_h jamba phimoe longcat_flash "
    "rt_detr vit clip siglip colqwen2"
).split()
# The reversal leaves prefix changes out, so for these the way back is not the way there.
NOT_REVERSIBLE = {"shieldgemma2"}

DEPTHS = (
    "num_hidden_layers num_layers n_layers n_layer depth encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers vt_num_hidden_layers"
).split()
EXPERT_COUNTS = "num_experts num_local_experts n_routed_experts moe_num_experts".split()


def read_first_match(key, mapping):
    """A key as the published consumers of a mapping read it: first match wins."""
    if mapping is None:
        return key
    if callable(mapping):
        return mapping(key)
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def shrink(config):
    """Two layers and four experts: fewer names, the same kinds of names."""
    for names, most in ((DEPTHS, 2), (EXPERT_COUNTS, 4)):
        for name in names:
            if isinstance(getattr(config, name, None), int) and getattr(config, name) > most:
                setattr(config, name, most)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            shrink(value)
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:2])
    return config


def meta_model(model_type, **kwargs):
    """A small model of the type on the meta device; raises whatever its classes raise."""
    tables = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "PRETRAINING")
    for table in (*(f"MODEL_FOR_{table}_MAPPING_NAMES" for table in tables), "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, table).get(model_type)
        if found:
            break
    else:
        raise LookupError(f"no auto class builds {model_type}")
    cls = getattr(transformers, found if isinstance(found, str) else found[0])
    config = shrink(AutoConfig.for_model(model_type, **kwargs))
    with torch.device("meta"):
        return cls(config)


def buildable_meta_model(model_type, **kwargs):
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    try:
        return meta_model(model_type, **kwargs)
    except ImportError as error:
        pytest.skip(f"{model_type} needs an optional package: {error}")


def checkpoint_names(model):
    """Every original checkpoint name in loading order -> its model name, None if converted."""
    state_dict = dict(model.state_dict())
    owner = {id(tensor): name for name, tensor in state_dict.items()}
    original = revert_weight_conversion(model, state_dict)
    return {name: owner.get(id(original[name])) for name in sorted(original, key=dot_natural_key)}


def names_as_loaded(model, names):
    """``names`` as the mapping stage of transformers' loader renames them."""
    rules = registry.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets, prefix = model.state_dict(), model.base_model_prefix
    loaded = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, targets)
        if renamed not in targets and name in targets:
            renamed, _ = rename_source_key(name, [], [], prefix, targets)
        loaded[name] = renamed
    return loaded


def wrong_names(model_type, model):
    """Names that do not come out as the way back, the model, and the loader say."""
    names = checkpoint_names(model)
    mapping = queries.get_combined_key_mapping(model_type, model=model)
    ours = {name: read_first_match(name, mapping) for name in names}
    back = {name: target for name, target in names.items() if target is not None}
    assert back, "nothing to compare"
    targets = model.state_dict().keys()
    return (
        {name: ours[name] for name, target in back.items() if ours[name] != target},
        {name: ours[name] for name in names if ours[name] not in targets},
        {n: ours[n] for n, loaded in names_as_loaded(model, names).items() if ours[n] != loaded},
    )


@pytest.mark.parametrize("name", PUBLISHED_SIGNATURES)
def test_signatures_are_the_published_ones(name):
    parameters = inspect.signature(getattr(queries, name)).parameters.values()
    written = tuple(
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else f"={p.default}")
        for p in parameters
    )
    assert written == PUBLISHED_SIGNATURES[name]


def test_the_published_set_is_kept():
    assert type(queries.MODELS_REQUIRING_TENSOR_MERGING) is set
    assert set(PUBLISHED_SET) == queries.MODELS_REQUIRING_TENSOR_MERGING
    assert isinstance(queries._TRANSFORMERS_AVAILABLE, bool)


@needs_transformers
def test_installed_transformers_is_seen_without_importing_it():
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
def test_without_transformers_every_query_answers_as_published(tmp_path, stub):
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


def test_a_transformers_that_cannot_be_looked_up_counts_as_absent(monkeypatch):
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
def test_tensor_merging_knows_types_the_published_set_misses(model_type):
    if registry.get_checkpoint_conversion_mapping(model_type) is None:
        pytest.skip(f"this transformers has no rules for {model_type}")
    assert queries.requires_tensor_merging(model_type) is True


@pytest.mark.parametrize("model_type", PUBLISHED_SET)
def test_tensor_merging_keeps_the_published_answers(model_type):
    assert queries.requires_tensor_merging(model_type) is True


@pytest.mark.parametrize("model_type", ["llama", "bert", "llava", "no_such_model", "", None])
def test_tensor_merging_is_false_where_only_names_change(model_type):
    assert queries.requires_tensor_merging(model_type) is False


@needs_transformers
def test_a_registered_class_name_is_answered_like_a_type():
    rule = WeightConverter("a.*.w", "a.w", [transformers.MergeModulelist(dim=0)])
    registry.register_checkpoint_conversion_mapping("SomeMergingModel", [rule], overwrite=True)
    try:
        assert queries.requires_tensor_merging("SomeMergingModel") is True
        assert queries.get_checkpoint_conversion_mapping("SomeMergingModel")[0] is not rule
    finally:
        registry._checkpoint_conversion_mapping_cache.pop("SomeMergingModel")
        getattr(registry, "USER_REGISTERED_MAPPINGS", set()).discard("SomeMergingModel")


@needs_transformers
def test_rules_of_a_type_are_the_installed_ones_in_fresh_copies():
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


@needs_transformers
@pytest.mark.parametrize("model_type", RENAMED_TYPES)
def test_names_come_out_as_transformers_renames_them(model_type):
    model = buildable_meta_model(model_type)
    assert wrong_names(model_type, model) == ({}, {}, {})


@needs_transformers
@pytest.mark.sweep
def test_names_come_out_as_transformers_renames_them_for_the_whole_registry():
    wrong, compared = {}, 0
    for model_type in sorted(set(CONFIG_MAPPING_NAMES) - NOT_REVERSIBLE):
        try:
            model = meta_model(model_type)
        except Exception:  # many default configurations build no model; the rest is counted below
            continue
        if not queries.get_model_conversion_mapping(model, add_legacy=False):
            continue
        compared += 1
        problems = wrong_names(model_type, model)
        if any(problems):
            wrong[model_type] = problems
    assert wrong == {}
    assert compared >= 110


@needs_transformers
def test_a_mixture_of_experts_inside_a_vision_language_model_is_seen_through_the_model():
    model = buildable_meta_model("internvl", text_config={"model_type": "qwen3_moe"})
    assert queries.requires_tensor_merging("internvl") is False
    rules = queries.get_model_conversion_mapping(model)
    assert any(isinstance(rule, WeightConverter) for rule in rules)
    assert wrong_names("internvl", model) == ({}, {}, {})
    mapping = queries.get_combined_key_mapping("internvl", model=model)
    expert = "language_model.model.layers.1.mlp.experts.3.{}_proj.weight"
    merged = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert mapping(expert.format("gate")) == mapping(expert.format("up")) == merged
    assert mapping("language_model.model.norm.weight") == "model.language_model.norm.weight"


# By hand, so that an oracle shared with transformers is not the only one.
NAMES_BY_HAND = [
    ("llava", "language_model.model.norm.weight", "model.language_model.norm.weight"),
    ("llava", "language_model.lm_head.weight", "lm_head.weight"),
    ("paligemma", "language_model.model.norm.weight", "model.language_model.norm.weight"),
    ("qwen2_vl", "visual.patch_embed.proj.weight", "model.visual.patch_embed.proj.weight"),
    ("qwen2_vl", "model.norm.weight", "model.language_model.norm.weight"),
    (
        "paligemma",
        "vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.post_layernorm.weight",
    ),
    (
        "inkling2_text",
        "model.llm.attn_res.attn_queries.0",
        "model.layers.1.attention_input.query",
    ),
    (
        "mixtral",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.mlp.gate.weight",
    ),
    (
        "mixtral",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.1.mlp.experts.down_proj",
    ),
]


@needs_transformers
@pytest.mark.parametrize(("model_type", "key", "expected"), NAMES_BY_HAND)
def test_names_known_by_hand(model_type, key, expected):
    mapping = queries.get_combined_key_mapping(model_type, model=buildable_meta_model(model_type))
    assert mapping(key) == expected
    assert mapping(expected) == expected


@needs_transformers
def test_base_model_prefix_and_legacy_names_are_handled_by_the_callable():
    mapping = queries.get_combined_key_mapping("mixtral", model=buildable_meta_model("mixtral"))
    assert mapping("layers.0.input_layernorm.weight") == "model.layers.0.input_layernorm.weight"
    assert mapping("encoder.LayerNorm.gamma") == "encoder.LayerNorm.weight"


@needs_transformers
def test_a_guarded_rename_waits_for_its_guard():
    model = buildable_meta_model("kimi_k25")
    block = "vision_tower.encoder.blocks.0.norm{}.weight"
    layer = "model.vision_tower.layers.0.norm{}.weight"
    in_order = queries.get_combined_key_mapping("kimi_k25", model=model)
    assert [in_order(block.format(i)) for i in (0, 1)] == [layer.format(i) for i in (1, 2)]
    unguarded = queries.get_combined_key_mapping("kimi_k25", model=model)
    assert unguarded(block.format(1)) == layer.format(1)


@needs_transformers
def test_a_renaming_callable_changes_no_rules_of_the_caller():
    model = buildable_meta_model("mixtral")
    rules = queries.get_model_conversion_mapping(model)
    mapping = queries.get_combined_key_mapping("mixtral", model=model)
    assert mapping("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    registered = registry._checkpoint_conversion_mapping_cache["mixtral"]
    assert not any(rule.was_used() for rule in [*rules, *registered])


@needs_transformers
def test_no_rules_and_no_mapping_is_none():
    model = buildable_meta_model("llama")
    assert queries.get_combined_key_mapping("llama") is None
    assert queries.get_combined_key_mapping("llama", model=model) is None
    assert queries.get_combined_key_mapping("llama", {"^a": "b"}, model=model) == {"^a": "b"}


class TestExplicitMappingWins:
    def test_over_a_whole_mapping_of_ours(self):
        explicit = {r"^language_model\.model\.": "mine."}
        mapping = queries.get_combined_key_mapping("gemma3", explicit)
        assert next(iter(mapping.items())) == next(iter(explicit.items()))
        assert read_first_match("language_model.model.norm.weight", mapping) == "mine.norm.weight"
        assert read_first_match("vision_tower.x", mapping) == "model.vision_tower.x"

    def test_over_a_whole_mapping_of_ours_with_other_patterns(self):
        mapping = queries.get_combined_key_mapping("gemma3", {"^vision_tower": "eyes"})
        assert read_first_match("vision_tower.vision_model.x", mapping) == "eyes.vision_model.x"

    def test_it_is_not_changed(self):
        explicit = {"^vision_tower": "eyes"}
        queries.get_combined_key_mapping("gemma3", explicit)["more"] = "entries"
        assert explicit == {"^vision_tower": "eyes"}
        assert "more" not in queries.get_combined_key_mapping("gemma3")

    @needs_transformers
    def test_over_the_rules_of_a_type(self):
        mapping = queries.get_combined_key_mapping("mixtral", {r"\.block_sparse_moe\.": ".moe."})
        assert read_first_match("a.block_sparse_moe.gate.weight", mapping) == "a.moe.gate.weight"

    @needs_transformers
    def test_over_root_rules_with_a_model_and_is_applied_once(self):
        mapping = queries.get_combined_key_mapping(
            "internvl",
            {r"^language_model\.model\.": "model.language_model.", r"^language_model\.": "unused."},
            model=buildable_meta_model("internvl"),
        )
        expected = "model.language_model.layers.0.input_layernorm.weight"
        key = "language_model.model.layers.0.input_layernorm.weight"
        assert read_first_match(key, mapping) == expected
        assert read_first_match(expected, mapping) == expected

    @needs_transformers
    def test_over_class_rules_without_suppressing_the_others(self):
        mapping = queries.get_combined_key_mapping(
            "qwen2_5_vl",
            {r"^model\.embed_tokens\.": "custom_embeddings."},
            model=buildable_meta_model("qwen2_5_vl"),
        )
        assert mapping("model.embed_tokens.weight") == "custom_embeddings.weight"
        assert mapping("model.norm.weight") == "model.language_model.norm.weight"
        assert mapping("visual.merger.ln_q.weight") == "model.visual.merger.ln_q.weight"

    @needs_transformers
    def test_over_a_root_rule_that_takes_its_output(self):
        model = buildable_meta_model("llava")
        plain = queries.get_combined_key_mapping("llava", model=model)
        assert plain("vision_tower.x") == "model.vision_tower.x"
        mapping = queries.get_combined_key_mapping("llava", {"^eyes": "vision_tower"}, model=model)
        assert mapping("eyes.x") == "vision_tower.x"

    @needs_transformers
    def test_and_nested_rules_still_apply_to_its_output(self):
        mapping = queries.get_combined_key_mapping(
            "paligemma",
            {r"^eyes\.": "model.vision_tower."},
            model=buildable_meta_model("paligemma"),
        )
        expected = "model.vision_tower.post_layernorm.weight"
        assert mapping("eyes.vision_model.post_layernorm.weight") == expected

    @needs_transformers
    def test_with_templates_that_a_renaming_rule_cannot_hold(self):
        model = buildable_meta_model("mixtral")
        explicit = {r"^(a)\.(b)\.": r"\2.\1."}
        mapping = queries.get_combined_key_mapping("mixtral", explicit, model=model)
        assert mapping("a.b.weight") == "b.a.weight"

    @needs_transformers
    def test_and_converters_still_name_what_it_renamed(self):
        model = buildable_meta_model("mixtral")
        mapping = queries.get_combined_key_mapping(
            "mixtral", {r"^old\.(\d+)\.moe\.": r"model.layers.\1.mlp."}, model=model
        )
        assert mapping("old.1.moe.experts.0.w3.weight") == "model.layers.1.mlp.experts.gate_up_proj"


def test_gemma3_takes_the_legacy_vision_model_segment_off_first():
    mapping = queries.get_combined_key_mapping("gemma3")
    assert type(mapping) is dict
    embedding = "embeddings.patch_embedding.weight"
    expected = f"model.vision_tower.{embedding}"
    assert read_first_match(f"vision_tower.vision_model.{embedding}", mapping) == expected
    assert read_first_match(f"vision_tower.{embedding}", mapping) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.mm_weight", "model.multi_modal_projector.mm_weight"),
        ("model.vision_tower.x", "model.vision_tower.x"),
    ],
)
def test_gemma3_names_the_other_modules(key, expected):
    assert read_first_match(key, queries.get_combined_key_mapping("gemma3")) == expected


@needs_transformers
def test_gemma3_with_a_model_agrees_with_its_mapping():
    model = buildable_meta_model("gemma3")
    mapping = queries.get_combined_key_mapping("gemma3")
    names = checkpoint_names(model)
    assert {name: read_first_match(name, mapping) for name in names} == names


@needs_transformers
@pytest.mark.parametrize("model_type", ["mixtral", "llava", "kimi_k25", "deepseek_v3", "llama"])
def test_without_a_model_the_answer_is_never_a_callable(model_type):
    mapping = queries.get_combined_key_mapping(model_type)
    assert mapping is None or type(mapping) is dict
    assert all(isinstance(text, str) for pair in (mapping or {}).items() for text in pair)


@needs_transformers
def test_the_mapping_of_a_type_holds_its_renames_at_name_boundaries():
    mapping = queries.get_combined_key_mapping("gemma4_unified")
    key = "vision_embedder.patch_ln1.weight"
    assert read_first_match(key, mapping) == "embed_vision.patch_ln1.weight"
    assert read_first_match("model.norm.weight", mapping) == "model.norm.weight"
    mapping = queries.get_combined_key_mapping("mixtral")
    key = "model.layers.0.block_sparse_moe.gate.weight"
    assert read_first_match(key, mapping) == "model.layers.0.mlp.gate.weight"


@needs_transformers
def test_every_source_of_a_rename_is_in_the_mapping():
    rule = WeightRenaming([r"^a\.", r"^b\."], ["c."])
    registry.register_checkpoint_conversion_mapping("some_renamed_type", [rule], overwrite=True)
    try:
        mapping = queries.get_combined_key_mapping("some_renamed_type")
    finally:
        registry._checkpoint_conversion_mapping_cache.pop("some_renamed_type")
        getattr(registry, "USER_REGISTERED_MAPPINGS", set()).discard("some_renamed_type")
    assert mapping == {r"^a\.": "c.", r"^b\.": "c."}


@needs_transformers
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "vit", "rt_detr", "minimax_m2"])
def test_a_mapping_that_may_be_inexact_warns(model_type):
    with pytest.warns(UserWarning, match=f"{model_type}.*model=model"):
        queries.get_combined_key_mapping(model_type)


@needs_transformers
@pytest.mark.parametrize("model_type", ["mixtral", "llama", "gemma3", "deepseek_v3", "qwen3_moe"])
def test_an_exact_mapping_does_not_warn(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queries.get_combined_key_mapping(model_type)


@needs_transformers
def test_a_callable_does_not_warn():
    model = buildable_meta_model("llava")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(queries.get_combined_key_mapping("llava", model=model))


class Stub:
    """What the load mapping reads of a model, and nothing else."""

    def __init__(self, model_type, checkpoint_conversion_mapping=None):
        self.config = type("Config", (), {"model_type": model_type})()
        if checkpoint_conversion_mapping is not None:
            self._checkpoint_conversion_mapping = checkpoint_conversion_mapping


class TestLoadAndExportNames:
    def test_the_models_own_mapping_is_returned_itself(self):
        own = {r"^foo\.": "bar."}
        assert queries.get_hf_load_key_mapping(Stub("gemma3", own)) is own

    def test_no_model_type_is_none(self):
        assert queries.get_hf_load_key_mapping(object()) is None
        assert queries.get_hf_load_key_mapping(Stub(None)) is None

    @needs_transformers
    def test_the_type_decides_for_a_model_that_is_no_hf_model(self):
        published = ["vision_embedder.patch_ln1.weight", "embed_vision.embedding_projection.weight"]
        held = [
            "embed_vision.patch_ln1.weight",
            "embed_vision.multimodal_embedder.embedding_projection.weight",
        ]
        mapping = queries.get_hf_load_key_mapping(Stub("gemma4_unified"))
        assert [read_first_match(name, mapping) for name in published] == held
        renames = queries.build_hf_export_key_renames(published, mapping)
        assert renames == dict(zip(held, published, strict=True))

    @needs_transformers
    def test_the_class_decides_where_its_rules_are_registered_by_class(self):
        mapping = queries.get_hf_load_key_mapping(buildable_meta_model("qwen2_vl"))
        assert type(mapping) is dict
        assert read_first_match("visual.x", mapping) == "model.visual.x"
        assert read_first_match("model.norm.weight", mapping) == "model.language_model.norm.weight"

    @needs_transformers
    def test_renames_of_nested_models_stay_out_of_a_mapping_that_has_no_scopes(self):
        mapping = queries.get_hf_load_key_mapping(buildable_meta_model("paligemma"))
        assert read_first_match("vision_tower.x", mapping) == "model.vision_tower.x"
        assert read_first_match("vision_model.x", mapping) == "vision_model.x"

    def test_export_names_turn_a_mapping_around_and_leave_the_rest_out(self):
        mapping = {r"^outer\.inner\.": "flat.", r"^kept\.": "renamed."}
        published = ["outer.inner.weight", "kept.weight", "model.layers.0.weight"]
        assert queries.build_hf_export_key_renames(published, mapping) == {
            "flat.weight": "outer.inner.weight",
            "renamed.weight": "kept.weight",
        }

    @needs_transformers
    def test_export_names_turn_a_callable_around(self):
        model = buildable_meta_model("internvl")
        mapping = queries.get_combined_key_mapping("internvl", model=model)
        names = checkpoint_names(model)
        exported = queries.build_hf_export_key_renames(names, mapping)
        assert exported == {target: name for name, target in names.items() if target != name}

    @pytest.mark.parametrize("mapping", [None, {}])
    def test_export_names_without_a_mapping_are_none(self, mapping):
        assert queries.build_hf_export_key_renames(["lm_head.weight"], mapping) == {}

    def test_export_names_refuse_two_sources_and_name_them_all(self):
        mapping = {r"^[ab]\.": "shared.", r"^[cd]\.": "other."}
        with pytest.raises(ValueError, match="ambiguous") as caught:
            queries.build_hf_export_key_renames(["a.w", "b.w", "c.w", "d.w", "e.w"], mapping)
        assert isinstance(caught.value, NameProblems)
        assert caught.value.duplicated == (
            ("shared.w", ("a.w", "b.w")),
            ("other.w", ("c.w", "d.w")),
        )

    def test_export_names_refuse_a_rename_onto_a_published_name(self):
        with pytest.raises(NameProblems, match="ambiguous"):
            queries.build_hf_export_key_renames(["a.w", "shared.w"], {r"^a\.": "shared."})

    def test_export_names_take_a_repeated_name_once(self):
        renames = queries.build_hf_export_key_renames(["a.w", "a.w"], {r"^a\.": "shared."})
        assert renames == {"shared.w": "a.w"}


def rule_texts(model):
    rules = queries.get_model_conversion_mapping(model)
    return [(repr(rule), rule.scope_prefix, rule.base_model_prefix) for rule in rules]


@needs_transformers
class TestWrappedModels:
    @pytest.fixture
    def mesh(self, tmp_path):
        rendezvous = f"file://{tmp_path / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("model_type", ["qwen2_vl", "mixtral", "llava", "paligemma"])
    def test_fully_sharded_models_keep_their_rules(self, mesh, model_type):
        model, plain = buildable_meta_model(model_type), buildable_meta_model(model_type)
        expected = rule_texts(plain)
        names = checkpoint_names(plain)
        for module in reversed(list(model.modules())):
            if isinstance(module, transformers.PreTrainedModel):
                torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        wrapped = [type(module) for module in model.modules()]
        assert type(model).__name__ == "FSDP" + type(plain).__name__
        assert rule_texts(model) == expected
        assert [type(module) for module in model.modules()] == wrapped
        mapping = queries.get_combined_key_mapping(model_type, model=model)
        ours = {name: mapping(name) for name in names}
        assert ours == names_as_loaded(plain, names)
        assert queries.get_hf_load_key_mapping(model) == queries.get_hf_load_key_mapping(plain)

    def test_a_model_inside_a_plain_module_has_its_rules_under_its_prefix(self):
        wrapper = nn.Module()
        wrapper.policy = buildable_meta_model("mixtral")
        rules = queries.get_model_conversion_mapping(wrapper, add_legacy=False)
        assert rules
        assert {rule.scope_prefix for rule in rules} == {"policy"}
        mapping = queries.get_combined_key_mapping("mixtral", model=wrapper)
        key = "policy.model.layers.0.block_sparse_moe.gate.weight"
        assert mapping(key) == "policy.model.layers.0.mlp.gate.weight"

    def test_a_module_without_hf_models_gets_the_mapping_of_the_type(self):
        with_model = queries.get_combined_key_mapping("mixtral", model=nn.Linear(1, 1))
        assert with_model == queries.get_combined_key_mapping("mixtral")

    def test_custom_code_gets_only_rules_it_registered(self):
        if not hasattr(transformers.PreTrainedModel, "is_custom_code"):
            pytest.skip("this transformers does not tell custom code apart")
        plain = buildable_meta_model("qwen2_vl")
        custom = type("OwnQwen2VL", (type(plain),), {"__module__": "somebody.elses"})
        plain.__class__ = custom
        rules = queries.get_model_conversion_mapping(plain, add_legacy=False)
        assert all(rule.scope_prefix is not None for rule in rules)
