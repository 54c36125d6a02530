"""Rules for the DeepSeek models that transformers has no rules for."""

from __future__ import annotations

from typing import Any

from automodel_conv.recipes.experts import grouped_experts


def deepseek_v41() -> list[Any]:
    """Return the rules for DeepSeek-V4.1 (``model_type`` deepseek_v41).

    Published checkpoint: DeepSeek-V4.1-Flash (experts FP4 with one exponent per 32 codes, other matrices FP8 with one
    exponent per 32 x 32 block). Names stay those of the files, which are the names of the model's own code; the experts
    are grouped under the name of their module. transformers has a class for DeepSeek-V4, which has no place for the
    tensors that DeepSeek-V4.1 adds (``engram``, ``vision``, ...).

    The experts of layer ``L`` (40 layers, ``E`` = 384) and of draft layer ``M`` become:

    - ``layers.L.ffn.experts.e.w1.weight [I, H]`` (gate), ``layers.L.ffn.experts.e.w3.weight [I, H]`` (up):
      ``layers.L.ffn.experts.gate_up_proj [E, 2I, H]``
    - ``layers.L.ffn.experts.e.w2.weight [H, I]`` (down): ``layers.L.ffn.experts.down_proj [E, H, I]``
    - ``mtp.M.ffn.experts.e.*``: ``mtp.M.ffn.experts.gate_up_proj`` and ``mtp.M.ffn.experts.down_proj``

    Sources: vLLM 0.33.0, ``models/deepseek_v41/nvidia/model.py`` (names, formats of the codes) and ``dspark.py`` (the
    draft layers, ``mtp``); the list of names of deepseek-ai/DeepSeek-V4.1-Flash at dba1be0a, as
    https://github.com/EfficientMoE/MoE-Infinity/pull/210 describes it; transformers 5.24.0, the rules of deepseek_v4
    (``w1`` gate, ``w2`` down, ``w3`` up).

    Raises:
        UnsupportedError: transformers is not installed.

    Example:
        Convert the checkpoint to bfloat16 with grouped experts::

            amc.convert_checkpoint(source, destination, rules=amc.recipes.deepseek_v41(), dequantize=True)

        >>> from automodel_conv import recipes
        >>> [rule.target_patterns for rule in recipes.deepseek_v41()]
        [['ffn.experts.gate_up_proj'], ['ffn.experts.down_proj']]
    """
    return grouped_experts("ffn.experts", gate="w1", up="w3", down="w2")
