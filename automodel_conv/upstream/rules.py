"""Apply transformers' rule objects: ``RuleSet`` implements the protocol ``Rules`` of ``planning/rules.py``.

The *installed* rule objects rename through the installed ``rename_source_key``. Its pattern semantics changed three
times between 5.0 and 5.24, so it is never re-implemented here. Operations become data only if their class is
transformers' own with an unpatched ``convert``. All other operations run as transformers runs them, one target at a
time.

Rule objects carry run-time state, so a ``RuleSet`` works on deep copies and never changes the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch.utils._contextlib

from automodel_conv.planning.operations import (
    OPERATIONS,
    NotLowerable,
    Operation,
    options_of,
)
from automodel_conv.upstream.digits import ANY_NAME, digit_pattern
from automodel_conv.upstream.registry import CORE_MODULE, is_pretrained_model


def natural_key(name: str) -> list[Any]:
    """Return the sort key by which transformers orders the parts of a merged target."""
    return _core().dot_natural_key(name)


class RuleSet:
    """An ordered list of rules for the names of one checkpoint; see the module's docstring.

    Guarded renames remember the names that they have seen, so each checkpoint needs its own ``RuleSet``.

    Args:
        rules: transformers' ``WeightRenaming`` and ``WeightConverter`` objects; may be empty.
        model: the model whose config and parameter shapes operations look up; None if they look up neither.
        reverse: whether to use the rules in the saving direction: on model names, converters before renamings.
    """

    def __init__(self, rules: Iterable[Any] | None, model: Any = None, *, reverse: bool = False):
        rules = deepcopy(list(rules or ()))
        if reverse:
            rules = [rule.reverse_transform() for rule in rules[::-1]]
        self._rules = rules
        self.converters = [rule for rule in rules if _has_operations(rule)]
        self.renamings = [rule for rule in rules if not _has_operations(rule)]
        self.reverse = reverse
        self.model = model
        self.base_model_prefix: str | None = model.base_model_prefix if is_pretrained_model(model) else None
        self._row_of = {p: row for row, rule in enumerate(self.converters) for p in rule.source_patterns}
        self._probes = deepcopy(self.renamings)  # some renamings change state when they match
        self._digit_rules = [
            pattern for rule in (*self.renamings, *self.converters) if (pattern := digit_pattern(rule)) is not None
        ]

    def __len__(self) -> int:
        return len(self.converters) + len(self.renamings)

    @property
    def used(self) -> list[bool]:
        """Whether each of the given rules has matched a name so far; True if transformers is too old to record it."""
        return [rule.was_used() if hasattr(rule, "was_used") else True for rule in self._rules]

    def rename(self, name: str) -> tuple[str, int, str]:
        """Return ``(target name, converter row or -1, source pattern)``, without the model's prefix.

        A name that a reversed converter matches is not renamed further. Its parts are, by ``rename_part``.
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
        """Return the final name of a tensor that a reversed converter has produced."""
        return _core().rename_source_key(name, self.renamings, [])[0] if self.renamings else name

    def with_prefix(self, name: str, targets: Mapping[str, object]) -> str:
        """Return the name with the model's base prefix added or removed if that is a target, else the name itself."""
        prefix = self.base_model_prefix
        if prefix is None or not (name.startswith(prefix) or f"{prefix}.{name}" in targets):
            return name
        return _core().rename_source_key(name, [], [], self.base_model_prefix, targets)[0]

    def looks_at_digits(self, name: str) -> bool:
        """Return whether a rule might treat this name differently if it had other numbers.

        ``name`` represents all names that differ from it only in purely numeric components.
        """
        if not self._digit_rules:
            return False
        names = [name]
        for renaming in self._probes:
            names.append(renaming.rename_source_key(names[-1])[0])
        return any(pattern is ANY_NAME or pattern.search(n) for pattern in self._digit_rules for n in names)

    def natural_key(self, name: str) -> Any:
        """Return the sort key by which transformers orders the parts of a merged target."""
        return natural_key(name)

    def patterns(self, row: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the source and target patterns of a converter."""
        rule = self.converters[row]
        return tuple(rule.source_patterns), tuple(rule.target_patterns)

    def describe(self, row: int) -> str:
        """Return a converter in words."""
        sources, targets = self.patterns(row)
        operations = ", ".join(repr(operation) for operation in self.converters[row].operations)
        return f"{' + '.join(sources)} -> {' + '.join(targets)}: {operations}"

    def operations(self, row: int) -> tuple[Operation, ...]:
        """Return the operations of a converter as data.

        Raises:
            NotLowerable: the converter or one of its operations is not transformers' own.
        """
        rule = self.converters[row]
        if not _is_stock(rule, "WeightConverter"):
            raise NotLowerable(f"{type(rule).__name__} is not transformers' own WeightConverter")
        if getattr(rule, "quantization_operation", None) or getattr(rule, "distributed_operation", None):
            raise NotLowerable("the rule carries a quantization or distributed operation")
        return tuple(_operation(operation, self._config()) for operation in rule.operations)

    def on_host(self, row: int) -> bool:
        """Return whether transformers runs the operations of a converter on the CPU, on any target device."""
        return bool(getattr(self.converters[row], "force_cpu", False))

    def _config(self) -> Any:
        return getattr(self.model, "config", None)

    def upstream(
        self, row: int, target: str, slots: Mapping[str, Sequence[int]], cast: Mapping[int, Any]
    ) -> Callable[..., dict[str, Any]]:
        """Return transformers' conversion of a target, a function from ``{source row: tensor}`` to ``{name: tensor}``.

        Args:
            row: row of the converter.
            target: name of the target.
            slots: source rows by source pattern.
            cast: dtypes, by source row, that sources are cast to before all operations.
                Source: transformers 5.24.0, ``_materialize_copy`` in ``core_model_loading.py``.
        """
        model, config = self.model, self._config()
        rule = self.converters[row]

        def convert(tensors: Mapping[int, Any]) -> dict[str, Any]:
            converter = deepcopy(rule)
            for pattern, rows in slots.items():
                for source in rows:
                    tensor = tensors[source]
                    converter.add_tensor(target, target, pattern, tensor.to(cast.get(source, tensor.dtype)))
            converted = converter.convert(target, model=model, config=config)
            parts = {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
            return {self.rename_part(name): value for name, value in parts.items()} if self.reverse else parts

        return convert


def _core() -> Any:
    import transformers.core_model_loading as core

    return core


def _has_operations(rule: Any) -> bool:
    return bool(getattr(rule, "operations", None))


def _is_stock(thing: Any, name: str | None = None) -> bool:
    """Return whether the class and its ``convert`` are transformers' own, not patched."""
    cls = type(thing)
    if cls.__module__ != CORE_MODULE or (name is not None and cls.__name__ != name):
        return False
    if "convert" in getattr(thing, "__dict__", ()):
        return False
    # A patch by functools.wraps has the right name and module, but its code is in another file.
    files = {_core().__file__, torch.utils._contextlib.__file__}  # the latter holds @torch.no_grad
    function = getattr(cls, "convert", None)
    while function is not None:
        if getattr(getattr(function, "__code__", None), "co_filename", None) not in files:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _operation(op: Any, config: Any) -> Operation:
    name = type(op).__name__
    if name not in OPERATIONS or not _is_stock(op):
        raise NotLowerable(f"{type(op).__module__}.{name} is not a stock operation with its stock convert")
    return Operation(name, options_of(op, OPERATIONS[name], config))
