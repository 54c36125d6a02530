"""Rules for the Kimi models of Moonshot AI that transformers has no rules for."""

from __future__ import annotations

from typing import Any

from automodel_conv.recipes.experts import grouped_experts


def kimi_k2() -> list[Any]:
    """Return the rules for Kimi-K2 (``model_type`` kimi_k2): those of DeepSeek-V3, whose names it has.

    Published checkpoints: Kimi-K2-Base and Kimi-K2-Instruct (FP8, one scale per 128 x 128 block), Kimi-K2-Thinking
    (experts INT4, one scale per 32 codes, by compressed-tensors). Kimi-K2.5 has the type kimi_k25, which transformers
    loads by itself.

    The experts of layer ``L`` (``E`` = 384, ``I`` = 2048, ``H`` = 7168) become:

    - ``model.layers.L.mlp.experts.e.gate_proj.weight [I, H]``, ``up_proj.weight [I, H]``:
      ``model.layers.L.mlp.experts.gate_up_proj [E, 2I, H]``
    - ``model.layers.L.mlp.experts.e.down_proj.weight [H, I]``: ``model.layers.L.mlp.experts.down_proj [E, H, I]``

    All names are then those of ``DeepseekV3ForCausalLM`` of transformers, so ``load_model`` fills a model of that class
    without a recipe.

    Sources: config.json of moonshotai/Kimi-K2-Instruct, whose ``architectures`` is DeepseekV3ForCausalLM; vLLM 0.33.0,
    ``transformers_utils/config.py``, which maps kimi_k2 to the config of DeepSeek-V3; transformers 5.24.0, the rules of
    deepseek_v3.

    Raises:
        UnsupportedError: transformers is not installed.

    Example:
        Load the layers with experts grouped as vLLM has them::

            tensors = amc.load_state_dict("moonshotai/Kimi-K2-Instruct", rules=amc.recipes.kimi_k2(), layout="vllm")

        >>> from automodel_conv import get_checkpoint_conversion_mapping, recipes
        >>> def patterns(rules):
        ...     return [(rule.source_patterns, rule.target_patterns) for rule in rules]
        >>> patterns(recipes.kimi_k2()) == patterns(get_checkpoint_conversion_mapping("deepseek_v3"))
        True
    """
    return grouped_experts("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj")


def kimi_k3() -> list[Any]:
    """Return the rules for Kimi-K3 (``model_type`` kimi_k3, text part kimi_linear).

    Published checkpoint: Kimi-K3 (experts MXFP4 by compressed-tensors). Names stay those of the files, which are the
    names of the model's own code; the experts are grouped under the name of their module. ``KimiLinearForCausalLM`` of
    transformers has no place for the tensors that Kimi-K3 adds to Kimi-Linear (``routed_expert_down_proj``,
    ``routed_expert_up_proj``, ``mlp_res_proj``, ``self_attention_res_proj``, ...).

    The experts of layer ``L`` (``E`` = 896, ``I`` = 3072, and the width of the routed experts ``H`` = 3584) become:

    - ``language_model.model.layers.L.block_sparse_moe.experts.e.w1.weight [I, H]`` (gate), ``w3.weight [I, H]`` (up):
      ``language_model.model.layers.L.block_sparse_moe.experts.gate_up_proj [E, 2I, H]``
    - ``...experts.e.w2.weight [H, I]`` (down): ``...experts.down_proj [E, H, I]``

    ``self_attn.A_log`` keeps the elements of the file: 128 for the 96 heads, of which the last 32 are zero.

    Sources: config.json of moonshotai/Kimi-K3; https://github.com/pytorch/torchtitan/pull/4791 (``A_log``); vLLM
    0.33.0, ``models/kimi_k3/nvidia/model.py`` (``w1`` gate, ``w2`` down, ``w3`` up;
    ``KimiK3ForConditionalGeneration.hf_to_vllm_mapper``; ``KimiMoE``, whose routed experts have
    ``routed_expert_hidden_size`` columns).

    Raises:
        UnsupportedError: transformers is not installed.

    Example:
        Load the whole checkpoint, decoded, with experts grouped as vLLM has them::

            tensors = amc.load_state_dict("moonshotai/Kimi-K3", rules=amc.recipes.kimi_k3(), layout="vllm")

        >>> from automodel_conv import recipes
        >>> [rule.target_patterns for rule in recipes.kimi_k3()]
        [['block_sparse_moe.experts.gate_up_proj'], ['block_sparse_moe.experts.down_proj']]
    """
    return grouped_experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2")
