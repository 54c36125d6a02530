"""Modules that torch puts around a model or its layers, and what they put into names.

A compiled model, or a compiled layer in the middle of one, calls its tensors ``_orig_mod.model.norm.weight`` and
``model.layers.0._orig_mod.mlp.gate.weight``; data parallelism adds ``module.`` in front. Names here are those without:
what ``save_pretrained`` writes of the model itself, and what torch's own ``get_model_state_dict`` calls them.
Source: torch 2.13.0, ``_get_fqns`` in ``distributed/checkpoint/state_dict.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim.swa_utils import AveragedModel

from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.planning.names import COMPILED, has_adapters

_FULLY_SHARDED = "_fsdp_wrapped_module"  # FSDP1
# Names by which wrappers hold what they wrap. Source: torch 2.13.0, ``OptimizedModule`` in ``_dynamo/eval_frame.py``,
# ``ActivationWrapper`` in ``distributed/algorithms/_checkpoint/checkpoint_wrapper.py``, ``FullyShardedDataParallel``.
_INNER = (COMPILED, "_checkpoint_wrapped_module", _FULLY_SHARDED)
_HOLDS_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it and around modules in it, on the same parameters and buffers.

    ``torch.compile``, ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` and activation checkpointing
    wrap; ``fully_shard`` and ``module.compile()`` do not. Nothing of ``model`` is changed. Where a module in it is
    wrapped, those above it are stand-ins that share its attributes, parameters and buffers: a tensor that is put into
    one is in both.

    Raises:
        UnsupportedError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(message("model= is not a model", expected="a torch.nn.Module", found=kind_of(model)))
    return _unwrapped(model, {})


def plain_model(model: nn.Module) -> nn.Module:
    """``unwrapped``, for a model whose tensors are read or written: they must be the model's own, and whole.

    Raises:
        UnsupportedError: it is no module; or it has adapters of PEFT, whose tensors are not a checkpoint's, or FSDP1
            keeps it flat.
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
                    "options=StateDictOptions(full_state_dict=True)) gives, with rules=",
                )
            )
        if _is_adapter(module):
            raise has_adapters(where)
    return plain


def stand_in(module: nn.Module, cls: type, modules: Mapping[str, nn.Module | None] | None = None) -> nn.Module:
    """A module of class ``cls`` with the attributes of another one, and children of its own if any are given."""
    made = object.__new__(cls)
    vars(made).update(vars(module))
    if modules is not None:
        vars(made)["_modules"] = dict(modules)
    return made


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while (inner := _inner(module)) is not None:
        module = inner
    if id(module) not in done:
        # Not by truth: a list of no layers is false, and a compiled module need not have a length.
        children = {n: None if child is None else _unwrapped(child, done) for n, child in module._modules.items()}
        same = all(children[name] is child for name, child in module._modules.items())
        done[id(module)] = module if same else stand_in(module, type(module), children)
    return done[id(module)]


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for any other module."""
    if isinstance(module, _HOLDS_MODULE):
        return module.module
    if len(module._modules) != 1 or module._parameters or module._buffers:
        return None  # it has more than what it would wrap, so these names are its own
    [(name, child)] = module._modules.items()
    return child if name in _INNER else None


def _is_adapter(module: nn.Module) -> bool:
    """Whether PEFT has made a module, or transformers has put adapters into it."""
    return (
        "base_layer" in module._modules
        or vars(module).get("_hf_peft_config_loaded", False)
        or any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
    )
