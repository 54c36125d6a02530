"""Rules for published model types that transformers has no rules for, as transformers' own rule objects.

Each function returns the rules of one family, for the argument ``rules`` of the loaders, of ``convert_checkpoint``,
``verify_checkpoint``, ``save_checkpoint`` and of the conversions in memory. The rules group the experts. All other
tensors keep the names of the files, except where a docstring states otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from automodel_conv.recipes.deepseek import deepseek_v41
from automodel_conv.recipes.experts import grouped_experts
from automodel_conv.recipes.kimi import kimi_k2, kimi_k3
from automodel_conv.recipes.ling import bailing_moe

RECIPES: Mapping[str, Callable[[], list[Any]]] = {
    "bailing_moe": bailing_moe,
    "bailing_moe_v2": bailing_moe,
    "deepseek_v41": deepseek_v41,
    "kimi_k2": kimi_k2,
    "kimi_k3": kimi_k3,
}
"""The functions by the ``model_type`` of the checkpoints that they are for."""

__all__ = ["RECIPES", "bailing_moe", "deepseek_v41", "grouped_experts", "kimi_k2", "kimi_k3"]
