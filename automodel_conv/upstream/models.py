"""Describe a model: names, dtypes and shapes of its state dict, tied names, and the layout of its experts.

This works for any ``nn.Module``, even on the meta device. Facts that only transformers' models state (parameters kept
in float32, tied names, layout of the experts) are read from their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.code_names import parts_of_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import ExpertLayout
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.registry import is_pretrained_model

_CAST = "cast it to a dtype of safetensors first, or leave it out"

# Classes whose modules do not state the layout that their ``forward`` computes with.
# Source: transformers 5.24.0, ``models/llama4/modeling_llama4.py`` and ``models/step3p7/modeling_step3p7.py``.
_UNSTATED = {
    "Llama4TextExperts": ExpertLayout(transposed=True, interleaved=False, gated=True),
    "Step3p7Experts": ExpertLayout(transposed=False, interleaved=False, gated=True),
}


def state_table(state_dict: Mapping[str, Tensor]) -> SourceTable:
    """Return the names, dtypes and shapes of tensors in memory as a source table.

    Raises:
        UnsupportedError: a value is not a tensor, or has a dtype that the safetensors format lacks.
    """
    codes = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(
                message(f"{name} is not a tensor", found=type(tensor).__name__, do="leave extra state out of the dict")
            )
        code = dtype_code(tensor.dtype)
        if code is None:
            raise UnsupportedError(
                message(f"{name} has a dtype that checkpoints cannot hold", found=tensor.dtype, do=_CAST)
            )
        codes.append(code)
    return SourceTable(list(state_dict), codes, [tuple(tensor.shape) for tensor in state_dict.values()])


def model_targets(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, TargetSpec]:
    """Return the dtype and shape of each tensor in ``model.state_dict()``, in its order.

    The shape of a DTensor is that of the whole tensor. A target is new if ``dtype`` is given or its tensor is on the
    meta device. New targets that a transformers model keeps in float32 (``_keep_in_fp32_modules``,
    ``_keep_in_fp32_modules_strict``) are float32, as in ``from_pretrained``.

    Args:
        model: the model.
        dtype: dtype of all other floating tensors, except scales of codes; None: each tensor's own.

    Raises:
        UnsupportedError: a tensor has a dtype that the safetensors format lacks.
    """
    kept = _kept_in_float32(model, dtype)
    state = model.state_dict(keep_vars=True)
    scales = frozenset() if dtype is None else _scales(state)
    targets: dict[str, TargetSpec] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module
        code = dtype_code(tensor.dtype)
        if code is None:
            text = f"{name} has a dtype that checkpoints cannot hold"
            raise UnsupportedError(message(text, found=tensor.dtype, do=_CAST))
        is_new = dtype is not None or tensor.is_meta
        if is_new:
            wanted = kept(name) or (dtype if code in FLOATING and name not in scales else None)
            code = code if wanted is None else dtype_code(wanted) or code
        targets[name] = TargetSpec(code, tuple(tensor.shape), is_new)
    return targets


def _scales(state: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the scales of a model that keeps codes, which keep their dtype."""
    codes = {name: dtype_code(t.dtype) for name, t in state.items() if isinstance(t, Tensor)}
    return parts_of_codes(SourceTable([*codes], [code or "" for code in codes.values()], [()] * len(codes)))


def _kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str], torch.dtype | None]:
    """Return a function from a name to the dtype that a transformers model requires for it, or None."""
    plan = model._get_dtype_plan(dtype or model.dtype) if is_pretrained_model(model) else {}  # type: ignore[operator]
    return matching(plan)


def matching(plan: Mapping[str, torch.dtype]) -> Callable[[str], torch.dtype | None]:
    """Return a function from a name to its dtype in transformers' ``{pattern: dtype}`` plan; None if none matches."""
    if not plan:
        return lambda name: None
    from transformers.core_model_loading import build_glob_alternation

    alternation, by_group, _ = build_glob_alternation(list(plan))

    def planned(name: str) -> torch.dtype | None:
        match = alternation.search(name)
        return plan[by_group[match.lastgroup]] if match is not None else None

    return planned


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return groups of state dict names for one tensor: shared parameters, and names that transformers would tie."""
    first: dict[int, str] = {}
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.get(name, name) != name:
            name = leader[name]
        return name

    names = [name for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            leader[name] = first.setdefault(id(tensor), name)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target in leader and source in leader:
            leader[find(target)] = find(source)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(find(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def expert_layouts(model: nn.Module) -> dict[str, ExpertLayout | None]:
    """Return the layout of each module of grouped experts, by name; None if it is not known."""
    layouts: dict[str, ExpertLayout | None] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts" or not any(hasattr(module, n) for n in ("gate_up_proj", "up_proj")):
            continue
        if not isinstance(getattr(module, "down_proj", None), Tensor):
            continue
        states_layout = all(hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_gate"))
        layouts[name] = (
            ExpertLayout(bool(module.is_transposed), not module.is_concatenated, bool(module.has_gate))
            if states_layout
            else _unstated(module)
        )
    return layouts


def _unstated(module: nn.Module) -> ExpertLayout | None:
    """Return the layout of experts whose class states none; torch may have given them a subclass."""
    classes = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    return next((_UNSTATED[name] for name in classes if name in _UNSTATED), None)
