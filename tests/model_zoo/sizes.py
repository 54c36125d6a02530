"""Sizes that make a config small: attribute names and their small values, as data."""

from __future__ import annotations

from typing import Any

# Small value of every size attribute, by field name. It replaces a default that is a number or a
# list; `None` and 0 defaults stay, because they mean "derived" or "absent". Sizes that can meet in
# one tensor differ pairwise (2 * I and n_shared * I included), so a swapped axis changes a shape.
# 12 experts: the natural and the lexicographic order of expert numbers differ.
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "unpadded_vocab_size": 127,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 44,
    "ffn_hidden_size": 44,
    "dense_intermediate_size": 52,
    "moe_intermediate_size": 28,
    "expert_ffn_hidden_size": 28,
    "shared_expert_intermediate_size": 36,
    "shared_experts_intermediate_size": 36,
    "moe_shared_expert_intermediate_size": 36,
    "shared_intermediate_size": 36,
    "share_expert_dim": 36,
    "num_experts": 12,
    "n_routed_experts": 12,
    "num_local_experts": 12,
    "moe_num_experts": 12,
    "zero_expert_num": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 3,
    "num_shared_experts": 3,
    "moe_num_shared_experts": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 22,
    "kv_lora_rank": 26,
    "o_lora_rank": 18,
    "o_groups": 2,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "index_head_dim": 20,
    "index_n_heads": 5,
    "index_topk": 4,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_num_heads": 5,
    "linear_head_dim": 10,
    "mamba_d_state": 10,
    "mamba_num_heads": 8,
    "mamba_head_dim": 10,
    "ssm_state_size": 18,
    "n_groups": 2,
    "chunk_size": 8,
    "hc_mult": 3,
    "hc_count": 3,
    "hc_lowrank": 10,
    "rel_extent": 7,
    "d_rel": 10,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
}

# The same for configs of vision and audio towers (by their class name), where they differ.
TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 5,
    "num_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 34,
    "out_hidden_size": 48,
    "text_hidden_size": 48,
    "projection_intermediate_size": 38,
    "num_position_embeddings": 16,
    "image_size": 28,
    "patch_size": 7,
    "d_model": 40,
    "encoder_layers": 2,
    "encoder_attention_heads": 5,
    "encoder_ffn_dim": 34,
    "downsample_hidden_size": 18,
    "output_dim": 48,
    "max_source_positions": 16,
    "n_window": 4,
    "num_mel_bins": 16,
    "adapter_out_dim": 48,
}

_INTERMEDIATE = (
    "intermediate_size",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_OF_ONE = ("num_experts_per_tok", "moe_k", "moe_topk", "n_group", "topk_group")


def _equal_sizes(hidden: int) -> dict[str, dict[str, Any]]:
    def intermediate(size: int) -> dict[str, Any]:
        return dict.fromkeys(_INTERMEDIATE, size)

    def experts(size: int) -> dict[str, Any]:
        return dict.fromkeys(_EXPERTS if size > 1 else (*_EXPERTS, *_OF_ONE), size)

    return {
        "2I == H": intermediate(hidden // 2),
        "I == H": intermediate(hidden),
        "E == I": intermediate(12),
        "E == I == H": experts(hidden) | intermediate(hidden),
        "E == 1, 2I == H": experts(1) | intermediate(hidden // 2),
        "I == 1": intermediate(1),
    }


# Sizes with which one axis may be mistaken for another without an error, by the equal sizes: they replace those above.
# E experts, I their intermediate size, H the hidden size. The second part is of towers.
EQUAL_SIZES = _equal_sizes(SIZES["hidden_size"])
TOWER_EQUAL_SIZES = _equal_sizes(TOWER_SIZES["hidden_size"])

# Types whose configs refuse sizes, by a part of the equality, with the text of the error.
UNEQUAL: dict[str, tuple[str, str]] = {
    "Dots3NoteTextModel": ("E == 1", "Grouped routing requires at least two experts"),
    "dots3_note_vision_encoder": ("E == 1", "Grouped routing requires at least two experts"),
}

# Set in every config that has the field, whatever its default: a dense layer first, MoE layers after.
ALWAYS: dict[str, Any] = {
    "mlp_only_layers": [0],
}

# Values that the tables above do not cover, by model type of a (sub-)config, or by class name if it has no type. Names
# that are not fields are passed on as keyword arguments: older spellings that the config itself accepts.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_experts_per_tok": 2,
    },
    "deepseek_ocr2_sam_vision_model": {"output_channels": 18, "downsample_channels": [22, 40]},
    "unlimited_ocr_sam_vision_model": {"output_channels": 18, "downsample_channels": [22, 40]},
    "dinov2": {"use_swiglu_ffn": True},
    "dinov2_with_registers": {"use_swiglu_ffn": True},
    "dots1": {"n_routed_experts": 12, "n_shared_experts": 3, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_key_value_heads": 6,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 22,
        "swa_kv_lora_rank": 26,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 14,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 40,
        "num_hidden_layers": 3,
        "pyramid_num_routed": [-1, 4, 12],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 40, "feature_size": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [28, 20],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "glm5_next_text": {
        "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "num_key_value_heads": 6,
        "index_kpool": 2,
    },
    "gradium_phonon_tts": {"latent_dim": 18, "audio_prompt_dim": 22},
    "GradiumPhononTTSFlowHeadConfig": {
        "latent_dim": 18,
        "condition_dim": 48,
        "hidden_size": 40,
        "frequency_embedding_size": 24,
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_gate_rank": 6,
    },
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 4},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 3,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "minimax_m3_vl": {"projector_hidden_size": 38},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "text_hidden_size": 48},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 40, "hidden_size": 18},
    "nemotron3_5_transcribe_word_timestamp": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "blank_token_id": 0,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_omni_moe_vision_encoder": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 36},
    "Qwen3OmniMoeTalkerConfig": {
        "spatial_merge_size": 2,
        "num_code_groups": 4,
        "thinker_hidden_size": 48,
    },
    "qwen3_omni_moe_talker_code_predictor": {"num_code_groups": 4},
    "Qwen3OmniMoeCode2WavConfig": {
        "codebook_size": 18,
        "num_quantizers": 4,
        "decoder_dim": 64,
        "num_key_value_heads": 6,
        "upsample_rates": [2, 3],
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 40,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 12,
        "split_ngram_parts": 12,
        "indexer_n_heads": 5,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 20,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "radio": {"max_img_size": 56},
    "rf_detr": {
        "d_model": 40,
        "decoder_ffn_dim": 34,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 5,
        "num_queries": 7,
        "group_detr": 3,
    },
    "rf_detr_dinov2": {"num_windows": 2},
    "sapiens2_head": {"upsample_out_channels": [18, 22], "conv_out_channels": [14]},
    "step3p5": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "tipsv2_vision_model": {"use_swiglu_ffn": True, "hidden_size": 48, "num_attention_heads": 6},
}

# Models in addition to the registry's own, by names of this package: model type and changes to its config.
EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "llava+qwen3_moe": ("llava", {"text_config": "qwen3_moe"}),
    "internvl+qwen3_moe": ("internvl", {"text_config": "qwen3_moe"}),
    "mistral3+mixtral": ("mistral3", {"text_config": "mixtral"}),
    "gpt_oss": ("gpt_oss", {}),
    "llama": ("llama", {}),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "qwen4_exp": ("qwen4_exp", {}),
    "inkling2": ("inkling2", {}),
    "qwen2_moe-tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "olmoe-tied": ("olmoe", {"tie_word_embeddings": True}),
    "deepseek_v3-tied": ("deepseek_v3", {"tie_word_embeddings": True}),
}

# Published with these tensors transposed (dims 1 and 2), which `save_pretrained` does not do: the reverse of
# `Transpose(check_dims=True)` compares with the model's shape and so changes nothing.
TRANSPOSED_ON_DISK: dict[str, str] = {
    "qwen3_vl_moe": r"mlp\.experts\.(gate_up|down)_proj$",
}
