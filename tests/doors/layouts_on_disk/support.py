"""Checkpoints of small models in every layout."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from automodel_conv.testing import address_valued

GROUPED = ("transformers", "nemo", "gpt_oss", "vllm", "vllm_w31")
TYPES = ("qwen3_moe", "mixtral", "nemotron_h", "gpt_oss", "qwen3_vl_moe")


# Experts, intermediate and hidden size: all different, 2I == H, I == H, E == I, one expert.
SIZES = [(3, 12, 16), (3, 8, 16), (3, 16, 16), (12, 12, 16), (1, 12, 16)]


def config_of(model_type, experts, intermediate, hidden):
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    common = dict(
        vocab_size=16, hidden_size=hidden, num_hidden_layers=1, num_experts_per_tok=1, pad_token_id=0, **heads
    )
    if model_type == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, num_experts=experts, moe_intermediate_size=intermediate)
    if model_type == "mixtral":
        return transformers.MixtralConfig(**common, num_local_experts=experts, intermediate_size=intermediate)
    if model_type == "gpt_oss":
        return transformers.GptOssConfig(**common, num_local_experts=experts, intermediate_size=intermediate)
    if model_type == "nemotron_h":
        sizes = dict(n_routed_experts=experts, moe_intermediate_size=intermediate, n_group=1, topk_group=1)
        sizes |= dict(layers_block_type=["moe"], moe_shared_expert_intermediate_size=20)
        return transformers.NemotronHConfig(**(common | sizes))
    text = common | dict(num_experts=experts, moe_intermediate_size=intermediate, mlp_only_layers=[])
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=hidden, patch_size=4)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)


def publish(model_type, sizes, directory):
    """Write a checkpoint as the type is published; return the model."""
    config = config_of(model_type, *sizes)
    auto = AutoModelForImageTextToText if model_type == "qwen3_vl_moe" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(address_valued(tuple(tensor.shape), tensor.dtype, 97 * number).nan_to_num(1.5, 2.5, 3.5))
    state = model.state_dict()
    if model_type == "qwen3_vl_moe":  # [E, H, 2I] and [E, I, H]
        turned = {name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
        state = {name: t.transpose(1, 2).contiguous() if name in turned else t.clone() for name, t in state.items()}
        config.save_pretrained(directory)
        save_file(state, Path(directory, "model.safetensors"), metadata={"format": "pt"})
    else:
        model.save_pretrained(directory, max_shard_size="6KB")
        model = type(model).from_pretrained(directory)  # reload, because some tensors stay in float32
    return model


def own_layout_of(model_type):
    return "gpt_oss" if model_type == "gpt_oss" else "transformers"


def weights_in(directory):
    return sorted(path.name for path in Path(directory).glob("*.safetensors"))
