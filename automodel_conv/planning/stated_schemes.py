"""Find the schemes that a config states for one module, by its name.

A config names modules of the model, or patterns of such names. The names of tensors differ from them in a few ways,
which are tried in this order, the most exact first:

1. the module itself; for a projection that is stored fused, its parts; for an expert, the same projection of all
   experts, with the component "experts" or without
2. a module that contains it, the innermost first
3. a pattern

Source: vLLM 0.33.0, ``ModelOptMixedPrecisionConfig._resolve_quant_algo`` and ``_quantized_layer_prefix_candidates`` in
``model_executor/layers/quantization/modelopt.py``. There, names of vLLM's modules are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from automodel_conv.planning.methods.method import Scheme

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
_EXPERT = re.compile(r"(?<=\.experts)\.\d+(?=\.)")
_WRAPPERS = ("language_model.model.", "model.language_model.")


class StatedSchemes:
    """The schemes of a config, by the modules that it states them for."""

    def __init__(self, schemes: Sequence[Scheme]):
        self._by_name: dict[str, list[Scheme]] = {}
        self._by_pattern = [(pattern, scheme) for scheme in schemes for pattern in scheme.modules.patterns]
        for scheme in schemes:
            for name in scheme.modules.names:
                self._by_name.setdefault(name, []).append(scheme)
                for_all = _EXPERT.sub("", name)
                if for_all != name and scheme not in self._by_name.setdefault(for_all, []):
                    self._by_name[for_all].append(scheme)

    def of(self, weight: str) -> list[Scheme]:
        """Return the schemes that the config states for the module of a weight; none if it states none for it."""
        if not self._by_name and not self._by_pattern:
            return []
        module = weight.removesuffix(".weight")
        for names in _lookups(module):
            stated = [scheme for name in names for scheme in self._by_name.get(name, ())]
            if stated:
                return list(dict.fromkeys(stated))
        spellings = list(_spellings(module))
        matching = [scheme for pattern, scheme in self._by_pattern if any(map(pattern.fullmatch, spellings))]
        return list(dict.fromkeys(matching))


def _lookups(module: str) -> Iterator[list[str]]:
    """Yield groups of names under which a config may list a module, the most exact first."""
    of_all_experts = _EXPERT.sub("", module)
    without_experts = of_all_experts.replace(".experts.", ".")
    for name in dict.fromkeys((module, of_all_experts, without_experts)):
        parent, _, projection = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in _FUSED.get(projection, ())]
        yield list(_spellings(name))
        if parts:
            yield [spelling for part in parts for spelling in _spellings(part)]
    parent = module.rpartition(".")[0]
    while parent:
        yield list(_spellings(parent))
        parent = parent.rpartition(".")[0]


def _spellings(name: str) -> Iterator[str]:
    """Yield a name as it may be spelled in configs: with its own prefix, or with that of another release."""
    yield name
    if name.endswith(".lm_head"):
        yield "lm_head"
    for prefix, other in (_WRAPPERS, _WRAPPERS[::-1]):
        if name.startswith(prefix):
            yield other + name.removeprefix(prefix)
