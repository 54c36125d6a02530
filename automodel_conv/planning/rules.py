"""The one gateway to transformers' rule machinery.

Nothing else in the planning storey knows transformers. Names are renamed by the *installed* rule objects through the
installed ``rename_source_key`` (its pattern semantics changed three times between 5.0 and 5.23, so they are never
re-implemented here); operations become data only when their class is a stock one with its stock ``convert``. Whatever
else a rule holds is run as upstream would run it, one target at a time.

Rule objects carry run-time state, so a ``RuleSet`` works on deep copies and never touches the caller's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.lowering import OPERATIONS, Operation

_CORE = "transformers.core_model_loading"
OLDEST_TRANSFORMERS = (5, 1)


@lru_cache(maxsize=1)
def transformers_available() -> bool:
    """True if a transformers with conversion rules (5.1 or newer) is installed; does not import it."""
    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST_TRANSFORMERS


def model_rules(model: Any, key_mapping: Mapping[str, str] | None = None) -> list[Any]:
    """transformers' own list of rules for a model, sub-models and legacy names included; [] for other modules."""
    if not is_pretrained_model(model):
        return key_renamings(key_mapping)
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None)


def saving_rules(model: Any, rules: Iterable[Any] | None) -> list[Any]:
    """The rules to reverse when going back to the checkpoint's names: upstream's choice, in loading order.

    Rules that a ``from_pretrained`` used are known to the model and taken as they are. Otherwise legacy names are not
    restored, and neither are prefixes: nothing tells whether the first checkpoint had them.
    """
    if rules is None:
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            return list(used)
        rules = model_rules(model) if model is not None else []
    rules = list(rules)
    if not rules:
        return rules
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    legacy = {_patterns(rule) for rule in get_checkpoint_conversion_mapping("legacy") or ()}
    return [rule for rule in rules if type(rule).__name__ != "PrefixChange" and _patterns(rule) not in legacy]


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
    if not transformers_available() or not hasattr(model, "base_model_prefix"):
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


class NotLowerable(Exception):
    """A rule whose operations are not all stock; the text says which and why."""


class RuleSet:
    """An ordered list of rules, ready to be asked; see the module's docstring.

    Args:
        rules: transformers' WeightRenaming / WeightConverter objects; may be empty.
        model: where operations look up the config and parameter shapes; None is fine for rules that look up neither.
        reverse: the rules are to be used in the saving direction, converters before renamings, on model names.
    """

    def __init__(self, rules: Iterable[Any] | None, model: Any = None, *, reverse: bool = False):
        rules = deepcopy(list(rules or ()))
        if reverse:
            rules = [rule.reverse_transform() for rule in rules[::-1]]
        self.converters = [rule for rule in rules if _has_operations(rule)]
        self.renamings = [rule for rule in rules if not _has_operations(rule)]
        self.reverse = reverse
        self.model = model
        self.base_model_prefix: str | None = model.base_model_prefix if is_pretrained_model(model) else None
        self._row_of = {p: row for row, rule in enumerate(self.converters) for p in rule.source_patterns}
        self._probes = deepcopy(self.renamings)  # some renamings change state when they match
        self._digit_rules = [
            pattern for rule in (*self.renamings, *self.converters) if (pattern := _digit_pattern(rule)) is not None
        ]

    def __len__(self) -> int:
        return len(self.converters) + len(self.renamings)

    # --- names ------------------------------------------------------------------------------------------------------

    def rename(self, name: str) -> tuple[str, int, str]:
        """``(target name, converter row or -1, source pattern)``, without the model's prefix.

        When reversed, a name that a converter takes is not renamed further: its parts are, with ``rename_part``.
        """
        if not len(self):
            return name, -1, name
        rename_source_key = _core().rename_source_key
        if not self.reverse:
            renamed, pattern = rename_source_key(name, self.renamings, self.converters)
        else:
            renamed, pattern = rename_source_key(name, [], self.converters)
            if pattern is None:
                renamed, _ = rename_source_key(name, self.renamings, [])
        return renamed, self._row_of[pattern] if pattern is not None else -1, pattern or name

    def rename_part(self, name: str) -> str:
        """The final name of something a reversed converter made."""
        return _core().rename_source_key(name, self.renamings, [])[0] if self.renamings else name

    def with_prefix(self, name: str, targets: Mapping[str, object]) -> str:
        """The name with the model's base prefix added or removed, where that makes it one of the targets."""
        prefix = self.base_model_prefix
        if prefix is None or not (name.startswith(prefix) or f"{prefix}.{name}" in targets):
            return name
        return _core().rename_source_key(name, [], [], self.base_model_prefix, targets)[0]

    def looks_at_digits(self, name: str) -> bool:
        """True if some rule could treat this name differently with other numbers in it.

        ``name`` stands for all names that differ from it in purely numeric components only.
        """
        if not self._digit_rules:
            return False
        names = [name]
        for renaming in self._probes:
            names.append(renaming.rename_source_key(names[-1])[0])
        return any(pattern is _ANY or pattern.search(n) for pattern in self._digit_rules for n in names)

    # --- operations -------------------------------------------------------------------------------------------------

    def patterns(self, row: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        rule = self.converters[row]
        return tuple(rule.source_patterns), tuple(rule.target_patterns)

    def describe(self, row: int) -> str:
        sources, targets = self.patterns(row)
        operations = ", ".join(repr(operation) for operation in self.converters[row].operations)
        return f"{' + '.join(sources)} -> {' + '.join(targets)}: {operations}"

    def operations(self, row: int) -> tuple[Operation, ...]:
        """The converter's chain as data.

        Raises:
            NotLowerable: an operation, or the converter itself, is not transformers' own.
        """
        rule = self.converters[row]
        if not _is_stock(rule, "WeightConverter"):
            raise NotLowerable(f"{type(rule).__name__} is not transformers' own WeightConverter")
        if getattr(rule, "quantization_operation", None) or getattr(rule, "distributed_operation", None):
            raise NotLowerable("the rule carries a quantization or distributed operation")
        return tuple(_operation(operation, self._config()) for operation in rule.operations)

    def _config(self) -> Any:
        return getattr(self.model, "config", None)

    def upstream(self, row: int, target: str, slots: Mapping[str, Sequence[int]]) -> Callable[..., dict[str, Any]]:
        """Upstream's own conversion of one target as a function from ``{source row: tensor}`` to ``{name: tensor}``."""
        model, config = self.model, self._config()
        rule = self.converters[row]

        def convert(tensors: Mapping[int, Any]) -> dict[str, Any]:
            converter = deepcopy(rule)
            for pattern, rows in slots.items():
                for source in rows:
                    converter.add_tensor(target, target, pattern, tensors[source])
            made = converter.convert(target, model=model, config=config)
            parts = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
            return {self.rename_part(name): value for name, value in parts.items()} if self.reverse else parts

        return convert


def natural_key(name: str) -> list[Any]:
    """The order in which upstream collects the parts of a merged target."""
    return _core().dot_natural_key(name)


# --- models ---------------------------------------------------------------------------------------------------------


def without_ignored(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Both lists less what the model itself says to ignore, as upstream's report does."""
    missing, unexpected = list(missing), list(unexpected)
    if not is_pretrained_model(model):
        return missing, unexpected
    from types import SimpleNamespace

    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return [n for n in missing if n in info.missing_keys], [n for n in unexpected if n in info.unexpected_keys]


# --- private --------------------------------------------------------------------------------------------------------


def _core() -> Any:
    import transformers.core_model_loading as core

    return core


def _has_operations(rule: Any) -> bool:
    return bool(getattr(rule, "operations", None))


def _is_stock(thing: Any, name: str | None = None) -> bool:
    cls = type(thing)
    convert = getattr(cls, "convert", None)
    return (
        cls.__module__ == _CORE
        and (name is None or cls.__name__ == name)
        and getattr(convert, "__module__", None) == _CORE
        and getattr(convert, "__qualname__", None) == f"{cls.__name__}.convert"
    )


# The attributes each operation's ``convert`` depends on.
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "MergeModulelist": ("dim",),
    "SplitModulelist": ("dim",),
    "Concatenate": ("dim",),
    "Chunk": ("dim",),
    "Split": ("dim",),
    "Transpose": ("dim0", "dim1", "check_dims"),
    "Interleave": ("dim", "inverse"),
    "Conv3dToLinear": (),
    "LinearToConv3d": ("in_channels", "kernel_size"),
    "PermuteForRope": ("inverse", "permute_layer_names"),
    "ErnieFuseAndSplitTextVisionExperts": ("stack_dim", "concat_dim"),
    "ErnieSplitAndDecoupleTextVisionExperts": ("stack_dim", "concat_dim"),
    "VisionFuseAndPermuteForRope": ("dim",),
    "VisionUnfuseAndPermuteForRope": ("dim",),
    "_IdentityOp": (),
}


def _operation(op: Any, config: Any) -> Operation:
    name = type(op).__name__
    if name not in OPERATIONS or not _is_stock(op):
        raise NotLowerable(f"{type(op).__module__}.{name} is not a stock operation with its stock convert")
    options: dict[str, object] = {key: _frozen(getattr(op, key)) for key in _ATTRIBUTES[name] if hasattr(op, key)}
    if name == "PermuteForRope":
        options["heads"] = _rope_heads(op, config)
    elif name.startswith("Vision"):
        options |= dict(_operation(op.permute_op, config).options)
    elif name == "Chunk" and getattr(op, "num_shards_attribute", None) is not None:
        if config is None:
            raise NotLowerable(f"Chunk reads {op.num_shards_attribute} from a config, and there is no model")
        options["num_shards"] = getattr(config.get_text_config(), op.num_shards_attribute)
    return Operation(name, tuple(sorted(options.items())))


def _rope_heads(op: Any, config: Any) -> int:
    # 5.17 fails without permute_layer_names, 5.12 always; what upstream cannot run, we do not pretend to.
    if not hasattr(op, "_permute_for_rope") and getattr(op, "permute_layer_names", None) is None:
        raise NotLowerable("PermuteForRope of this transformers cannot run without permute_layer_names")
    if config is None:
        raise NotLowerable("PermuteForRope reads num_attention_heads from a config, and there is no model")
    if op.subconfig_key is not None:
        config = getattr(config, op.subconfig_key, config)
    return getattr(config, "num_attention_heads", 1)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_ANY = re.compile("")
_LOOKAROUND = re.compile(r"\(\?<?[=!][^()]*\d[^()]*\)")
_ANY_NUMBER = re.compile(r"\\d[+*]|\\[1-9]")
_NUMBER = re.compile(r"(?<![A-Za-z_0-9])\d+|\[[^\]]*\d[^\]]*\]|\\d|\{\d")


def _digit_pattern(rule: Any) -> re.Pattern[str] | None:
    """None if the rule treats all numbers alike; else a pattern that matches whatever it could treat differently.

    A number counts when it can meet a numeric name component: ``layers.0.`` does, the ``1`` of ``w1`` does not. The
    pattern is the rule's own with such numbers widened to any number and look-arounds that hold one dropped, so it
    matches more than the rule, never less.
    """
    compiled = getattr(rule, "compiled_sources", None)
    renames_plainly = type(rule).__module__ == _CORE and type(rule).__name__ in (
        "WeightRenaming",
        "WeightConverter",
        "PrefixChange",
    )
    if compiled is None or type(rule).rename_source_key.__module__ != _CORE:
        return _ANY
    scope = getattr(rule, "scope_prefix", None) or ""
    if any(part.isdecimal() for part in scope.split(".")):
        return _ANY
    plain = _ANY_NUMBER.sub("~", compiled.pattern)
    plain = re.sub(r"\\[A-Za-z]", lambda m: m.group() if m.group() == r"\d" else "~", plain)
    sees_numbers = _NUMBER.search(plain) is not None
    if renames_plainly and not sees_numbers:
        return None
    if not sees_numbers:
        return _unanchored(compiled.pattern)
    widened = _LOOKAROUND.sub("", compiled.pattern)
    if re.search(r"\(\?<?[=!][^)]*\d", widened):
        return _ANY
    return _unanchored(
        re.sub(
            r"(\\[A-Za-z0-9][+*]?|\(\?P<g\d+>)|\[[^\]]*\d[^\]]*\]|\{[^}]*\}|(?<![A-Za-z_0-9])\d+",
            lambda m: r"\d+" if m.group(1) in (None, r"\d") else m.group(1),
            widened,
        )
    )


def _unanchored(pattern: str) -> re.Pattern[str]:
    """The pattern without ``^``: a scoped rule matches behind its prefix."""
    return re.compile(re.sub(r"(^|[|(>])\^", r"\1", pattern))
