"""The MXFP4 method of gpt-oss, which stores weights of ``[..., columns, rows]`` as ``[..., rows, groups, 16]`` bytes.

Sources: OCP Microscaling Formats 1.0; transformers 5.24.0, ``integrations/mxfp4.py``; the files of gpt-oss.
"""

from __future__ import annotations

from automodel_conv.planning.arrangement import TRANSPOSED
from automodel_conv.planning.methods.method import EXPONENT_SCALES, Method, Packing, Scheme

MXFP4 = Method(
    name="mxfp4",
    schemes=lambda config: [Scheme("e2m1", (1, 32), EXPONENT_SCALES)],
    codes=(Packing("_blocks", "U8", "e2m1", group=16, arrangement=TRANSPOSED),),
    scales=("_scales",),
)
