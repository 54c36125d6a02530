"""What a model wants: names, dtypes and shapes of its state dict, which names share a tensor, how its experts lie.

Works on any ``nn.Module``, on the meta device too; what only transformers' models know (dtypes kept in float32, tied
names, layout of the experts) is asked through their own attributes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import FLOATING, dtype_code, torch_dtype
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.planning.compiler import TargetSpec
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.registry import is_pretrained_model, transformers_available


class ExpertLayout(NamedTuple):
    """How one experts module stores its weights, in the words of transformers' ``use_experts_implementation``."""

    transposed: bool
    interleaved: bool
    gated: bool


def state_table(state_dict: Mapping[str, Tensor]) -> SourceTable:
    """Names, dtypes and shapes of tensors in memory.

    Raises:
        UnsupportedError: something is no tensor, or has a dtype that the safetensors format does not have.
    """
    codes = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(
                message(f"{name} is not a tensor", found=type(tensor).__name__, do="leave extra state out of the dict")
            )
        code = dtype_code(tensor.dtype)
        if code is None:
            raise UnsupportedError(message(f"{name} has a dtype that is not converted", found=tensor.dtype))
        codes.append(code)
    return SourceTable(list(state_dict), codes, [tuple(tensor.shape) for tensor in state_dict.values()])


def model_targets(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, TargetSpec]:
    """Dtype and shape of everything in ``model.state_dict()``, in its order; of a DTensor the shape of the whole.

    Args:
        dtype: the dtype for all floating tensors; None keeps each tensor's own. Where no value is there yet (a dtype
            is given, or the tensor is on the meta device), what a transformers model keeps in float32
            (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``) is float32, as in ``from_pretrained``.

    Raises:
        UnsupportedError: a tensor of a dtype that the safetensors format does not have.
    """
    kept = _kept_in_float32(model, dtype)
    targets: dict[str, TargetSpec] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module, which is no tensor
        code = dtype_code(tensor.dtype)
        if code is None:
            raise UnsupportedError(message(f"{name} has a dtype that checkpoints cannot hold", found=tensor.dtype))
        if code in FLOATING and (dtype is not None or tensor.is_meta):
            code = dtype_code(kept(name) or dtype or tensor.dtype) or code
        targets[name] = TargetSpec(code, tuple(tensor.shape))
    return targets


def _kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str], torch.dtype | None]:
    """The dtype a transformers model insists on for a name when the rest has ``dtype``; None where it does not."""
    plan = model._get_dtype_plan(dtype or model.dtype) if is_pretrained_model(model) else {}  # type: ignore[operator]
    return matching(plan)


def matching(plan: Mapping[str, torch.dtype]) -> Callable[[str], torch.dtype | None]:
    """What transformers' plan of dtypes, ``{pattern: dtype}``, says of a name."""
    if not plan:
        return lambda name: None
    from transformers.core_model_loading import build_glob_alternation

    alternation, by_group, _ = build_glob_alternation(list(plan))

    def planned(name: str) -> torch.dtype | None:
        match = alternation.search(name)
        return plan[by_group[match.lastgroup]] if match is not None else None

    return planned


def checked_dtype(dtype: torch.dtype | None) -> None:
    """Raise UnsupportedError for what ``dtype=`` cannot be: only float16, bfloat16, float32 and float64 are numbers."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype_code(dtype) not in FLOATING):
        raise UnsupportedError(
            message(
                "dtype= takes a floating torch dtype",
                expected="torch.bfloat16, float16, float32 or float64",
                found=repr(dtype),
            )
        )


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of state dict names that are one tensor: shared parameters, and what a transformers model would tie."""
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
    """Per module that holds grouped experts, how they lie; None where the module does not say."""
    layouts: dict[str, ExpertLayout | None] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts" or not any(hasattr(module, n) for n in ("gate_up_proj", "up_proj")):
            continue
        if not isinstance(getattr(module, "down_proj", None), Tensor):
            continue
        said = all(hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_gate"))
        layouts[name] = (
            ExpertLayout(bool(module.is_transposed), not module.is_concatenated, bool(module.has_gate))
            if said
            else None
        )
    return layouts


def meta_model(directory: str, dtype: torch.dtype | None, fallback_dtype: str | None) -> nn.Module:
    """The model of a checkpoint's ``config.json`` on the meta device, as ``from_pretrained`` would build it.

    Args:
        dtype: None takes the config's, else that of the checkpoint's first floating tensor (``fallback_dtype``).

    Raises:
        UnsupportedError: no transformers, no config, or a class that this transformers does not have.
    """
    if not transformers_available():
        raise UnsupportedError(
            message(
                "building a model from config.json needs transformers",
                do="pip install transformers, or pass model= or rules=",
            )
        )
    if not system.is_file(os.path.join(directory, "config.json")):
        raise UnsupportedError(
            message(
                "the checkpoint has no config.json to build a model from",
                where=directory,
                do="pass model=, or rules= (an empty list loads tensors under their own names)",
            )
        )
    from transformers import AutoConfig, initialization

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            message(
                "transformers cannot read the checkpoint's config.json",
                where=directory,
                found=error,
                do="pass model= or rules=, or use a transformers that knows the model (remote code is never run)",
            )
        ) from error
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch_dtype(fallback_dtype or "F32")
    safe_creation = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    with ExitStack() as stack:
        for context in (torch.device("meta"), safe_creation()):
            stack.enter_context(context)
        return _model_class(config, directory)._from_config(config, dtype=dtype)


def _model_class(config: Any, directory: str) -> Any:
    import transformers
    from transformers import MODEL_MAPPING

    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    if type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    raise UnsupportedError(
        message(
            f"transformers {transformers.__version__} has no model class for this checkpoint",
            where=os.path.join(directory, "config.json"),
            found=f"architectures {getattr(config, 'architectures', None)}, model_type {config.model_type}",
            do="pass model= (remote code is never run from here)",
        )
    )
