"""The experts of Inkling2Loop's checkpoints: NVFP4 with a quotient as global scale, or MXFP8.

Their configs do not mention quantization; an operation of transformers' rules decodes them. NVFP4's global scale is
``amax / outer_scale_denominator``, one for each expert. transformers rounds both to the dtype of the parameter first.
Source: transformers 5.24.0, ``Inkling2LoopDequantizeExperts`` in ``core_model_loading.py``.
"""

from __future__ import annotations

from automodel_conv.planning.methods.method import FP8_SCALES, Method, Packing, Scheme

INKLING2_LOOP = Method(
    name="inkling2_loop",
    model_types=("inkling2_loop", "inkling2_loop_text"),
    schemes=lambda config: [
        Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True),
        Scheme("e4m3", (1, 32), frozenset({"U8"})),
    ],
    codes=(Packing("", "U8", "e2m1"), Packing("", "F8_E4M3", "e4m3")),
    scales=("_scale",),
    global_scale=("_amax",),
    global_divisor="_outer_scale_denominator",
    like_upstream=True,
)
