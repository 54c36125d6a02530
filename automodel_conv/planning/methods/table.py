"""The quantization methods that this package decodes."""

from __future__ import annotations

from automodel_conv.planning.methods.awq import AWQ
from automodel_conv.planning.methods.compressed_tensors import COMPRESSED_TENSORS
from automodel_conv.planning.methods.fbgemm_fp8 import FBGEMM_FP8
from automodel_conv.planning.methods.fp8 import FP8
from automodel_conv.planning.methods.gptq import GPTQ
from automodel_conv.planning.methods.inkling2_loop import INKLING2_LOOP
from automodel_conv.planning.methods.method import Method
from automodel_conv.planning.methods.modelopt import MODELOPT
from automodel_conv.planning.methods.mxfp4 import MXFP4
from automodel_conv.planning.methods.quark import QUARK

METHODS: dict[str, Method] = {
    method.name: method
    for method in (FP8, FBGEMM_FP8, MXFP4, COMPRESSED_TENSORS, MODELOPT, QUARK, GPTQ, AWQ, INKLING2_LOOP)
}
"""Methods by name. To add a method, import it and add it to this tuple."""
