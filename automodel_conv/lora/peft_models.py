"""Take the adapters out of a model that PEFT has put them into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isclose
from typing import Any

from torch import Tensor, nn

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, kind_of, listing, message
from automodel_conv.lora.adapter import Adapter, adapter_of
from automodel_conv.lora.base import Base, Loading
from automodel_conv.lora.config import AdapterConfig, config_of, scale_of
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.models import state_table, tied_names
from automodel_conv.upstream.wrappers import unwrapped, without_adapters


class _HeldTensors:
    """The tensors of an adapter in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.names = list(tensors)
        self.dtypes = [dtype_code(tensor.dtype) or str(tensor.dtype) for tensor in tensors.values()]
        self.shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        self._tensors = [tensor.detach() for tensor in tensors.values()]

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        return [self._tensors[row].cpu() for row in rows]


def base_and_adapters(model: object) -> tuple[nn.Module, tuple[Adapter, ...]]:
    """Return the base model and the active adapters of a model of PEFT, or of a transformers model with adapters.

    Raises:
        UnsupportedError: the model has no adapters, or they are merged into its weights, distributed, or of a kind that
            is not supported.
        CheckpointError, NameProblems: see ``adapter_of``.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs or not isinstance(model, nn.Module):
        raise UnsupportedError(
            message("no model with adapters of PEFT", found=kind_of(model), do="leave {adapter=} out")
        )
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        do = "call unmerge_adapter() of the PeftModel first, or merge_and_unload() and save the result"
        text = "the adapters are merged into the weights of the model already"
        raise UnsupportedError(message(text, found="\n" + listing(merged), do=do))
    return without_adapters(model), tuple(_adapter(model, name, configs[name]) for name in _active(model))


def _active(model: nn.Module) -> list[str]:
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active  # transformers has a method, PEFT a property
    return [active] if isinstance(active, str) else list(active or ())


def _adapter(model: nn.Module, name: str, config: Any) -> Adapter:
    from peft import get_peft_model_state_dict

    where = f"adapter {name!r} of the model"
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    stated = config_of(settings, where)
    _refuse_scaled(model, name, stated, where)
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    shards = [name for name, tensor in tensors.items() if is_distributed(tensor)]
    if shards:
        text = "the matrices of the adapter are distributed"
        raise UnsupportedError(message(text, where=where, found="\n" + listing(shards), do="gather them first"))
    return adapter_of(where, stated, _HeldTensors(tensors))


def _refuse_scaled(model: nn.Module, name: str, config: AdapterConfig, where: str) -> None:
    """Refuse scales that differ from those of the config, as after ``set_scale``; no config can state them.

    Source: PEFT 0.21.2, ``set_scale`` and ``scale_layer`` in ``tuners/lora/layer.py``.
    """
    from peft.tuners.lora import LoraLayer

    scaled = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        and name in layer.scaling
        and not isclose(layer.scaling[name], scale_of(layer.r[name], layer.lora_alpha[name], config.uses_rslora))
    ]
    if scaled:
        text = "scales of the adapter were changed in the model"
        do = "set them back with set_scale(adapter, 1)"
        raise UnsupportedError(message(text, where=where, found="\n" + listing(scaled), do=do))


def base_in_memory(model: nn.Module, saving: CopyPlan) -> Base:
    """Return the base model of an adapter that is in memory, with its published tensors as the checkpoint.

    Args:
        model: the base model, without adapters.
        saving: the plan that saves it.
    """
    loading = replace(saving.inverse(), tied=tuple(tied_names(model)))
    return Base(f"the {type(model).__name__} in memory", table_of(saving.targets), lambda: Loading(model, loading))


def published_base(model: nn.Module) -> Base:
    """Return ``base_in_memory`` with the names under which ``save_pretrained`` saves the model."""
    return base_in_memory(model, saving_plan(state_table(dict(model.state_dict())), model=model))
