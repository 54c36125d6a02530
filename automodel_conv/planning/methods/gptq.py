"""The GPTQ method: INT4 packed along the input features, with groups of input features in their order.

An I32 of ``qweight`` [in / 8, out] holds eight consecutive input features of an output feature. Scales are
[in / group, out], and zero points [in / group, out / 8]. Version 1 of the format stores zero points less one.

Sources: GPTQModel 5.4, ``nn_modules/qlinear/torch.py`` and ``convert_gptq_v1_to_v2_format_module`` in
``utils/model.py``; vLLM 0.33.0, ``auto_gptq.py`` and ``normalize_and_validate_gptq_desc_act`` in ``gptq_utils.py``;
transformers 5.24.0, ``GPTQConfig`` in ``utils/quantization_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.arrangement import rows_in_words
from automodel_conv.planning.copies import ZeroPacking
from automodel_conv.planning.methods.method import FLOAT_SCALES, Method, Packing, Scheme, UnsupportedScheme, block_of

_IN_I32 = 8
# Each zero point is stored less one, by a subtraction from the whole element. The addition restores any zero point.
_FORMATS = {"gptq": ZeroPacking(by_columns=True, added=0x11111111), "gptq_v2": ZeroPacking(by_columns=True)}


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    stated = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if stated not in _FORMATS or config.get("is_marlin_format"):
        raise UnsupportedScheme(f"the format {'marlin' if stated in _FORMATS else stated} of gptq", sorted(_FORMATS))
    # A pattern of modules that begins with "-:" has no codes.
    overrides = [value for pattern, value in (config.get("dynamic") or {}).items() if not pattern.startswith("-:")]
    return [_scheme({**config, **override}, _FORMATS[stated]) for override in ({}, *overrides)]


def _scheme(config: Mapping[str, Any], zero_packing: ZeroPacking) -> Scheme:
    bits, group = config["bits"], config.get("group_size", 128)
    if bits != 4:
        raise UnsupportedScheme(f"gptq with {bits}-bit codes", "4-bit codes")
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedScheme(f"gptq packed in {config['pack_dtype']}", "int32")
    if config.get("desc_act") and group != -1 and not config.get("static_groups"):
        raise UnsupportedScheme("gptq's groups by activation order (desc_act)", "desc_act false, or static_groups true")
    if group == -1:
        return Scheme("int4", (None, _IN_I32), FLOAT_SCALES, zero_points=True, zero_packing=zero_packing)
    if group % _IN_I32:
        raise UnsupportedScheme(f"gptq with groups of {group}", f"groups of a multiple of {_IN_I32}, or -1")
    block = block_of((group // _IN_I32, _IN_I32))
    return Scheme("int4", block, FLOAT_SCALES, zero_points=True, zero_packing=zero_packing)


GPTQ = Method(
    name="gptq",
    schemes=_schemes,
    codes=(Packing(".qweight", "I32", "int4", arrangement=rows_in_words(_IN_I32).transposed()),),
    scales=(".scales",),
    zero_points=".qzeros",
    group_index=".g_idx",
)
