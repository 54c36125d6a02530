"""The block-wise FP8 method of DeepSeek-V3 and the models that adopted it.

Sources: transformers 5.24.0, ``FineGrainedFP8Config`` in ``utils/quantization_config.py`` and
``integrations/finegrained_fp8.py``; the files of DeepSeek-V3, Qwen3-FP8, MiniMax-M2 (``_scale_inv``), DeepSeek-V4
(``.scale``; experts are FP4 in I8), Mistral (``.qscale_*``) and Qwen3.8-Flash-Next-FP8. Its n-gram embedding has shards
(``ngram_embedding.shard_0.weight``) and one scale, ``ngram_embedding.weight_scale`` (vLLM pull request 53896).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.methods.method import (
    CHANNEL,
    EXPONENT_SCALES,
    FLOAT_SCALES,
    FP8_CODES,
    TENSOR,
    Method,
    Packing,
    Scheme,
    block_of,
)


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    blocks = [TENSOR, CHANNEL]
    if "weight_block_size" not in config:  # transformers' default; vLLM's default is one scale per tensor
        blocks.insert(0, (128, 128))
    elif config["weight_block_size"] is not None:
        blocks = [block_of(config["weight_block_size"])]
    fp8 = [Scheme(format, block, FLOAT_SCALES | EXPONENT_SCALES) for format in ("e4m3", "e5m2") for block in blocks]
    # DeepSeek-V4's FP4 experts: the config states only the block of the other weights.
    return [*fp8, Scheme("e2m1", (1, 32), EXPONENT_SCALES)]


FP8 = Method(
    name="fp8",
    schemes=_schemes,
    codes=(*FP8_CODES, Packing("", "I8", "e2m1"), Packing("", "F4", "e2m1")),
    scales=("_scale_inv", "_scale", ".scale", ".qscale_weight"),
    shared=re.compile(r"ngram_embedding(\.shard_\d+)?\.weight$"),
    dropped=(".activation_scale", "_activation_scale", ".input_scale", ".qscale_act"),
)
