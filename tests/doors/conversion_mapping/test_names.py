"""Tests that rule queries rename names as transformers does.

The oracle reverses the direction: transformers reverts the state dict of a model on the meta device to checkpoint
names, and returns a tensor that is only renamed as the same object. This determines the model name of each checkpoint
name without a forward renaming.
"""

import pytest
import torch
from torch import nn

from automodel_conv import conversion_mapping as queries
from tests.doors.conversion_mapping.support import buildable_meta_model, checkpoint_names, meta_model, read_first_match

try:
    import transformers
    from transformers import conversion_mapping as registry
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
except ModuleNotFoundError:
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

# Many of these tests request inexact mappings; one test checks the warning itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*first-match mapping")

RENAMED_TYPES = (
    "llava llava_next llava_onevision internvl paligemma mistral3 got_ocr2 vipllava video_llava "
    "gemma3 qwen2_vl qwen2_5_vl qwen2_audio gemma4_unified fuyu kimi_k25 inkling_mm_model "
    "inkling2 inkling2_text mixtral minimax_m2 deepseek_v2 deepseek_v3 deepseek_v4 qwen2_moe "
    "qwen3_moe qwen3_next qwen3_vl_moe ernie4_5_vl_moe nemotron_h jamba phimoe longcat_flash "
    "rt_detr vit clip siglip colqwen2"
).split()


# The reversal omits prefix changes, so these types do not round-trip.
NOT_REVERSIBLE = {"shieldgemma2"}


def names_as_loaded(model, names):
    """Return ``names`` as the mapping stage of transformers' loader renames them."""
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
    """Return names that differ from the reversal, that the model lacks, and that differ from the loader's."""
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


@needs_transformers
@pytest.mark.parametrize("model_type", RENAMED_TYPES)
def test_names_are_renamed_as_by_transformers(model_type):
    model = buildable_meta_model(model_type)
    assert wrong_names(model_type, model) == ({}, {}, {})


@needs_transformers
@pytest.mark.sweep
def test_names_are_renamed_as_by_transformers_for_the_whole_registry():
    wrong, compared = {}, 0
    for model_type in sorted(set(CONFIG_MAPPING_NAMES) - NOT_REVERSIBLE):
        try:
            model = meta_model(model_type)
        except Exception:  # many default configs build no model; `compared` counts the others
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
def test_experts_inside_a_vision_language_model_get_rules_from_the_model():
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


# Written by hand, so that not every oracle is shared with transformers.
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

    def test_model_inside_a_plain_module_gets_prefixed_rules(self):
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
            pytest.skip("this transformers does not distinguish custom code")
        plain = buildable_meta_model("qwen2_vl")
        custom = type("OwnQwen2VL", (type(plain),), {"__module__": "somebody.elses"})
        plain.__class__ = custom
        rules = queries.get_model_conversion_mapping(plain, add_legacy=False)
        assert all(rule.scope_prefix is not None for rule in rules)
