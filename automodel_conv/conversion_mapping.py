"""Queries for the rules that convert a checkpoint to a model.

A drop-in replacement for NeMo AutoModel's module of the same name, and a superset of its published
generations. All answers come from the rules of the *installed* transformers. It is imported by the
first query, not by this module.

Keys are renamed in two forms:

* A mapping ``{regex: replacement}``, of which the first matching entry is applied by ``re.subn``,
  as NeMo's storage reader and ``_apply_key_mapping`` do.
* A callable. transformers chains all its renamings, then applies at most one converter, then adds
  or strips the base-model prefix. A first-match mapping cannot express that in general.

Source: ``nemo_automodel.components.checkpoint.conversion_mapping`` at 36044ad, in 0.7.0 and at
a3c90c430; ``transformers.conversion_mapping`` and ``core_model_loading``, 5.12.1 to 5.24.0.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from automodel_conv.planning.names import only_origins
from automodel_conv.upstream.registry import holds_pretrained, model_rules, transformers_available
from automodel_conv.upstream.wrappers import unwrapped

_TRANSFORMERS_AVAILABLE = transformers_available()

# The published set, kept for code that reads it. It has not followed transformers since early 2026;
# requires_tensor_merging looks at the rules too.
MODELS_REQUIRING_TENSOR_MERGING = {
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4v_moe",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "longcat_flash",
    "minimax",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
}

# Whole mappings for types whose own rules name the wrong modules: gemma3 borrows the rules of
# llava, and its other renames are registered for nested classes, which a type does not name.
# The first match wins, so the legacy `vision_model.` segment must be removed before the general case.
_VLM_KEY_MAPPINGS: dict[str, dict[str, str]] = {
    "gemma3": {
        r"^language_model\.model\.": "model.language_model.",
        r"^vision_tower\.vision_model\.": "model.vision_tower.",
        r"^vision_tower\.": "model.vision_tower.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
        r"^language_model\.lm_head\.": "lm_head.",
    },
}


def is_transformers_conversion_available() -> bool:
    """Return whether a version of transformers with conversion rules (5.0 or newer) is installed.

    Example:
        >>> is_transformers_conversion_available()
        True
    """
    return _TRANSFORMERS_AVAILABLE


def requires_tensor_merging(model_type: str) -> bool:
    """Return whether loading a model type merges, splits or otherwise converts tensors, not only renames them.

    The result is True if any rule of the type in the installed transformers converts tensors, or
    if ``MODELS_REQUIRING_TENSOR_MERGING`` has the type. For a composite model, such as a
    vision-language model with a mixture-of-experts text tower, the outer type does not decide: look
    for converters in ``get_model_conversion_mapping(model)`` instead.

    Args:
        model_type: model type, or the name of a class that transformers registers rules for.

    Example:
        >>> requires_tensor_merging("qwen3_moe"), requires_tensor_merging("llama")
        (True, False)
    """
    if model_type in MODELS_REQUIRING_TENSOR_MERGING:
        return True
    rules = get_checkpoint_conversion_mapping(model_type)
    if not rules:
        return False
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(rule, WeightConverter) for rule in rules)


def get_checkpoint_conversion_mapping(model_type: str) -> list | None:
    """Return the rules registered for a model type or class name, as copies.

    Args:
        model_type: model type, or the name of a class that transformers registers rules for.

    Returns:
        Rule objects of transformers; None if no rules are registered or transformers is not
        installed.

    Example:
        >>> for rule in get_checkpoint_conversion_mapping("qwen3_moe"):
        ...     print(rule.source_patterns, "->", rule.target_patterns)
        ['mlp.experts.*.gate_proj.weight', 'mlp.experts.*.up_proj.weight'] -> ['mlp.experts.gate_up_proj']
        ['mlp.experts.*.down_proj.weight'] -> ['mlp.experts.down_proj']
    """
    if not _TRANSFORMERS_AVAILABLE:
        return None
    from transformers import conversion_mapping as registry

    return registry.get_checkpoint_conversion_mapping(model_type)


def get_model_conversion_mapping(
    model: nn.Module,
    key_mapping: dict[str, str] | None = None,
    hf_quantizer: object | None = None,
    add_legacy: bool = True,
) -> list:
    """Return all rules that loading a model applies, in order.

    The renames of ``key_mapping`` come first. The rules of the model and those of
    each nested model, scoped to its prefix, follow, then renames of old LayerNorm and weight-norm
    names, then the rules of the quantizer. As in transformers, a model class of custom code has
    only the rules that the code registers.

    Args:
        model: a model. If torch has wrapped it, whole or in parts (``fully_shard``,
            ``torch.compile``, data parallelism, activation checkpointing), the rules are those of
            the wrapped model, for its names.
        key_mapping: ``{pattern: replacement}``, as in ``from_pretrained``.
        hf_quantizer: the quantizer of transformers that loads the model.
        add_legacy: whether to include the renames of old LayerNorm and weight-norm names.

    Returns:
        Rule objects of transformers, which are the caller's own: transformers copies its registry
        for each call. ``[]`` if transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> with torch.device("meta"):
        ...     model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, num_experts=2))
        >>> rules = get_model_conversion_mapping(model, {"^transformer": "model"}, add_legacy=False)
        >>> [type(rule).__name__ for rule in rules]
        ['WeightRenaming', 'WeightConverter', 'WeightConverter']
    """
    if not _TRANSFORMERS_AVAILABLE:
        return []
    return model_rules(unwrapped(model), key_mapping, hf_quantizer, add_legacy=add_legacy)


def get_combined_key_mapping(
    model_type: str,
    model_key_mapping: dict[str, str] | None = None,
    *,
    model: nn.Module | None = None,
) -> dict[str, str] | Callable[[str], str] | None:
    """Return a callable or a mapping that renames checkpoint keys to model keys.

    If ``model`` has rules, the result is a callable that renames as transformers does when it loads
    that model: with scoped, chained, guarded and index-shifting renames, legacy names, and a
    missing or surplus base-model prefix. It does not change keys of the model, and it maps all
    sources of a merged tensor to the name of that tensor. A guarded rename depends on the keys
    before it. So use one callable per checkpoint, and pass the keys in the order of transformers
    (``dot_natural_key``). If ``model_key_mapping`` renames a key, the renames of the root model do
    not apply to it; those of nested models still do, as in AutoModel 0.7.0.

    Without such a model, the result is a mapping of ``model_key_mapping`` and the renames registered
    for ``model_type``, of which the first match applies. It is never a callable: the first and
    third generation of AutoModel read ``.items()``, and 0.7.0 refuses a callable for a model that it
    does not pass to this function. A warning is issued if a mapping may name some keys differently
    than transformers does.

    Args:
        model_type: model type, used if there is no model with rules.
        model_key_mapping: ``{regex: replacement}`` of the caller, which takes precedence.
        model: the model to load. If torch has wrapped it, the wrapped model is used.

    Returns:
        A callable, or a mapping to read first-match; None if there are no rules and no
        ``model_key_mapping``.

    Example:
        >>> import torch
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> with torch.device("meta"):
        ...     model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, num_experts=2))
        >>> rename = get_combined_key_mapping("qwen3_moe", model=model)
        >>> rename("model.layers.0.mlp.experts.1.gate_proj.weight")
        'model.layers.0.mlp.experts.gate_up_proj'
    """
    explicit = dict(model_key_mapping or {})
    model = None if model is None else unwrapped(model)
    if _TRANSFORMERS_AVAILABLE and model is not None and holds_pretrained(model):
        # Legacy renames are no reason for a mapping: every model has them.
        if get_model_conversion_mapping(model, add_legacy=False):
            return _renamer(model, explicit)
        return explicit or None
    if model_type in _VLM_KEY_MAPPINGS:
        return explicit | {
            pattern: replacement
            for pattern, replacement in _VLM_KEY_MAPPINGS[model_type].items()
            if pattern not in explicit
        }
    if not _TRANSFORMERS_AVAILABLE:
        return explicit or None
    entries, exact = _first_match_entries(get_checkpoint_conversion_mapping(model_type) or [])
    # A type does not determine the class, and some classes have rules of their own.
    if not exact or _has_class_rules(model_type):
        _warn_inexact(model_type)
    return explicit | {p: r for p, r in entries.items() if p not in explicit} or None


def get_hf_load_key_mapping(model: nn.Module) -> dict[str, str] | None:
    """Return a first-match mapping from checkpoint keys to the keys of a model.

    It is the model's own ``_checkpoint_conversion_mapping`` if there is one, or else the renames
    registered for its (unwrapped) class or its type. A warning is issued if those cannot be read
    first-match; ``get_combined_key_mapping(model_type, model=model)`` returns the exact names.

    Args:
        model: a model. If torch has wrapped it, the wrapped model is used.

    Returns:
        ``{regex: replacement}``, or None if there are no renames.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> model._checkpoint_conversion_mapping = {"^kernel$": "weight"}
        >>> get_hf_load_key_mapping(model)
        {'^kernel$': 'weight'}
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    if own:
        return own
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not model_type:
        return None
    if (
        model_type not in _VLM_KEY_MAPPINGS
        and _TRANSFORMERS_AVAILABLE
        and isinstance(model, nn.Module)
        and holds_pretrained(model)
    ):
        entries, exact = _first_match_entries(get_model_conversion_mapping(model, add_legacy=False))
        if not exact:
            _warn_inexact(model_type)
        return entries or None
    return get_combined_key_mapping(model_type)  # pyright: ignore[reportReturnType]


def build_hf_export_key_renames(
    checkpoint_fqns: Iterable[str],
    key_mapping: dict[str, str] | Callable[[str], str] | None,
) -> dict[str, str]:
    """Return the checkpoint key of each model key that ``key_mapping`` renames.

    No regex is reversed: each checkpoint key is renamed as in loading, and the pair is swapped.

    Args:
        checkpoint_fqns: all keys of the checkpoint.
        key_mapping: ``{regex: replacement}`` to read first-match, or a callable, as
            ``get_combined_key_mapping`` returns them. None: no renames.

    Returns:
        ``{model key: checkpoint key}``.

    Raises:
        NameProblems: several checkpoint keys load into one model key, renamed or not, so its export
            name is ambiguous; names all such keys. It is a ValueError.

    Example:
        >>> build_hf_export_key_renames(["lm.norm.weight", "head.weight"], {r"^lm\\.": "model."})
        {'model.norm.weight': 'lm.norm.weight'}
    """
    if not key_mapping:
        return {}
    rename = key_mapping if callable(key_mapping) else _first_match_renamer(key_mapping)
    origins = only_origins(
        ((name, rename(name)) for name in dict.fromkeys(checkpoint_fqns)),
        "Several checkpoint keys load into one model key; its export name is ambiguous.",
        "export merged tensors by reversing their rules, or give an injective mapping.",
    )
    return {target: name for target, name in origins.items() if target != name}


def _first_match(mapping: Mapping[str, str], key: str) -> tuple[str, bool]:
    """Return the key as the first matching pattern rewrites it, and whether a pattern matched."""
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed, True
    return key, False


def _first_match_renamer(mapping: Mapping[str, str]) -> Callable[[str], str]:
    return lambda key: _first_match(mapping, key)[0]


def _renamer(model: nn.Module, explicit: dict[str, str]) -> Callable[[str], str]:
    """Return a callable that renames keys as transformers does when it loads a model.

    Args:
        model: an unwrapped model.
        explicit: renames that replace those of the root model for the keys that they match.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    nested = [rule for rule in renamings if _is_scoped(rule)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    # Only the keys are used. With tensors as values, the callable would keep them alive.
    targets = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", None)

    def rename(key: str) -> str:
        start, was_explicit = _first_match(explicit, key)
        chain = nested if was_explicit else renamings
        renamed, _ = rename_source_key(start, chain, converters, prefix, targets)
        if renamed not in targets and key in targets and not was_explicit:
            # The loader leaves a key of the model unchanged, except for the prefix.
            renamed, _ = rename_source_key(key, [], [], prefix, targets)
        return renamed

    return rename


def _first_match_entries(rules: Iterable[object]) -> tuple[dict[str, str], bool]:
    """Return the renames of the root model, and whether reading them first-match is surely right."""
    from transformers.core_model_loading import WeightRenaming

    entries: dict[str, str] = {}
    exact = True
    for rule in rules:
        if not isinstance(rule, WeightRenaming):
            continue
        # A rule that overrides renaming does more than its patterns state (guard, index shift).
        is_plain = type(rule).rename_source_key is WeightRenaming.rename_source_key
        exact = exact and is_plain and not _is_scoped(rule)
        if _is_scoped(rule):
            continue
        for index, source in enumerate(rule.source_patterns):
            target = rule.target_patterns[0 if is_plain else index]
            entries.setdefault(_pattern(source, target), target)
    return entries, exact and not _may_act_together(entries)


def _warn_inexact(model_type: str) -> None:
    warnings.warn(
        f"{model_type!r} has renames that depend on the model's class, on nested models, on each"
        " other or on other keys; a first-match mapping may name some keys differently than"
        " transformers does. For the exact names call"
        " get_combined_key_mapping(model_type, model=model).",
        stacklevel=3,
    )


def _has_class_rules(model_type: str) -> bool:
    """Return whether rules are registered for a class that the auto classes build for the type."""
    from transformers.models.auto import modeling_auto

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    entries = [table[model_type] for table in tables if model_type in table]
    names = {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
    return any(get_checkpoint_conversion_mapping(name) is not None for name in names)


def _pattern(source: str, target: str) -> str:
    """Return the regex that the installed transformers matches for one source, name boundary included."""
    from transformers.core_model_loading import WeightRenaming

    compiled = WeightRenaming([source], [target]).compiled_sources.pattern
    return compiled.removeprefix("(?P<g0>").removesuffix(")")


def _may_act_together(mapping: dict[str, str]) -> bool:
    """Return whether two renames could both act on one key; True if in doubt."""
    if len(mapping) < 2:
        return False
    if not all(pattern.startswith("^") for pattern in mapping):
        return True
    # Each of these rewrites the start of a key, so a second one acts only if it matches the output
    # of the first.
    outputs = list(mapping.values())
    return any(
        re.search(later, output) or re.search(later, output + ".")
        for index, output in enumerate(outputs)
        for later in list(mapping)[index + 1 :]
    )


def _is_scoped(rule: object) -> bool:
    # The attribute is absent before transformers 5.10, which had no scopes.
    return getattr(rule, "scope_prefix", None) is not None
