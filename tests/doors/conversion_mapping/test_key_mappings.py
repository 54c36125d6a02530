"""Tests of key mappings: explicit ones win, inexact ones warn, and names are loaded and exported by them."""

import warnings

import pytest

from automodel_conv import conversion_mapping as queries
from automodel_conv.errors import NameProblems
from tests.doors.conversion_mapping.support import buildable_meta_model, checkpoint_names, read_first_match

try:
    import transformers
    from transformers import conversion_mapping as registry
    from transformers.core_model_loading import WeightRenaming
except ModuleNotFoundError:
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

# Many of these tests request inexact mappings; one test checks the warning itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*first-match mapping")


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
    def test_over_a_root_rule_that_matches_its_output(self):
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


def test_gemma3_removes_the_legacy_vision_model_segment_first():
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
def test_without_a_model_the_mapping_is_never_a_callable(model_type):
    mapping = queries.get_combined_key_mapping(model_type)
    assert mapping is None or type(mapping) is dict
    assert all(isinstance(text, str) for pair in (mapping or {}).items() for text in pair)


@needs_transformers
def test_mapping_of_a_type_renames_only_at_name_boundaries():
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
    """The attributes of a model that the load mapping reads, and no others."""

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
    def test_type_determines_the_mapping_of_other_models(self):
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
    def test_rules_registered_by_class_apply_to_the_class(self):
        mapping = queries.get_hf_load_key_mapping(buildable_meta_model("qwen2_vl"))
        assert type(mapping) is dict
        assert read_first_match("visual.x", mapping) == "model.visual.x"
        assert read_first_match("model.norm.weight", mapping) == "model.language_model.norm.weight"

    @needs_transformers
    def test_renames_of_nested_models_stay_out_of_a_mapping_that_has_no_scopes(self):
        mapping = queries.get_hf_load_key_mapping(buildable_meta_model("paligemma"))
        assert read_first_match("vision_tower.x", mapping) == "model.vision_tower.x"
        assert read_first_match("vision_model.x", mapping) == "vision_model.x"

    def test_export_names_invert_a_mapping_and_omit_the_rest(self):
        mapping = {r"^outer\.inner\.": "flat.", r"^kept\.": "renamed."}
        published = ["outer.inner.weight", "kept.weight", "model.layers.0.weight"]
        assert queries.build_hf_export_key_renames(published, mapping) == {
            "flat.weight": "outer.inner.weight",
            "renamed.weight": "kept.weight",
        }

    @needs_transformers
    def test_export_names_invert_a_callable(self):
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

    def test_export_names_accept_a_repeated_name_once(self):
        renames = queries.build_hf_export_key_renames(["a.w", "a.w"], {r"^a\.": "shared."})
        assert renames == {"shared.w": "a.w"}
