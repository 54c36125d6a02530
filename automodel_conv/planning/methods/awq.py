"""The AWQ method in the format "gemm": INT4 packed along the output features, in an order of its own.

An I32 of ``qweight`` [in, out / 8] holds eight consecutive output features of an input feature, in the order
0, 2, 4, 6, 1, 3, 5, 7. Zero points [in / group, out / 8] have this order too, and scales [in / group, out] the natural
one.

Sources: AutoAWQ 0.2.9, ``utils/packing_utils.py`` and ``modules/linear/gemm.py``; vLLM 0.33.0, ``auto_awq.py``;
transformers 5.24.0, ``AwqConfig`` in ``utils/quantization_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.arrangement import permuted_words
from automodel_conv.planning.copies import ZeroPacking
from automodel_conv.planning.methods.method import FLOAT_SCALES, Method, Packing, Scheme, UnsupportedScheme, block_of


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    bits = config["bits"] if "bits" in config else config["w_bit"]
    group = config.get("group_size", config.get("q_group_size", 128))
    stated = next((config[key] for key in ("version", "checkpoint_format", "format") if config.get(key)), "gemm")
    if config.get("backend") == "llm-awq":
        stated = "llm-awq"
    if str(stated).lower() != "gemm":
        raise UnsupportedScheme(f"the format {str(stated).lower()} of awq", "gemm")
    if bits != 4:
        raise UnsupportedScheme(f"awq with {bits}-bit codes", "4-bit codes")
    rows = None if group == -1 else block_of((group, 1))[0]
    zero_points = bool(config.get("zero_point", True))
    return [Scheme("int4", (rows, 1), FLOAT_SCALES, zero_points, zero_packing=ZeroPacking(by_columns=True))]


AWQ = Method(
    name="awq",
    schemes=_schemes,
    codes=(Packing(".qweight", "I32", "int4", arrangement=permuted_words(2, 4).transposed(), scale_word=(4, 2)),),
    scales=(".scales",),
    zero_points=".qzeros",
)
