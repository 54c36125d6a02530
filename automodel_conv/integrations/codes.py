"""Codes of quantized tensors that transformers would take for numbers.

transformers casts a tensor to the dtype of its parameter. Codes need their scales before: a quantizer puts an operation
into the rules that takes both, or parameters into the model that keep both. Otherwise the scales are unexpected keys,
of which transformers warns, and the parameters are wrong by a factor, of which it says nothing.
Source: transformers 5.23.0, ``convert_and_load_state_dict_in_model`` in ``core_model_loading.py``.
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
from automodel_conv.planning.resolve import all_targets, resolve
from automodel_conv.planning.schemes import is_of_kv_cache
from automodel_conv.upstream.models import matching
from automodel_conv.upstream.rules import RuleSet


def refuse_codes(model: Any, sources: Mapping[str, Any], load_config: Any) -> None:
    """Refuse a load in which codes would become numbers without their scales.

    Codes that no parameter takes pass, and those that a quantizer takes with their scales. So do FP8 tensors without
    a scale beside them, unless the config says that they are quantized, by a method whose scales are known here or that
    transformers does not know: alone they are plain numbers of few bits.

    Args:
        sources: what transformers is about to load, tensors or lazy slices of them.
        load_config: transformers' own, of this load.

    Raises:
        QuantizationError: names each such tensor, its scale, and what would become of it.
    """
    dtypes = {name: code for name, source in sources.items() if (code := _dtype(source)) not in FLOATING}
    beside = _unknown_scales(sources)
    known = CodeNames.of_all_methods()
    scales = {
        name: [scale for scale in known.scale_names(name) if scale in sources]
        or [scale for parent in (name, name.rpartition(".")[0]) for scale in beside.get(parent, ())]
        for name in dtypes
    }
    suspects = [name for name, dtype in dtypes.items() if dtype and (scales[name] or known.needs_scale(name, dtype))]
    if not suspects:
        return
    rules = RuleSet(load_config.weight_mapping, model)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    places, made = _places(list(sources), rules, state)
    planned = matching(load_config.dtype_plan or {})
    method = quantization_method(model, load_config.hf_quantizer)
    # transformers warns of a method that it does not know, and loads as if there were none.
    is_quantized = method in METHODS or (method is not None and load_config.hf_quantizer is None)
    problems = []
    for name in suspects:
        place = places.get(name)
        if place is None or not only_moves(rules, place.rule):
            continue
        wanted = dtype_code(planned(place.target) or state[place.target].dtype)
        into_numbers = wanted in FLOATING or quantizes(load_config.hf_quantizer, model, place.target)
        found = f"{name} is {dtypes[name]}"
        becomes = f"transformers would cast it for {place.target}, which is {wanted}"
        if scales[name]:
            if into_numbers and places.keys().isdisjoint(scales[name]):
                scale = scales[name][0]
                problems.append(
                    f"{found}, its scale is {scale} ({_dtype(sources[scale])}): {becomes}, without the scale"
                )
        elif is_quantized and into_numbers:
            problems.append(f"{found}, and it has no known scale: {becomes}")
        elif is_quantized:
            kept = [scale for scale in known.scale_names(place.target) if scale in state]
            if kept and made.isdisjoint(kept):
                problems.append(f"{found}, and it has no known scale: transformers would make {kept[0]} up")
    if problems:
        raise QuantizationError(
            message(
                "transformers would take codes of quantized tensors for numbers",
                where=f"a load of {type(model).__name__}, {len(problems)} tensors",
                expected="that its quantizer takes codes with their scales, as the quantization_config tells it",
                found="\n" + listing(problems),
                do=[
                    f"{'give config.json' if method is None else 'check that config.json has'} the quantization_config "
                    "of these files",
                    "load_model() and load_state_dict() decode what it describes, also by methods that transformers "
                    "does not know",
                    "uninstall(), or a load outside of the block of accelerate_transformers(), lets transformers take "
                    "the codes",
                ],
            )
        )


class _Place(NamedTuple):
    """The target that a source goes to: the first of its rule."""

    target: str
    rule: int


def _unknown_scales(names: Iterable[str]) -> dict[str, list[str]]:
    """Scales of whatever name, by the module or the tensor that they lie in; not those of a KV cache."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if "scale" in leaf and not is_of_kv_cache(name):
            found.setdefault(parent, []).append(name)
    return found


def _places(names: list[str], rules: RuleSet, state: Mapping[str, Tensor]) -> tuple[dict[str, _Place], set[str]]:
    """The places of the sources that go to the model, and all that is made of them."""
    places: dict[str, _Place] = {}
    made: set[str] = set()
    for target, rule, slots in resolve(names, rules, state).assignments:
        made.update(all_targets(rules, rule, target))
        places |= dict.fromkeys([names[row] for rows in slots.values() for row in rows], _Place(target, rule))
    return places, made


def _dtype(source: Any) -> str | None:
    """The dtype of a tensor or of a lazy slice, as safetensors writes it; None of anything else."""
    if isinstance(source, Tensor):
        return dtype_code(source.dtype)
    return source.get_dtype() if hasattr(source, "get_dtype") else None
