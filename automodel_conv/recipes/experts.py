"""Rules that group experts, from the names of their three matrices in the files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from automodel_conv.errors import UnsupportedError, message

# Names of gate, up and down in published files. Sources: DeepSeek-V3 and Mixtral.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"\b(\w+\.experts)\.\d+\.(\w+)\.weight(?:_packed)?")


def grouped_experts(experts: str, *, gate: str, up: str, down: str) -> list[Any]:
    """Return the two rules that group the experts of each layer.

    The tensors ``{experts}.{e}.{gate}.weight [I, H]`` and ``{experts}.{e}.{up}.weight [I, H]`` of all experts ``e``
    become ``{experts}.gate_up_proj [E, 2I, H]``, gate before up. The tensors ``{experts}.{e}.{down}.weight [H, I]``
    become ``{experts}.down_proj [E, H, I]``. This is the layout "transformers".

    Args:
        experts: name of the module of experts, with as many of the modules around it as tell it from other modules,
            such as ``"mlp.experts"``. Layers and all that is around them match by themselves.
        gate: name of the matrix that the activation function is applied to.
        up: name of the matrix that is multiplied with its result.
        down: name of the matrix that returns to the hidden size.

    Raises:
        UnsupportedError: transformers is not installed.

    Example:
        >>> import torch
        >>> from automodel_conv import convert_state_dict, recipes
        >>> rules = recipes.grouped_experts("ffn.experts", gate="w1", up="w3", down="w2")
        >>> experts = {f"layers.0.ffn.experts.{e}.{w}.weight": torch.ones(4, 6) for e in range(2) for w in ("w1", "w3")}
        >>> experts |= {f"layers.0.ffn.experts.{e}.w2.weight": torch.ones(6, 4) for e in range(2)}
        >>> {name: tuple(tensor.shape) for name, tensor in convert_state_dict(experts, rules=rules).items()}
        {'layers.0.ffn.experts.gate_up_proj': (2, 8, 6), 'layers.0.ffn.experts.down_proj': (2, 6, 4)}
    """
    try:
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
    except ImportError:
        raise UnsupportedError(
            message("recipes need transformers, whose rule objects they return", do="pip install transformers")
        ) from None
    return [
        WeightConverter(
            source_patterns=[f"{experts}.*.{gate}.weight", f"{experts}.*.{up}.weight"],
            target_patterns=f"{experts}.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{experts}.*.{down}.weight",
            target_patterns=f"{experts}.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def call_for(names: Iterable[str]) -> str | None:
    """Return the call of ``grouped_experts`` that the names of a checkpoint suggest; None if they suggest none."""
    matrices: dict[str, set[str]] = {}
    for name in names:
        match = _EXPERT.search(name)
        if match is not None:
            matrices.setdefault(match[1], set()).add(match[2])
    for experts, names_of_matrices in matrices.items():
        for gate, up, down in _PROJECTIONS:
            if names_of_matrices == {gate, up, down}:
                return f'grouped_experts("{experts}", gate="{gate}", up="{up}", down="{down}")'
    return None
