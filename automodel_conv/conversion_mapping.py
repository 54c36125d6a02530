"""Which rules turn a checkpoint into a model: the questions callers ask before anything is planned.

A drop-in for NeMo AutoModel's module of the same name and the superset of its published
generations. Every answer comes from the rules of the *installed* transformers, which is imported
on the first question, never when this module is.

Two ways to rename a key, and why both are here:

* a mapping ``{regex: replacement}`` is read first-match-wins, each match by ``re.subn``, as NeMo's
  storage reader and ``_apply_key_mapping`` do;
* transformers chains all its renamings, then applies at most one converter, then adds or strips
  the base-model prefix. A first-match mapping cannot say that in general; a callable can.

Source: ``nemo_automodel.components.checkpoint.conversion_mapping`` at 36044ad, in 0.7.0 and at
a3c90c430; ``transformers.conversion_mapping`` and ``core_model_loading``, 5.12.1 to 5.23.0.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from automodel_conv.errors import NameProblems, listing, message
from automodel_conv.upstream.registry import holds_pretrained, model_rules, transformers_available
from automodel_conv.upstream.wrappers import unwrapped

_TRANSFORMERS_AVAILABLE = transformers_available()

# The published set, kept for those who read it. It has not followed transformers since early 2026;
# requires_tensor_merging asks the rules as well.
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

# Whole mappings for types whose type-level rules alone name the wrong modules: gemma3 borrows
# llava's, and the rest of its renames is registered on nested classes that a type cannot reach.
# First match wins, so the legacy `vision_model.` segment must be taken off before the general case.
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
    """Whether a transformers with conversion rules (5.0 or newer) is installed."""
    return _TRANSFORMERS_AVAILABLE


def requires_tensor_merging(model_type: str) -> bool:
    """Whether loading ``model_type`` takes more than renames.

    True if any installed rule of that type converts tensors, or the published set has it. Class
    names that transformers registers rules for are answered too. A composite model (a
    vision-language model with a mixture-of-experts text tower) is not its outer type: look for
    converters in ``get_model_conversion_mapping(model)`` instead.
    """
    if model_type in MODELS_REQUIRING_TENSOR_MERGING:
        return True
    rules = get_checkpoint_conversion_mapping(model_type)
    if not rules:
        return False
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(rule, WeightConverter) for rule in rules)


def get_checkpoint_conversion_mapping(model_type: str) -> list | None:
    """Fresh copies of the rules registered for a model type or class name; None if there are none.

    Also None where transformers is absent.
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
    """All rules that loading ``model`` applies, in order; ``[]`` where transformers is absent.

    ``key_mapping`` comes first, then the rules of the model and, scoped to their prefix, of each
    nested model, then (``add_legacy``) renames of old LayerNorm and weight-norm names, then what
    the quantizer adds. A model that torch has wrapped (``fully_shard``, ``torch.compile``, data
    parallelism, activation checkpointing), whole or in parts, has the rules of the one it wraps,
    for the names of that one. Custom code gets no rules it did not register, as upstream.

    The rules are the caller's own: transformers copies its registry for each call.
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
    """Checkpoint key to model key, with ``model_key_mapping`` winning wherever it matches.

    With a ``model`` that has rules: a callable that renames as transformers does when it loads
    that model: scoped, chained, guarded and index-shifting renames, legacy names, a missing or
    surplus base-model prefix, keys that already are the model's. All sources of a merged tensor
    get its one name. Use one callable per checkpoint and give it the keys in transformers' order
    (``dot_natural_key``), because a guarded rename waits for its guard. A key that
    ``model_key_mapping`` renames skips the renames registered for the root model; those of nested
    models still apply, as in AutoModel 0.7.0.

    Without: a mapping, never a callable, because the first and third generation of AutoModel read
    ``.items()`` and 0.7.0 refuses a callable for the very models it does not pass here. It holds
    the renames registered for ``model_type``, and warns where first-match reading of them may
    name some keys differently than transformers would.

    Returns:
        None if no rule and no ``model_key_mapping`` exists.
    """
    explicit = dict(model_key_mapping or {})
    model = None if model is None else unwrapped(model)
    if _TRANSFORMERS_AVAILABLE and model is not None and holds_pretrained(model):
        # Legacy renames alone are no reason for a mapping: every model has them.
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
    # A type does not tell which of its classes is meant, and some have rules of their own.
    if not exact or _has_class_rules(model_type):
        _warn_inexact(model_type)
    return explicit | {p: r for p, r in entries.items() if p not in explicit} or None


def get_hf_load_key_mapping(model: nn.Module) -> dict[str, str] | None:
    """The first-match mapping from checkpoint keys to the keys of ``model``, or None.

    The model's own ``_checkpoint_conversion_mapping`` if it has one, else the renames registered
    for its (unwrapped) class or its type. Where those cannot be read first-match, this warns, and
    ``get_combined_key_mapping(model_type, model=model)`` has the exact answer.
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
    """Model key to checkpoint key, for those ``checkpoint_fqns`` that ``key_mapping`` renames.

    No regex is reversed: each checkpoint key is renamed as in loading and the pair is turned
    around. A callable, as ``get_combined_key_mapping`` returns, is welcome.

    Raises:
        NameProblems: (a ValueError) if several checkpoint keys load into one model key, renamed
            or not: the export name would be ambiguous. All such keys are named.
    """
    if not key_mapping:
        return {}
    rename = key_mapping if callable(key_mapping) else _first_match_renamer(key_mapping)
    sources: dict[str, list[str]] = {}
    for name in dict.fromkeys(checkpoint_fqns):
        sources.setdefault(rename(name), []).append(name)
    shared = [(target, tuple(names)) for target, names in sources.items() if len(names) > 1]
    if shared:
        raise NameProblems(
            message(
                "Several checkpoint keys load into one model key; its export name is ambiguous.",
                found="\n" + listing(f"{target} <- {', '.join(names)}" for target, names in shared),
                do="export merged tensors by reversing their rules, or give an injective mapping.",
            ),
            duplicated=shared,
        )
    return {target: names[0] for target, names in sources.items() if target != names[0]}


def _first_match(mapping: Mapping[str, str], key: str) -> tuple[str, bool]:
    """The key as the first matching pattern rewrites it, and whether any did."""
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed, True
    return key, False


def _first_match_renamer(mapping: Mapping[str, str]) -> Callable[[str], str]:
    return lambda key: _first_match(mapping, key)[0]


def _renamer(model: nn.Module, explicit: dict[str, str]) -> Callable[[str], str]:
    """Key to key as transformers loads ``model``; ``explicit`` in place of the root's renames."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    nested = [rule for rule in renamings if _is_scoped(rule)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    # Only presence is asked of the values; tensors would be kept alive by the callable.
    targets = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", None)

    def rename(key: str) -> str:
        start, was_explicit = _first_match(explicit, key)
        chain = nested if was_explicit else renamings
        renamed, _ = rename_source_key(start, chain, converters, prefix, targets)
        if renamed not in targets and key in targets and not was_explicit:
            # The loader takes a key that is the model's already as it is, prefix aside.
            renamed, _ = rename_source_key(key, [], [], prefix, targets)
        return renamed

    return rename


def _first_match_entries(rules: Iterable[object]) -> tuple[dict[str, str], bool]:
    """The root renames among ``rules``, and whether reading them first-match is surely right."""
    from transformers.core_model_loading import WeightRenaming

    entries: dict[str, str] = {}
    exact = True
    for rule in rules:
        if not isinstance(rule, WeightRenaming):
            continue
        # A rule with its own way of renaming does more than its patterns say (guard, index shift).
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
    """Whether rules are registered for a class that the auto classes build for the type."""
    from transformers.models.auto import modeling_auto

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    found = [table[model_type] for table in tables if model_type in table]
    names = {name for entry in found for name in ((entry,) if isinstance(entry, str) else entry)}
    return any(get_checkpoint_conversion_mapping(name) is not None for name in names)


def _pattern(source: str, target: str) -> str:
    """The regex that the installed transformers matches for one source, name boundary included."""
    from transformers.core_model_loading import WeightRenaming

    compiled = WeightRenaming([source], [target]).compiled_sources.pattern
    return compiled.removeprefix("(?P<g0>").removesuffix(")")


def _may_act_together(mapping: dict[str, str]) -> bool:
    """Whether two renames could both act on one key. Errs on the side of yes."""
    if len(mapping) < 2:
        return False
    if not all(pattern.startswith("^") for pattern in mapping):
        return True
    # Each of these rewrites the start of a key: a second one acts only if it takes the first's
    # output, so trying it on what the first one writes decides.
    outputs = list(mapping.values())
    return any(
        re.search(later, output) or re.search(later, output + ".")
        for index, output in enumerate(outputs)
        for later in list(mapping)[index + 1 :]
    )


def _is_scoped(rule: object) -> bool:
    # The attribute is absent before transformers 5.10, which had no scopes.
    return getattr(rule, "scope_prefix", None) is not None
