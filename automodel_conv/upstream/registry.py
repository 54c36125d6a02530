"""Look up the rules of transformers that apply to a model.

transformers is imported on first use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.upstream.quantizer_rules import own_rule
from automodel_conv.upstream.wrappers import stand_in

CORE_MODULE = "transformers.core_model_loading"
_NUMBERED_LAYER = re.compile(r"layers\\\.\d")  # as regular expressions write it


@lru_cache(maxsize=1)
def transformers_available() -> bool:
    """Return whether a version of transformers with conversion rules (5.0 or newer) is installed."""
    # The file is looked for because importing transformers takes seconds. A version number would not prove that the
    # first package on the path is the one with the rules.
    try:
        spec = find_spec("transformers")
    except (ImportError, ValueError):  # a finder blocks it, or sys.modules holds a module without a spec
        return False
    if spec is None or spec.submodule_search_locations is None:
        return False
    return any((Path(folder) / "conversion_mapping.py").is_file() for folder in spec.submodule_search_locations)


def models_are_imported() -> bool:
    """Return whether transformers' modeling code, which takes seconds to import, is imported."""
    return "transformers.modeling_utils" in sys.modules


def model_rules(
    model: Any,
    key_mapping: Mapping[str, str] | None = None,
    hf_quantizer: Any = None,
    *,
    add_legacy: bool = True,
) -> list[Any]:
    """Return transformers' own list of rules for a model, including rules of sub-models and legacy names.

    A module that neither is nor holds a transformers model only has the rules of ``key_mapping``.

    Args:
        model: the model, or None.
        key_mapping: ``{pattern: replacement}`` applied to names before the rules.
        hf_quantizer: transformers' quantizer, whose rules are added.
        add_legacy: whether to include rules for legacy names.

    Raises:
        UnsupportedError: ``key_mapping`` is given and transformers is not installed.
    """
    if model is None or not holds_pretrained(model):
        return key_renamings(key_mapping)
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(
        _without_wrappers(model), dict(key_mapping) if key_mapping else None, hf_quantizer, add_legacy
    )


def has_rules_of_type(model: Any) -> bool:
    """Return whether rules are registered for the type of a model itself, not only for classes or parts of it.

    They are not if it only holds a transformers model, or none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None or not holds_pretrained(model):
        return False
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model_type) is not None


def saving_rules(model: Any, rules: Iterable[Any] | None) -> list[Any]:
    """Return the rules that transformers would reverse to restore checkpoint names, in loading order.

    A model records the rules that ``from_pretrained`` used. They are returned without the decoding operations that a
    quantizer has added, because the model has decoded values now. If no rules are recorded, legacy names and prefixes
    are not restored: it is unknown whether the original checkpoint had them.

    Args:
        model: the model, or None.
        rules: the caller's rules; None: the model's own.
    """
    if rules is None:
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            return [own for rule in used if (own := own_rule(rule)) is not None]
        rules = model_rules(model)
    rules = list(rules)
    if not rules:
        return rules
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    legacy = {_patterns(rule) for rule in get_checkpoint_conversion_mapping("legacy") or ()}
    return [rule for rule in rules if type(rule).__name__ != "PrefixChange" and _patterns(rule) not in legacy]


def saving_order(model: Any) -> Callable[[str], Any] | None:
    """Return the sort key by which transformers orders names when it reverses rules; None if it keeps their order.

    Source: transformers 5.24.0, ``revert_weight_conversion``; the key differs between versions.
    """
    if not is_pretrained_model(model):
        return None
    if getattr(model, "_weight_conversions", None) is None and not saving_rules(model, None):
        return None
    from transformers import core_model_loading

    return getattr(core_model_loading, "dot_natural_key", None)


def _patterns(rule: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(rule.source_patterns), tuple(rule.target_patterns)


def key_renamings(key_mapping: Mapping[str, str] | None) -> list[Any]:
    """Return a caller's ``{pattern: replacement}`` as transformers' renaming rules.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    if not key_mapping:
        return []
    if not transformers_available():
        raise UnsupportedError(message("key_mapping needs transformers", do="pip install transformers"))
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in key_mapping.items()]


def is_pretrained_model(model: Any) -> bool:
    """Return whether ``model`` is transformers' own, even if torch has given it a subclass."""
    if not transformers_available() or not hasattr(model, "base_model_prefix"):
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def without_ignored(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return both lists without the names that the model ignores, as transformers' own report does."""
    missing, unexpected = list(missing), list(unexpected)
    if not is_pretrained_model(model):
        return missing, unexpected
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    unexpected = [n for n in unexpected if n in info.unexpected_keys]
    further = _prediction_layers(model, unexpected) if unexpected else ()
    return [n for n in missing if n in info.missing_keys], [n for n in unexpected if not n.startswith(further)]


def _prediction_layers(model: nn.Module, unexpected: Iterable[str]) -> tuple[str, ...]:
    """Return the name prefixes of layers for multi-token prediction, which follow the layers of a model.

    transformers does not build these layers. Its ignore-lists give their numbers in the published models. Here they are
    recognized after the last layer of any model. The config may state how many there are; otherwise there is one if the
    model ignores a numbered layer. Such a layer has modules that the other layers lack (``eh_proj``). A layer without
    them is one that the config leaves out.

    Source: transformers 5.24.0, ``_keys_to_ignore_on_load_unexpected`` of ``DeepseekV3PreTrainedModel``
    (``model.layers.61``) and of ``Glm4MoePreTrainedModel``; ``num_nextn_predict_layers`` in DeepSeek-V3's
    ``config.json``, ``num_mtp_modules`` in MiniMax-M2.5's; vLLM 0.33.0, ``MiniMaxM2Model``.
    """
    prefixes: list[str] = []
    for path, module in model.named_modules():
        config, layers = getattr(module, "config", None), getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or getattr(config, "num_hidden_layers", None) != len(layers):
            continue
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignores_layer = any(_NUMBERED_LAYER.search(pattern) for pattern in ignored)
        stated = (getattr(config, name, None) for name in ("num_nextn_predict_layers", "num_mtp_modules"))
        number = next(filter(None, stated), int(ignores_layer))
        parent = f"{path}." if path else ""
        known = {name for layer in layers for name in layer._modules}
        for prefix in (f"{parent}layers.{len(layers) + i}." for i in range(number)):
            modules = {name.removeprefix(prefix).partition(".")[0] for name in unexpected if name.startswith(prefix)}
            prefixes += [prefix] if modules - known else []
    return tuple(prefixes)


def holds_pretrained(model: nn.Module) -> bool:
    """Return whether ``model`` is, or contains, a transformers model."""
    if not transformers_available():
        return False
    from transformers.modeling_utils import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in model.modules())


def _without_wrappers(model: nn.Module) -> Any:
    """Return a view of ``model`` for transformers' rule look-up, in which every nested model has its own class.

    torch wraps a module by giving it a subclass created at run time (``FSDPMixtralForCausalLM``). No rules are
    registered under the name of such a class, and transformers mistakes it for custom code. The look-up reads classes
    from ``named_modules()``. It gets stand-ins that share the modules' attributes, so that ``model`` is not changed. A
    root that is not a transformers model gets an empty base-model prefix, which the look-up needs.
    """
    from transformers.modeling_utils import PreTrainedModel

    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, PreTrainedModel):
            cls = next(c for c in type(module).__mro__ if not c.__module__.startswith("torch."))
            if cls is not type(module):
                modules[name] = stand_in(module, cls)
    has_prefix = hasattr(model, "base_model_prefix")
    if has_prefix and all(modules[name] is module for name, module in model.named_modules()):
        return model
    root = modules[""] = stand_in(model, type(modules[""]))
    vars(root)["named_modules"] = lambda: iter(modules.items())
    if not has_prefix:
        vars(root)["base_model_prefix"] = ""
    return root
