"""Small checkpoints of architectures that vLLM loads, with their published names, as data.

A model is the default config of the class of transformers with small sizes, those of ``tests/model_zoo``. Its tensors
are written under the names of published checkpoints. What transformers does not write is divided, see ``divided.py``.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import transformers
from safetensors.torch import save_file

from tests.model_zoo import DTYPE, fill, published_tensors, small_config
from tests.vllm.divided import Division, write_divided


class Case(NamedTuple):
    """How a checkpoint differs from the default, and what a load of it reports.

    changes: values of the config of transformers, by name; a dict changes that part.
    added: values that only published configs have, and vLLM reads; a dict is added to that part.
    dropped: tensors that published checkpoints do not have, as a regex.
    computed: targets that vLLM's code computes, as a regex.
    left_out: tensors that vLLM does not load, as a regex.
    divided: how vLLM's own model is divided to a checkpoint, if transformers does not write it.
    """

    changes: Mapping[str, Any] = MappingProxyType({})
    added: Mapping[str, Any] = MappingProxyType({})
    dropped: str | None = None
    computed: str | None = None
    left_out: str | None = None
    divided: Division | None = None


_SIGMOID = {"topk_method": "noaux_tc"}
_MIMO = {
    "hybrid_layer_pattern": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "layernorm_epsilon": 1e-5,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 14,
    "v_head_dim": 14,
    "add_swa_attention_sink_bias": True,
    "sliding_window_size": 8,
}
_MAMBA = r"(mixer|mamba)\.A$"

_GEMMA = {
    "enable_moe_block": True,
    "moe_intermediate_size": 28,
    "num_experts": 12,
    "top_k_experts": 2,
    "vocab_size_per_layer_input": 131,
}

MOE: dict[str, Case] = {
    "AXK1ForCausalLM": Case({"first_k_dense_replace": 0}),
    "AfmoeForCausalLM": Case(added={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
    "AriaForConditionalGeneration": Case(left_out=r"vision_tower\.post_layernorm\."),
    "Cohere2MoeForCausalLM": Case(),
    "DeepseekV2ForCausalLM": Case(),
    "DeepseekV32ForCausalLM": Case(added=_SIGMOID),
    "DeepseekV3ForCausalLM": Case(added=_SIGMOID),
    "Ernie4_5_MoeForCausalLM": Case(),
    "Qwen3OmniMoeForConditionalGeneration": Case(
        added={
            "thinker_config": {
                "vision_config": {"image_size": 28, "apply_vit_abs_pos_embed": True},
                "text_config": {"tie_word_embeddings": False},
            }
        },
        left_out="^(talker|code2wav)\\.",
    ),
    "ExaoneMoeForCausalLM": Case(),
    "FlexOlmoForCausalLM": Case(),
    "Gemma4ForCausalLM": Case(_GEMMA),
    "Gemma4ForConditionalGeneration": Case({"text_config": _GEMMA}),
    "Glm4MoeForCausalLM": Case(added={"head_dim": 8, "use_qk_norm": False}),
    "Glm4MoeLiteForCausalLM": Case(added={"first_k_dense_replace": 1}),
    "Glm4vMoeForConditionalGeneration": Case(added={"text_config": {"head_dim": 8, "use_qk_norm": False}}),
    "GlmMoeDsaForCausalLM": Case(added=_SIGMOID),
    "GptOssForCausalLM": Case(),
    "GraniteMoeForCausalLM": Case(),
    "GraniteMoeHybridForCausalLM": Case(
        {
            "mamba_n_heads": 6,
            "mamba_d_head": 16,
            "mamba_d_state": 10,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention", "mamba"],
        },
        computed=_MAMBA,
    ),
    "GraniteMoeSWAForCausalLM": Case(),
    "GraniteMoeSharedForCausalLM": Case(),
    "HYV3ForCausalLM": Case(
        added={"first_k_dense_replace": 1, "expert_hidden_dim": 28, "route_norm": True, "qk_norm": True}
    ),
    "HunYuanMoEV1ForCausalLM": Case(),
    "JambaForCausalLM": Case(computed=_MAMBA),
    "LagunaForCausalLM": Case(left_out="e_score_correction_bias$"),
    "Lfm2MoeForCausalLM": Case(),
    "Llama4ForCausalLM": Case(),
    "Llama4ForConditionalGeneration": Case(),
    "LongcatFlashForCausalLM": Case(
        added={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
            "intermediate_size": 44,
            "moe_intermediate_size": 28,
        },
        dropped=r"experts\.1[2-9]\.",  # the four experts that only pass on what they get
        computed=r"_a_layernorm\.weight$",
    ),
    "MiMoV2FlashForCausalLM": Case(added=_MIMO),
    "MiniMaxM2ForCausalLM": Case(added={"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True}),
    "MixtralForCausalLM": Case(),
    "NemotronHForCausalLM": Case({"n_shared_experts": 1}, computed=_MAMBA),
    "OlmoeForCausalLM": Case(),
    "Qwen2MoeForCausalLM": Case(),
    "Qwen3MoeForCausalLM": Case(),
    "Qwen3NextForCausalLM": Case(),
    "Qwen3VLMoeForConditionalGeneration": Case(added={"text_config": {"norm_topk_prob": True}}),
    "Qwen3_5MoeForCausalLM": Case(),
    "Qwen3_5MoeForConditionalGeneration": Case(),
}

_BY_NUMBER = ("experts.{}.w1", "experts.{}.w3", "experts.{}.w2")
_STACKED = ("gate_proj", "up_proj", "down_proj")
_STEP = {"moe_layers_enum": "1,2", "norm_expert_weight": True}

_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2],
    "num_heads": 6,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]

DIVIDED: dict[str, Case] = {
    "AliceAIForCausalLM": Case(
        divided=Division(
            "alice_ai",
            {
                "kda_allow_negative_eigenvalues": False,
                "router_score_function": "sigmoid",
                "router_bias_correction": True,
                "linear_conv_kernel_dim": 4,
                "block_attn_res_block_size": 2,
                "layer_types": _LINEAR,
                "linear_num_value_heads": 2,
                "linear_value_head_dim": 10,
            },
        )
    ),
    "DeepseekV4ForCausalLM": Case(
        divided=Division(
            None,
            {"head_dim": 512, "index_head_dim": 128, "qk_rope_head_dim": 64},
            _BY_NUMBER,
            {"fused_wkv_wgate": ["wkv", "wgate"]},
            {
                r"^model\.embed_tokens": "embed",
                r"^model\.": "",
                "^lm_head": "head",
                r"shared_experts\.down_proj": "shared_experts.w2",
            },
        )
    ),
    "Glm5NextForCausalLM": Case(
        divided=Division(
            "glm5_next_text_of_vllm",
            {
                "num_key_value_heads": 6,
                "mhc": None,
                "layer_types": _LINEAR,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "linear_conv_kernel_dim": 4,
                "linear_head_dim": 16,
                "linear_num_heads": 6,
                "mla_use_nope": False,
                "num_nextn_predict_layers": 0,
                "swiglu_limit": None,
                "linear_lower_bound": -5.0,
                "index_topk": None,
                "index_kpool": 1,
            },
        )
    ),
    "KimiLinearForCausalLM": Case(
        divided=Division(
            "kimi_linear",
            {
                "linear_attn_config": _KDA,
                "mla_use_nope": True,
                "num_experts_per_token": 2,
                "q_lora_rank": None,
                "moe_router_activation_func": "sigmoid",
                "moe_renormalize": True,
                "num_expert_group": 1,
                "use_grouped_topk": True,
                "num_shared_experts": 1,
            },
            _BY_NUMBER,
            {"conv1d": ["q_conv1d", "k_conv1d", "v_conv1d"]},
        )
    ),
    "MiniMaxM3SparseForCausalLM": Case(
        divided=Division(
            "minimax_m3_text",
            {
                "rotary_dim": 8,
                "partial_rotary_factor": 0.5,
                "shared_intermediate_size": 36,
                "moe_layer_freq": [0, 1, 1],
                "swiglu_alpha": 1.7,
                "swiglu_beta": 1.0,
                "swiglu_limit": 7.0,
                "use_gemma_norm": True,
                "hidden_act": "swigluoai",
                "use_routing_bias": True,
                "n_shared_experts": 1,
                "qk_norm_type": "per_head",
                "attention_output_gate": False,
            },
            _BY_NUMBER,
        )
    ),
    "BailingMoeForCausalLM": Case(divided=Division("bailing_moe")),
    "BailingMoeV2ForCausalLM": Case(divided=Division("bailing_moe_v2")),
    "BailingMoeV2_5ForCausalLM": Case(divided=Division("bailing_moe_linear", {"layer_group_size": 2})),
    "BailingMoeV3ForCausalLM": Case(
        divided=Division("bailing_moe_v3", {"layer_group_size": 2, "short_conv_kernel_size": 4, "no_kda_lora": True})
    ),
    "BeamForCausalLM": Case(divided=Division("beam")),
    "DeepseekForCausalLM": Case(divided=Division("deepseek")),
    "HYV4ForCausalLM": Case(divided=Division(None, renamed={r"(hc_fn|hc_head_fn)\.weight": r"\1"})),
    "K2HorizonForCausalLM": Case(
        divided=Division(
            "k2_horizon",
            {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [0],
                "rope_head_dim": 8,
                "attention_gate_func": "sigmoid",
                "layernorm_num_groups": 1,
                "moe_gate_bias": False,
                "mova_num_experts": 4,
                "mova_num_experts_per_tok": 2,
                "query_key_norm": True,
                "router_scaling_factor": 1.0,
                "router_score_func": "sigmoid",
            },
        )
    ),
    "MiMoV2ForCausalLM": Case(divided=Division("mimo_v2", _MIMO)),
    "MiniCPMForCausalLM": Case(
        divided=Division("minicpm", {"scale_emb": 1, "scale_depth": 1.0, "dim_model_base": 16}, _BY_NUMBER)
    ),
    "MistralLarge3ForCausalLM": Case(divided=Division("mistral_large_3")),
    "PanguEmbeddedForCausalLM": Case(divided=Division("PanguEmbedded")),
    "PanguProMoEV2ForCausalLM": Case(divided=Division("PanguProMoE")),
    "PanguUltraMoEForCausalLM": Case(divided=Division("pangu_ultra_moe")),
    "Param2MoEForCausalLM": Case(divided=Division("param2moe")),
    "PhiMoEForCausalLM": Case(divided=Division("phimoe", experts=_BY_NUMBER)),
    "SarvamMLAForCausalLM": Case(divided=Division("sarvam_mla"), computed=r"e_score_correction_bias$"),
    "SarvamMoEForCausalLM": Case(divided=Division("sarvam_moe")),
    "Step3TextForCausalLM": Case(
        divided=Division(
            "step3_text",
            {**_STEP, "share_q_dim": 16},
            _STACKED,
            {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]},
        )
    ),
    "Step3p5ForCausalLM": Case(
        divided=Division(
            "step3p5_text",
            {
                **_STEP,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "swiglu_limits": [None] * 3,
                "swiglu_limits_shared": [None] * 3,
                "use_moe_router_bias": True,
                "need_fp32_gate": True,
                "moe_router_scaling_factor": 1.0,
            },
            _STACKED,
            renamed={r"\.moe\.share_expert": ".share_expert"},
        )
    ),
}

DENSE: dict[str, Case] = {
    "BloomForCausalLM": Case(),
    "CohereForCausalLM": Case(),
    "FalconH1ForCausalLM": Case(computed=_MAMBA),
    "FalconMambaForCausalLM": Case(computed=_MAMBA),
    "Gemma3ForCausalLM": Case(),
    "Gemma4UnifiedForConditionalGeneration": Case({"text_config": {"vocab_size_per_layer_input": 131}}),
    "GemmaForCausalLM": Case(),
    "LlamaForCausalLM": Case(),
    "MambaForCausalLM": Case(computed=_MAMBA),
    "Phi3ForCausalLM": Case(),
    "Qwen2ForCausalLM": Case({"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": Case(),
    "Qwen3_5ForCausalLM": Case(),
    "Qwen3_5ForConditionalGeneration": Case(),
}

_KERNELS = "its modules import compiled kernels: "
_VALUES = "its config needs values that neither transformers nor the common ones have, first: "

NOT_BUILT: dict[str, str] = {
    "DbrxForCausalLM": "transformers 5.17 does not build it: its config of attention has no rope_theta",
    "DeepseekV41ForCausalLM": _VALUES + "vision_n_heads",
    "DeepseekV4ForConditionalGeneration": "on a CPU it is a stand-in, which no runner supports",
    "Dots3NoteForCausalLM": _KERNELS + "vllm_flash_attn",
    "FlintForCausalLM": _KERNELS + "flashinfer",
    "Glm5NextForConditionalGeneration": _VALUES + "mhc",
    "HfMoondream": "its config was not made small: the default takes more than 15 GB",
    "InklingForCausalLM": _VALUES + "use_embed_norm",
    "InklingForConditionalGeneration": "transformers writes names of audio that it does not have",
    "InternS1ProForConditionalGeneration": _VALUES + "vision_config",
    "InternS2MobiusForConditionalGeneration": _VALUES + "image_token_id",
    "KimiK3ForConditionalGeneration": "it needs a config of a class of vLLM, which was not made small",
    "MiniMaxM3SparseForConditionalGeneration": _VALUES + "img_token_compression_config",
    "Moondream3ForCausalLM": "its config was not made small: the default takes more than 15 GB",
    "MuseSparkForConditionalGeneration": _VALUES + "audio_config",
    "Qwen4ExpForCausalLM": "it pins memory of the host while it is built, which needs a GPU",
    "Qwen4ExpForConditionalGeneration": _VALUES + "deepstack_visual_indexes",
    "Step5ForCausalLM": "it needs vLLM's second model runner, which needs Triton",
    "Step5ForConditionalGeneration": "it needs vLLM's second model runner, which needs Triton",
}
"""Architectures with experts that were not built here, and why."""

CASES = MOE | DIVIDED | DENSE


def write(architecture: str, directory: Path) -> None:
    """Write the checkpoint of a case, within ``every_platform`` and after ``join``."""
    shutil.copytree(_written(architecture).name, directory, dirs_exist_ok=True)


@functools.cache
def _written(architecture: str) -> TemporaryDirectory[str]:
    """Write the checkpoint once per process: vLLM changes classes of transformers when it builds models of them."""
    folder = TemporaryDirectory()
    _write(architecture, Path(folder.name))
    return folder


def _write(architecture: str, directory: Path) -> None:
    case = CASES[architecture]
    if case.divided is not None:
        write_divided(architecture, case.divided, directory)
        return
    model_class = getattr(transformers, architecture)
    parts = {name: changes for name, changes in case.changes.items() if isinstance(changes, dict)}
    own = {name: value for name, value in case.changes.items() if name not in parts}
    config = small_config(model_class.config_class, **own)
    for name, changes in parts.items():
        vars(getattr(config, name)).update(changes)
    config.architectures = [architecture]
    model = model_class._from_config(config, dtype=DTYPE)
    fill(model)
    tensors = {
        name: tensor.clone().contiguous()
        for name, tensor in published_tensors(model).items()
        if case.dropped is None or not re.search(case.dropped, name)
    }
    config.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(_with(written, case.added)))
    save_file(tensors, directory / "model.safetensors")


def _with(values: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _with(values[name], value) for name, value in added.items() if isinstance(value, dict)}
    return {**values, **added, **parts}
