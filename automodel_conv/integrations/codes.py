"""Detect codes of quantized tensors that transformers would mistake for values.

transformers casts a tensor to the dtype of its parameter, but codes must be combined with their scales first. A
quantizer does so by an operation in the rules that consumes both, or by parameters in the model that keep both.
Otherwise transformers warns that the scales are unexpected keys, and silently loads parameters that are wrong by a
factor. Source: transformers 5.24.0, ``convert_and_load_state_dict_in_model`` in ``core_model_loading.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.errors import QuantizationError, listing, message
from automodel_conv.integrations.quantizers import only_moves, quantization_method, quantizes
from automodel_conv.planning.code_names import CodeNames
from automodel_conv.planning.methods.table import METHODS
from automodel_conv.planning.problem_kinds import ProblemKinds
from automodel_conv.planning.resolve import all_targets, resolve
from automodel_conv.planning.schemes import is_of_kv_cache
from automodel_conv.upstream.models import matching
from automodel_conv.upstream.rules import RuleSet


def refuse_codes(model: Any, sources: Mapping[str, Any], load_config: Any) -> None:
    """Refuse a load that would cast codes to values without their scales.

    Codes are accepted if no parameter consumes them, or if a quantizer consumes them with their scales. FP8 tensors
    without a scale are plain values of few bits and are accepted too, unless the config declares them as quantized by a
    method that this package supports or that transformers does not.

    Args:
        model: model that is loaded.
        sources: tensors that transformers is about to load, or lazy slices of them.
        load_config: configuration of this load by transformers.

    Raises:
        QuantizationError: the load would misread codes; the error names each tensor, its scale, and its parameter.
    """
    suspects = _suspects(sources)
    if not suspects:
        return
    known = CodeNames.of_all_methods()
    rules = RuleSet(load_config.weight_mapping, model)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    places, filled = _places(list(sources), rules, state)
    planned_dtype = matching(load_config.dtype_plan or {})
    method = quantization_method(model, load_config.hf_quantizer)
    # transformers only warns about a method that it does not support, and loads as if nothing were quantized.
    is_quantized = method in METHODS or (method is not None and load_config.hf_quantizer is None)
    problems = ProblemKinds()
    for name, dtype, scales in suspects:
        place = places.get(name)
        if place is None or not only_moves(rules, place.rule):
            continue
        wanted = dtype_code(planned_dtype(place.target) or state[place.target].dtype)
        into_values = wanted in FLOATING or quantizes(load_config.hf_quantizer, model, place.target)
        stored, becomes = f"{{}} is {dtype}", f"transformers would cast it for {{}}, which is {wanted}"
        if scales:
            if into_values and places.keys().isdisjoint(scales):
                kind = f"{stored}, its scale is {{}} ({_dtype(sources[scales[0]])}): {becomes}, without the scale"
                problems.add(kind, name, scales[0], place.target)
        elif is_quantized and into_values:
            problems.add(f"{stored}, and it has no known scale: {becomes}", name, place.target)
        elif is_quantized:
            kept = [scale for scale in known.scale_names(place.target) if scale in state]
            if kept and filled.isdisjoint(kept):
                kind = f"{stored}, and it has no known scale: transformers would initialize {{}} instead of loading it"
                problems.add(kind, name, kept[0])
    if problems:
        raise _misread(model, method, problems)


class _Suspect(NamedTuple):
    """A source that may be codes."""

    name: str
    dtype: str
    """Dtype code."""
    scales: list[str]
    """Names of the sources that may be its scales."""


def _suspects(sources: Mapping[str, Any]) -> list[_Suspect]:
    """Return the sources that have scales, or that must have them."""
    other_scales = _scales_by_parent(sources)
    known = CodeNames.of_all_methods()
    suspects = []
    for name, source in sources.items():
        dtype = _dtype(source)
        if dtype is None or dtype in FLOATING:
            continue
        scales = [scale for scale in known.scale_names(name) if scale in sources]
        scales = scales or [s for parent in (name, name.rpartition(".")[0]) for s in other_scales.get(parent, ())]
        if scales or known.needs_scale(name, dtype):
            suspects.append(_Suspect(name, dtype, scales))
    return suspects


def _misread(model: Any, method: str | None, problems: ProblemKinds) -> QuantizationError:
    """Return the error for codes that transformers would load as values.

    Args:
        model: model that is loaded.
        method: quantization method of its config, if any.
        problems: the misread tensors.
    """
    return QuantizationError(
        message(
            "transformers would load codes of quantized tensors as values",
            where=f"a load of {type(model).__name__}, {len(problems)} tensors",
            expected="a quantizer that loads codes with their scales, as the quantization_config describes",
            found="\n" + listing(problems.texts(most=20)),
            do=[
                f"{'give config.json' if method is None else 'check that config.json has'} the quantization_config "
                "of these files",
                "load_model() and load_state_dict() decode what it describes, including methods that transformers "
                "does not support",
                "uninstall(), or a load outside of the block of accelerate_transformers(), makes transformers "
                "load the codes",
            ],
        )
    )


class _Place(NamedTuple):
    """The target that a source is loaded into."""

    target: str
    """Name of the first target of the rule."""
    rule: int
    """Index of the rule; -1 if the source is only renamed."""


def _scales_by_parent(names: Iterable[str]) -> dict[str, list[str]]:
    """Return tensors with "scale" in their last component by the name before it, without those of KV caches."""
    scales: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if "scale" in leaf and not is_of_kv_cache(name):
            scales.setdefault(parent, []).append(name)
    return scales


def _places(names: list[str], rules: RuleSet, state: Mapping[str, Tensor]) -> tuple[dict[str, _Place], set[str]]:
    """Return the places of the sources that the model consumes, and the names of all targets that they fill."""
    places: dict[str, _Place] = {}
    filled: set[str] = set()
    for target, rule, slots in resolve(names, rules, state).assignments:
        filled.update(all_targets(rules, rule, target))
        places |= dict.fromkeys([names[row] for rows in slots.values() for row in rows], _Place(target, rule))
    return places, filled


def _dtype(source: Any) -> str | None:
    """Return the safetensors dtype code of a tensor or a lazy slice; None for other objects."""
    if isinstance(source, Tensor):
        return dtype_code(source.dtype)
    return source.get_dtype() if hasattr(source, "get_dtype") else None
