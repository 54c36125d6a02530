"""The ``config.json`` of published families, with small sizes: hidden size 384, 12 experts, two or three layers.

Names, spellings and settings are the published ones. Sizes that blocks of 128 divide when published stay multiples of
128, so that a published quantization fits; the latents of DeepSeek's attention do not, as when published. What the
classes of transformers take by default is left out, like everything that no weight depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

HIDDEN = 384
INTERMEDIATE = 128
LAYERS = 3

_COMMON = {"hidden_size": HIDDEN, "vocab_size": 131, "num_hidden_layers": LAYERS, "pad_token_id": 0}
_TEXT = _COMMON | {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
_EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
_LATENT_ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,  # kv_a_proj_with_mqa has 160 rows: not whole blocks, like the published 576
    "v_head_dim": 64,
}
_DEEPSEEK_EXPERTS = {
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INTERMEDIATE,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
_INDEXER = {"index_head_dim": 64, "index_n_heads": 4, "index_topk": 8}


def deepseek_v3(**changes: Any) -> Config:
    config = _TEXT | _LATENT_ATTENTION | _DEEPSEEK_EXPERTS
    config |= {"intermediate_size": 512, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_nextn_predict_layers": 1}
    return config | changes


def deepseek_v32() -> Config:
    return deepseek_v3(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"], **_INDEXER)


def deepseek_v4(**changes: Any) -> Config:
    config = _TEXT | _DEEPSEEK_EXPERTS | _INDEXER
    config |= {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "expert_dtype": "fp4"}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "qk_rope_head_dim": 64}
    config |= {"q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 2, "hc_mult": 4, "sliding_window": 8}
    config |= {"num_hash_layers": 1, "compress_ratios": [0, 4, 128, 0], "num_nextn_predict_layers": 1}
    return config | {"scoring_func": "sqrtsoftplus"} | changes


def glm_moe_dsa() -> Config:
    names = {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}
    return deepseek_v3(**names, **_INDEXER, n_group=1, topk_group=1, head_dim=64, qk_head_dim=96)


def kimi_k2(**changes: Any) -> Config:
    return deepseek_v3(model_type="kimi_k2", n_group=1, topk_group=1, num_nextn_predict_layers=0) | changes


def kimi_k25(text_type: str = "kimi_k2") -> Config:
    vision = {"vt_hidden_size": 64, "mm_hidden_size": 64, "vt_intermediate_size": 96, "vt_num_attention_heads": 4}
    vision |= {"vt_num_hidden_layers": 2, "text_hidden_size": HIDDEN, "patch_size": 14, "merge_kernel_size": [2, 2]}
    vision |= {"init_pos_emb_height": 4, "init_pos_emb_width": 4, "init_pos_emb_time": 4}
    # transformers 5.24.0 does not read these names, and takes its defaults, which are the published sizes.
    vision |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision |= {"pos_emb_height": 4, "pos_emb_width": 4}
    names = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "dtype": "bfloat16"}
    return names | {"text_config": kimi_k2(model_type=text_type), "vision_config": vision, "tie_word_embeddings": False}


def mixtral() -> Config:
    config = _TEXT | _EIGHT_HEADS | {"intermediate_size": INTERMEDIATE, "num_local_experts": 8}
    return config | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}


_QWEN_EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}


def qwen3_moe() -> Config:
    config = _TEXT | _EIGHT_HEADS | _QWEN_EXPERTS
    config |= {"intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return config | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


def _qwen_vision(**changes: Any) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": HIDDEN}
    return vision | {"num_position_embeddings": 16, "patch_size": 16, "temporal_patch_size": 2} | changes


def qwen3_vl_moe() -> Config:
    dropped = ("torch_dtype", "tie_word_embeddings", "architectures")
    text = {key: value for key, value in qwen3_moe().items() if key not in dropped}
    text |= {"model_type": "qwen3_vl_moe_text", "dtype": "bfloat16"}
    vision = _qwen_vision(model_type="qwen3_vl_moe", deepstack_visual_indexes=[0, 1])
    names = {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    return names | {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


def qwen3_5_moe_text(**changes: Any) -> Config:
    config = _COMMON | _QWEN_EXPERTS | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config |= {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 256, "attn_output_gate": True}
    config |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64}
    config |= {"linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32"}
    config |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "full_attention_interval": 4}
    return config | {"dtype": "bfloat16", "mlp_only_layers": [], "mtp_num_hidden_layers": 1} | changes


def qwen3_5_moe() -> Config:
    vision = _qwen_vision(model_type="qwen3_5_moe", deepstack_visual_indexes=[])
    names = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    return names | {"text_config": qwen3_5_moe_text(), "vision_config": vision, "tie_word_embeddings": False}


def minimax_m2() -> Config:
    config = _TEXT | _EIGHT_HEADS | {"intermediate_size": INTERMEDIATE, "num_local_experts": 12, "rotary_dim": 32}
    config |= {"model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "num_experts_per_tok": 2}
    config |= {"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid"}
    return config | {"use_mtp": True, "mtp_transformer_layers": 1, "num_mtp_modules": 3, "shared_intermediate_size": 0}


def minimax_m3_vl() -> Config:
    text = _COMMON | _EIGHT_HEADS | {"intermediate_size": INTERMEDIATE, "num_local_experts": 12, "rotary_dim": 32}
    text |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "dense_intermediate_size": 512}
    text |= {"shared_intermediate_size": INTERMEDIATE, "use_routing_bias": True, "scoring_func": "sigmoid"}
    text |= {"moe_layer_freq": [0, 1, 1], "num_mtp_modules": 1, "use_qk_norm": True, "qk_norm_type": "per_head"}
    sparse = {"use_sparse_attention": True, "sparse_index_dim": 64, "sparse_num_index_heads": 4}
    sparse |= {"sparse_topk_blocks": 2, "sparse_block_size": 8, "sparse_attention_freq": [0, 1, 1]}
    sparse |= {"sparse_disable_index_value": [0, 1, 1], "sparse_init_block": 0, "sparse_local_block": 1}
    text |= {"sparse_attention_config": sparse, "tie_word_embeddings": False, "partial_rotary_factor": 0.5}
    vision = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    vision |= {"patch_size": 14, "image_size": 56, "projection_dim": HIDDEN, "model_type": "clip_vision_model"}
    names = {"model_type": "minimax_m3_vl", "architectures": ["MiniMaxM3SparseForConditionalGeneration"]}
    names |= {"dtype": "bfloat16", "projector_hidden_size": HIDDEN}
    return names | {"text_config": text, "vision_config": vision}


def step3p7() -> Config:
    text = _COMMON | _EIGHT_HEADS | {"intermediate_size": 512, "moe_intermediate_size": INTERMEDIATE}
    text |= {"share_expert_dim": INTERMEDIATE, "n_routed_experts": 12, "num_experts_per_tok": 2, "sliding_window": 8}
    text |= {"moe_layers_enum": "1,2", "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    vision = {"width": 64, "layers": 2, "heads": 4, "image_size": 56, "patch_size": 14, "mlp_ratio": 1.5}
    names = {"model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"], "dtype": "bfloat16"}
    return names | {"text_config": text, "vision_config": vision}


def mimo_v2_flash() -> Config:
    config = _TEXT | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96, "v_head_dim": 64}
    config |= {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_head_dim": 96, "swa_v_head_dim": 64}
    config |= {"intermediate_size": 512, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": 12}
    config |= {"n_shared_experts": None, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config |= {"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "scoring_func": "sigmoid"}
    config |= {"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "sliding_window": 8}
    config |= {"partial_rotary_factor": 0.334, "swa_rope_theta": 10000, "rope_theta": 5000000, "attention_bias": False}
    return config | {"model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"]}


def nemotron_h(**changes: Any) -> Config:
    config = _TEXT | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4}
    config |= {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "MEM*"}
    config |= {"intermediate_size": INTERMEDIATE, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": 12}
    config |= {"moe_shared_expert_intermediate_size": 256, "n_shared_experts": 1, "num_experts_per_tok": 2}
    config |= {"n_group": 1, "topk_group": 1, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 2}
    config |= {"ssm_state_size": 32, "conv_kernel": 4, "expand": 2, "use_conv_bias": True, "chunk_size": 8}
    return config | changes


def gemma4() -> Config:
    text = _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128}
    text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 12}
    text |= {"top_k_experts": 2, "intermediate_size": 256, "moe_intermediate_size": INTERMEDIATE}
    text |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "tie_word_embeddings": True}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
    text |= {"model_type": "gemma4_text", "vocab_size_per_layer_input": 131, "dtype": "bfloat16"}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 16}
    vision |= {"model_type": "gemma4_vision", "standardize": True, "patch_size": 16, "pooling_kernel_size": 3}
    names = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "dtype": "bfloat16"}
    return names | {"text_config": text, "vision_config": vision, "audio_config": None, "tie_word_embeddings": True}


def granitemoe() -> Config:
    config = _TEXT | {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": INTERMEDIATE}
    config |= {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "tie_word_embeddings": True}
    return config | {"num_local_experts": 12, "num_experts_per_tok": 2}


def llama4(**changes: Any) -> Config:
    text = _COMMON | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 1}
    text |= {"model_type": "llama4_text", "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 512}
    text |= {"num_local_experts": 4, "interleave_moe_layer_step": 1, "use_qk_norm": True, "dtype": "bfloat16"}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "image_size": 56}
    vision |= {"model_type": "llama4_vision_model", "patch_size": 14}
    names = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    return names | {"text_config": text | changes, "vision_config": vision}


def gpt_oss() -> Config:
    config = _TEXT | _EIGHT_HEADS | {"intermediate_size": INTERMEDIATE, "num_local_experts": 8}
    config |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True}
    config |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_experts_per_tok": 2}
    return {key: value for key, value in config.items() if key != "torch_dtype"}


def inkling2_loop() -> Config:
    config = {"model_type": "inkling2_loop_text", "architectures": ["Inkling2LoopForCausalLM"], "dtype": "bfloat16"}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "swa_num_attention_heads": 2}
    config |= {"swa_num_key_value_heads": 1, "swa_head_dim": 16, "sliding_window_size": 8, "num_hidden_layers": 4}
    config |= {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_gate_rank": 4, "d_rel": 4, "rel_extent": 8}
    config |= {"n_layers_per_attn_res_block": 1, "moe_intermediate_size": 32, "n_routed_experts": 12}
    config |= {"num_experts_per_tok": 1, "vocab_size": 40, "unpadded_vocab_size": 37, "hidden_size": 64}
    return config | {"eos_token_id": 1}


def qwen4_exp_text() -> Config:
    config = _COMMON | _QWEN_EXPERTS | {"num_attention_heads": 6, "head_dim": 16, "dtype": "bfloat16"}
    config |= {"model_type": "qwen4_exp_text", "architectures": ["Qwen4ExpForCausalLM"], "eos_token_id": 2}
    config |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "hc_count": 3}
    config |= {"linear_key_head_dim": 10, "linear_value_head_dim": 14, "linear_num_key_heads": 2, "hc_lowrank": 10}
    config |= {"linear_num_value_heads": 4, "shared_expert_intermediate_size": 128, "ple_layer_ids": [1]}
    config |= {"ple_embed_dim": 48, "heads_per_ngram": 2, "ngram_vocab_size_base": 40, "split_ngram_parts": 12}
    config |= {"make_ngram_vocab_size_divisible_by": 12, "indexer_n_heads": 5, "indexer_kv_heads": 1}
    return config | {"indexer_head_dim": 20, "indexer_budget": 8, "indexer_compress_ratio": 2}
