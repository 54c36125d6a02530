"""The FBGEMM method: FP8 with one scale per row.

Source: transformers 5.24.0, ``FbgemmFp8Config`` in ``utils/quantization_config.py``.
"""

from __future__ import annotations

from automodel_conv.planning.methods.method import CHANNEL, FLOAT_SCALES, FP8_CODES, Method, Scheme

FBGEMM_FP8 = Method(
    name="fbgemm_fp8",
    schemes=lambda config: [Scheme("e4m3", CHANNEL, FLOAT_SCALES)],
    codes=FP8_CODES,
    scales=("_scale",),
    dropped=(".input_scale_ub",),
)
