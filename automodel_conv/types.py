"""The texts that arguments accept, as types: a type checker finds ``layout="numo"`` before the program runs.

Functions accept them as plain strings; the names below are for annotations of the caller's own functions.

Example:
    >>> from automodel_conv.types import LayoutName
    >>> def path_of(layout: LayoutName) -> str:
    ...     return f"checkpoints/{layout}"
    >>> path_of("nemo")
    'checkpoints/nemo'
"""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "AdapterForm",
    "Backend",
    "Broadcast",
    "LayoutInFiles",
    "LayoutName",
    "LoaderCalls",
    "Owners",
    "SavedAdapter",
]

LayoutName: TypeAlias = Literal[
    "transformers",
    "nemo",
    "gpt_oss",
    "vllm",
    "vllm_w31",
    "vllm_trtllm",
    "vllm_trtllm_padded",
    "vllm_deepep",
]
"""A layout of grouped experts in memory: ``layout`` of loads, saves and conversions in memory."""

LayoutInFiles: TypeAlias = LayoutName | Literal["per_expert"]
"""A layout of experts in files: ``source_layout``, and ``layout`` of ``convert_checkpoint``."""

AdapterForm: TypeAlias = Literal["per_expert", "transformers", "vllm"]
"""A form of an adapter: ``layout`` of ``convert_adapter``."""

SavedAdapter: TypeAlias = Literal["merged", "only", "fused"]
"""What ``save_checkpoint`` writes of a model with adapters: its ``adapter``."""

Backend: TypeAlias = Literal["auto", "torch", "triton"]
"""What converts tensors in memory: ``backend`` of ``convert_state_dict`` and ``revert_state_dict``."""

Broadcast: TypeAlias = bool | Literal["node"]
"""Which ranks read what several hold: ``broadcast`` of the loaders."""

LoaderCalls: TypeAlias = Literal["pairs", "dict"]
"""What loading code is called with: ``calls`` of ``load_with`` and ``trace_loader``."""

Owners: TypeAlias = Literal["mesh", "holders"]
"""The ranks that a published tensor belongs to: ``owners`` of ``integrations.vllm.published_source``."""
