"""Block-wise FP8 checkpoints of which modelopt quantized some modules further, such as the experts of DeepSeek-V4.

Sources: the config of DeepSeek-V4-Flash-NVFP4, whose ``quant_method`` is ``fp8``; vLLM 0.33.0, ``DeepseekV4FP8Config``
in ``models/deepseek_v4/quant_config.py``, which reads ``moe_quant_algo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from automodel_conv.planning.methods.fp8 import FP8
from automodel_conv.planning.methods.method import Scheme, modules_of
from automodel_conv.planning.methods.modelopt import MODELOPT, modelopt_schemes

_EXPERTS = modules_of(["*.experts", "*.experts.*"])


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    of_experts = config.get("moe_quant_algo")
    if of_experts is None or config.get("quantized_layers"):
        return [*FP8.schemes(config), *modelopt_schemes(config)]
    stated = modelopt_schemes({"quant_algo": of_experts, "group_size": config.get("group_size")})
    return [*FP8.schemes(config), *(scheme._replace(modules=_EXPERTS) for scheme in stated)]


FP8_WITH_MODELOPT = replace(
    FP8,
    schemes=_schemes,
    codes=(*FP8.codes, *(packing for packing in MODELOPT.codes if packing.dtype == "U8")),
    scales=tuple(dict.fromkeys((*FP8.scales, *MODELOPT.scales))),
    global_scale=MODELOPT.global_scale,
    dropped=tuple(dict.fromkeys((*FP8.dropped, *MODELOPT.dropped))),
    refused=MODELOPT.refused,
)
