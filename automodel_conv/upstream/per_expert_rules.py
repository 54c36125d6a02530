"""Rules for per-expert tensors of types that are published with grouped experts.

Tools that quantize single matrices divide grouped experts first, and write ``experts.0.gate_proj.weight`` and so on for
any type. transformers has no rules for these names in types that are published grouped, such as Granite, Gemma 4 and
gpt-oss, and would initialize their experts.

Sources: NVIDIA Model Optimizer 0.47, ``get_expert_linear_names`` in ``torch/export/layer_utils.py``; files of
llm-compressor (sglang pull request 37679, vLLM pull request 39256).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from automodel_conv.planning.layouts import ExpertLayout
from automodel_conv.upstream.models import expert_layouts
from automodel_conv.upstream.registry import holds_pretrained
from automodel_conv.upstream.rules import RuleSet

_NAME = r"\.experts\.\d+\.(?:gate|up|down)_proj\.{kind}$"
_ANY_EXPERT = re.compile(r"\*|\\d")  # in a pattern: stands for the number of an expert


def per_expert_rules(model: nn.Module | None, rules: Sequence[Any], names: Iterable[str]) -> list[Any]:
    """Return the rules that group per-expert tensors as a model has them, or none if it has rules for such tensors.

    Own rules for per-expert tensors under other names (``experts.0.w1.weight``) mean that these files are not of the
    model's type.

    Args:
        model: the model, or None.
        rules: the model's own rules.
        names: names of the tensors; those of decoded weights if tensors are quantized.
    """
    if model is None or not holds_pretrained(model):
        return []
    own = RuleSet(rules, model)
    patterns = [pattern for row in range(len(own.converters)) for pattern in own.patterns(row)[0]]
    layouts = set(expert_layouts(model).values())
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None or any("experts" in pattern and _ANY_EXPERT.search(pattern) for pattern in patterns):
        return []
    if layout.interleaved and not _has_interleave():
        return []
    text = "\n".join(names)
    examples = {kind: _line(text, re.compile(_NAME.format(kind=kind), re.MULTILINE)) for kind in ("weight", "bias")}
    return [
        rule
        for kind, name in examples.items()
        if name is not None and own.rename(name)[1] < 0
        for rule in _grouping_rules(layout, kind)
    ]


def _line(text: str, pattern: re.Pattern[str]) -> str | None:
    """Return the first line that ends with a pattern."""
    match = pattern.search(text)
    return None if match is None else text[text.rfind("\n", 0, match.start()) + 1 : match.end()]


def _has_interleave() -> bool:
    """Return whether the installed transformers has the operation; 5.12 does not."""
    from transformers import core_model_loading

    return hasattr(core_model_loading, "Interleave")


def _grouping_rules(layout: ExpertLayout, kind: str) -> Iterator[Any]:
    """Yield the rules that group the weights or the biases of experts.

    Args:
        layout: the layout of the model's experts.
        kind: "weight" or "bias".
    """
    from transformers import core_model_loading as core

    transposing = [core.Transpose(dim0=1, dim1=2)] if layout.transposed and kind == "weight" else []
    interleaving = [core.Interleave(dim=1 + len(transposing), inverse=True)] if layout.interleaved else []
    gate_up = ["gate", "up"] if layout.gated else ["up"]
    joining = [core.Concatenate(dim=1), *transposing, *interleaving] if layout.gated else transposing
    for projections, operations in ((gate_up, joining), (["down"], transposing)):
        yield core.WeightConverter(
            source_patterns=[rf"\.experts.*.{projection}_proj.{kind}" for projection in projections],
            target_patterns=f".experts.{'_'.join(projections)}_proj{'' if kind == 'weight' else '_bias'}",
            operations=[core.MergeModulelist(dim=0), *operations],
        )
