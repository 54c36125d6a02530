"""Refuse adapters of which PEFT would leave matrices without effect, in models that were loaded under the hook.

PEFT loads an adapter with ``load_state_dict(strict=False)``, and says nothing of matrices that the model has no place
for. Source: PEFT 0.21.2, ``set_peft_model_state_dict`` in ``utils/save_and_load.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from automodel_conv.errors import NameProblems, listing, message


def refuse_lost_adapters(model: nn.Module) -> None:
    """Let a model raise NameProblems if an adapter is loaded into it and a part of it would have no effect."""
    if _raise_if_lost not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_raise_if_lost)


def _raise_if_lost(module: nn.Module, keys: Any) -> None:
    """Raise NameProblems for matrices of adapters among unexpected keys.

    Args:
        module: the model.
        keys: the missing and unexpected keys of a ``load_state_dict`` of the model, or of a wrapper around it.
    """
    lost = [name for name in keys.unexpected_keys if ".lora_" in name]
    if lost:
        text = f"{len(lost)} tensors of the adapter would have no effect, because PEFT finds no module for them"
        do = [
            'convert the adapter: convert_adapter(adapter, destination, base=path, layout="transformers")',
            "or merge it while loading: load_model(model, path, adapter=adapter)",
        ]
        raise NameProblems(
            message(text, where=type(module).__name__, found="\n" + listing(lost), do=do), unexpected=lost
        )
