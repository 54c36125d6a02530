"""The quantization methods that this package decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.methods.awq import AWQ
from automodel_conv.planning.methods.compressed_tensors import COMPRESSED_TENSORS
from automodel_conv.planning.methods.fbgemm_fp8 import FBGEMM_FP8
from automodel_conv.planning.methods.fp8 import FP8
from automodel_conv.planning.methods.fp8_with_modelopt import FP8_WITH_MODELOPT
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

_BY_ALIAS = {alias: method for method in METHODS.values() for alias in method.aliases}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """Return the method of a ``quantization_config``; None if it is not in ``METHODS``."""
    name = config.get("quant_method")
    if not isinstance(name, str):
        return None
    method = METHODS.get(name) or _BY_ALIAS.get(name)
    return FP8_WITH_MODELOPT if method is FP8 and config.get("quant_algo") is not None else method
