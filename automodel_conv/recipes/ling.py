"""Rules for the Ling and Ring models of inclusionAI that transformers has no rules for."""

from __future__ import annotations

from typing import Any

from automodel_conv.recipes.experts import grouped_experts


def bailing_moe() -> list[Any]:
    """Return the rules for Ling and Ring 1 and 2 (``model_type`` bailing_moe or bailing_moe_v2).

    Published checkpoints: Ling-lite, Ling-plus, Ling-mini-2.0, Ling-flash-2.0, Ling-1T, and the Ring models of the same
    sizes. Names stay those of the model's own code (``model.word_embeddings``, ``attention.query_key_value``, ...); the
    experts are grouped under the name of their module. Later models have the type bailing_hybrid, which transformers
    loads by itself.

    The experts of layer ``L`` become:

    - ``model.layers.L.mlp.experts.e.gate_proj.weight [I, H]``, ``up_proj.weight [I, H]``:
      ``model.layers.L.mlp.experts.gate_up_proj [E, 2I, H]``
    - ``model.layers.L.mlp.experts.e.down_proj.weight [H, I]``: ``model.layers.L.mlp.experts.down_proj [E, H, I]``

    Source: vLLM 0.33.0, ``model_executor/models/bailing_moe.py``.

    Raises:
        UnsupportedError: transformers is not installed.

    Example:
        Write the checkpoint with experts grouped as NeMo AutoModel has them::

            amc.convert_checkpoint(source, destination, rules=amc.recipes.bailing_moe(), layout="nemo")

        >>> from automodel_conv import recipes
        >>> [rule.target_patterns for rule in recipes.bailing_moe()]
        [['mlp.experts.gate_up_proj'], ['mlp.experts.down_proj']]
    """
    return grouped_experts("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj")
