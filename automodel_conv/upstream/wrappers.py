"""Remove the modules that torch wraps around a model or its layers, which also change names.

A compiled model has names such as ``_orig_mod.model.norm.weight``, and a model with a compiled layer has names such as
``model.layers.0._orig_mod.mlp.gate.weight``. Data parallelism adds the prefix ``module.``. This package uses the names
without these additions, as ``save_pretrained`` of the model itself and torch's ``get_model_state_dict`` do.
Source: torch 2.13.0, ``_get_fqns`` in ``distributed/checkpoint/state_dict.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.optim.swa_utils import AveragedModel

from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.planning.names import COMPILED, has_adapters

_FULLY_SHARDED = "_fsdp_wrapped_module"  # FSDP1
# Attributes of wrappers that hold the wrapped module.
# Source: torch 2.13.0, ``OptimizedModule`` in ``_dynamo/eval_frame.py``, ``ActivationWrapper`` in
# ``distributed/algorithms/_checkpoint/checkpoint_wrapper.py``, ``FullyShardedDataParallel``.
_INNER = (COMPILED, "_checkpoint_wrapped_module", _FULLY_SHARDED)
_HOLDS_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers around it and around its modules, with the same parameters and buffers.

    ``torch.compile``, ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` and activation checkpointing
    wrap modules; ``fully_shard`` and ``module.compile()`` do not. ``model`` is not changed. If a module in it is
    wrapped, the modules that contain it are replaced by stand-ins that share their attributes, parameters and buffers.
    A tensor that is assigned to either is assigned to both.

    Raises:
        UnsupportedError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(message("model= is not a model", expected="a torch.nn.Module", found=kind_of(model)))
    return _unwrapped(model, {}, _inner)


def plain_model(model: nn.Module) -> nn.Module:
    """Return ``unwrapped(model)``, and refuse a model whose parameters cannot be read or written one by one.

    Raises:
        UnsupportedError: ``model`` is not a module; it has PEFT adapters, which are not part of a checkpoint; or
            FSDP1 keeps its parameters flat.
    """
    plain = unwrapped(model)
    for name, module in model.named_modules():
        where = f"{name or 'the model'}, a {type(module).__name__}"
        if _FULLY_SHARDED in module._modules:
            raise UnsupportedError(
                message(
                    "FullyShardedDataParallel keeps parameters flat, and names and shapes only in its own state dict",
                    where=where,
                    do="shard with fully_shard (FSDP2), whose parameters are DTensors; or load the plain model before "
                    "it is wrapped, and save what torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                    "options=StateDictOptions(full_state_dict=True)) returns, with rules=",
                )
            )
        if _is_adapter(module):
            raise has_adapters(where)
    return plain


def stand_in(module: nn.Module, cls: type, modules: Mapping[str, nn.Module | None] | None = None) -> nn.Module:
    """Return a module of class ``cls`` that shares the attributes of another module.

    Args:
        module: the module to share attributes with.
        cls: class of the new module.
        modules: children of the new module; None: those of ``module``.
    """
    copy = object.__new__(cls)
    vars(copy).update(vars(module))
    if modules is not None:
        vars(copy)["_modules"] = dict(modules)
    return copy


def without_adapters(model: nn.Module) -> nn.Module:
    """Return ``unwrapped(model)`` without PEFT's adapters, with the parameters of the base model.

    Source: PEFT 0.21.2, ``PeftModel``, ``BaseTuner``, ``BaseTunerLayer`` and ``ModulesToSaveWrapper``.
    """
    return _unwrapped(model, {}, lambda module: _inner(module) or _adapted(module))


def _unwrapped(
    module: nn.Module,
    done: dict[int, nn.Module],
    inner_of: Callable[[nn.Module], nn.Module | None],
) -> nn.Module:
    """Return a module without wrappers, with shared modules still shared.

    Args:
        module: the module.
        done: modules that are unwrapped already, by the id of the original.
        inner_of: returns the module in a wrapper; None for any other module.
    """
    while (inner := inner_of(module)) is not None:
        module = inner
    if id(module) not in done:
        # Compare with None: an empty list of layers is falsy, and a compiled module may have no length.
        children = {
            n: None if child is None else _unwrapped(child, done, inner_of) for n, child in module._modules.items()
        }
        same = all(children[name] is child for name, child in module._modules.items())
        done[id(module)] = module if same else stand_in(module, type(module), children)
    return done[id(module)]


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module in a wrapper of torch; None for any other module."""
    if isinstance(module, _HOLDS_MODULE):
        return module.module
    if len(module._modules) != 1 or module._parameters or module._buffers:
        return None  # a wrapper has one child and nothing else
    [(name, child)] = module._modules.items()
    return child if name in _INNER else None


def _adapted(module: nn.Module) -> nn.Module | None:
    """Return the module that one of PEFT's wraps; None for any other module."""
    if not any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
        return None
    names = ("base_model", "model", "base_layer", "original_module")
    return next((module._modules[name] for name in names if module._modules.get(name) is not None), None)


def _is_adapter(module: nn.Module) -> bool:
    """Return whether a module is one of PEFT's, or transformers has added adapters to it."""
    return (
        "base_layer" in module._modules
        or vars(module).get("_hf_peft_config_loaded", False)
        or any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
    )
