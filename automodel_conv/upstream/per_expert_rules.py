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

_NAMES = {
    kind: re.compile(rf"^.+\.experts\.\d+\.(?:gate|up|down)_proj\.{kind}$", re.MULTILINE) for kind in ("weight", "bias")
}


def per_expert_rules(model: nn.Module | None, rules: Sequence[Any], names: Iterable[str]) -> list[Any]:
    """Return the rules that group per-expert tensors as a model has them, or none if the model's own rules do.

    Args:
        model: the model, or None.
        rules: the model's own rules.
        names: names of the tensors; those of decoded weights if tensors are quantized.
    """
    if model is None or not holds_pretrained(model):
        return []
    text = "\n".join(names)
    examples = {kind: match.group() for kind, pattern in _NAMES.items() if (match := pattern.search(text)) is not None}
    layouts = set(expert_layouts(model).values()) if examples else set()
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None:
        return []
    own = RuleSet(rules, model)
    return [
        rule for kind, name in examples.items() if own.rename(name)[1] < 0 for rule in _grouping_rules(layout, kind)
    ]


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
