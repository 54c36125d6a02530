"""Which of transformers' rules apply to a model. transformers is imported on the first question."""

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
_NUMBERED_LAYER = re.compile(r"layers\\\.\d")  # in a regular expression


@lru_cache(maxsize=1)
def transformers_available() -> bool:
    """True if a transformers with conversion rules (5.0 or newer) is installed."""
    # Looks for the file instead of importing: transformers takes seconds to import, and a version
    # number would not tell that the package found first is the one that carries the rules.
    try:
        spec = find_spec("transformers")
    except (ImportError, ValueError):  # blocked by a finder, or a bare module in sys.modules
        return False
    if spec is None or spec.submodule_search_locations is None:
        return False
    return any((Path(folder) / "conversion_mapping.py").is_file() for folder in spec.submodule_search_locations)


def models_are_imported() -> bool:
    """Whether transformers has imported what its models are made of, which takes seconds."""
    return "transformers.modeling_utils" in sys.modules


def model_rules(
    model: Any,
    key_mapping: Mapping[str, str] | None = None,
    hf_quantizer: Any = None,
    *,
    add_legacy: bool = True,
) -> list[Any]:
    """transformers' own list of rules for a model, sub-models and legacy names included.

    A module that neither is nor holds a transformers model has no rules but ``key_mapping``.

    Raises:
        UnsupportedError: there is a ``key_mapping`` and no transformers to apply it.
    """
    if model is None or not holds_pretrained(model):
        return key_renamings(key_mapping)
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(
        _without_wrappers(model), dict(key_mapping) if key_mapping else None, hf_quantizer, add_legacy
    )


def saving_rules(model: Any, rules: Iterable[Any] | None) -> list[Any]:
    """The rules to reverse when going back to the checkpoint's names: upstream's choice, in loading order.

    Rules that a ``from_pretrained`` used are known to the model and taken as they are, but for what a quantizer has
    added to decode the checkpoint: the model has numbers now. Otherwise legacy names are not restored, and neither are
    prefixes: nothing tells whether the first checkpoint had them.
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
    """The sort key by which upstream orders a model's names when it goes back; None: it keeps their order.

    Source: transformers 5.23.0, ``revert_weight_conversion``; the key differs between versions.
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
    """A user's ``{pattern: replacement}`` as transformers' renaming rules.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    if not key_mapping:
        return []
    if not transformers_available():
        raise UnsupportedError(message("key_mapping needs transformers", do="pip install transformers"))
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(source_patterns=k, target_patterns=v) for k, v in key_mapping.items()]


def is_pretrained_model(model: Any) -> bool:
    """True for transformers' own models, whatever torch has wrapped them in."""
    if not transformers_available() or not hasattr(model, "base_model_prefix"):
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def without_ignored(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Both lists less what the model itself says to ignore, as upstream's report does."""
    missing, unexpected = list(missing), list(unexpected)
    if not is_pretrained_model(model):
        return missing, unexpected
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    unexpected = [n for n in unexpected if n in info.unexpected_keys]
    further = _prediction_layers(model, unexpected) if unexpected else ()
    return [n for n in missing if n in info.missing_keys], [n for n in unexpected if not n.startswith(further)]


def _prediction_layers(model: nn.Module, unexpected: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of layers for multi-token prediction, which lie behind the layers of a model.

    transformers does not make them. Its ignore-lists name them by number, as they follow the layers of the published
    models; here they follow the layers of any model. The config may tell how many there are, else there is one. Such a
    layer has modules that the others lack (``eh_proj``); one that has not is a layer that the config leaves out.
    Source: transformers 5.23.0, ``_keys_to_ignore_on_load_unexpected`` of ``DeepseekV3PreTrainedModel``
    (``model.layers.61``) and of ``Glm4MoePreTrainedModel``; ``num_nextn_predict_layers`` in DeepSeek-V3's
    ``config.json``.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        config, layers = getattr(module, "config", None), getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or getattr(config, "num_hidden_layers", None) != len(layers):
            continue
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        one = any(_NUMBERED_LAYER.search(pattern) for pattern in ignored)
        number = getattr(config, "num_nextn_predict_layers", None) or int(one)
        before = f"{path}." if path else ""
        known = {name for layer in layers for name in layer._modules}
        for start in (f"{before}layers.{len(layers) + i}." for i in range(number)):
            modules = {name.removeprefix(start).partition(".")[0] for name in unexpected if name.startswith(start)}
            found += [start] if modules - known else []
    return tuple(found)


def holds_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is or holds a model whose rules transformers looks up."""
    if not transformers_available():
        return False
    from transformers.modeling_utils import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in model.modules())


def _without_wrappers(model: nn.Module) -> Any:
    """``model`` as transformers' rule look-up must see it: every nested model in its own class.

    torch wraps by giving a module a subclass made at run time (``FSDPMixtralForCausalLM``), whose
    name has no rules and which transformers takes for custom code. The look-up reads classes from
    ``named_modules()``; it gets stand-ins that share the modules' attributes, so that ``model``
    is not touched. A root that is no HF model gets the empty base-model prefix it lacks.
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
