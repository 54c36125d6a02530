"""Check that a plan casts only values to values.

Codes are not values without their scales.
"""

from __future__ import annotations

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import Advice, UnsupportedError, message

_INTEGERS = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_CODES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_MAY_HOLD_CODES = _CODES | {"I8", "U8"}
_QUANTIZED = "the tensors that the quantization_config in config.json describes as quantized"
_DECODE = (
    f"{{dequantize=True}} decodes {_QUANTIZED}",
    f"load_state_dict() and load_model() decode {_QUANTIZED}, while they read them",
)
_KEEP = "{dequantize=False} keeps them, for a model that has codes and scales"


def check_cast(source: str, source_dtype: str, target: str, target_dtype: str) -> None:
    """Raise UnsupportedError if a cast would lose more than precision.

    Args:
        source: name of the source.
        source_dtype: its dtype code.
        target: name of the target.
        target_dtype: its dtype code.
    """
    if source_dtype == target_dtype or (source_dtype in FLOATING and target_dtype in FLOATING):
        return
    to_float = target_dtype in FLOATING and source_dtype not in ("I8", "U8")
    if source_dtype in _INTEGERS and (target_dtype in _INTEGERS or to_float):
        return
    quantized = source_dtype in _MAY_HOLD_CODES or target_dtype in _CODES
    if source_dtype not in _MAY_HOLD_CODES:
        advice: Advice = _KEEP
    else:
        advice = _DECODE if target_dtype not in _MAY_HOLD_CODES else "codes are never cast"
    raise UnsupportedError(
        message(
            f"{source} cannot be cast for {target}"
            + (", one of them holds codes of a quantized tensor" if quantized else ""),
            expected=target_dtype,
            found=source_dtype,
            do=[advice] if quantized else None,
        )
    )
