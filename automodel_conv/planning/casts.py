"""Which casts a plan may make: numbers to numbers; codes of a quantized tensor mean nothing without their scales."""

from __future__ import annotations

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import UnsupportedError, message

_INTEGERS = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_CODES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_HOLDS_CODES = _CODES | {"I8", "U8"}
_DECODE = "{dequantize=True} decodes what the quantization_config in config.json says is quantized"
_KEEP = "{dequantize=False} keeps them, for a model that has codes and scales"


def check_cast(source: str, found: str, target: str, wanted: str) -> None:
    """Raise UnsupportedError where a cast would lose more than precision.

    Args:
        source, target: names; ``found`` and ``wanted`` their dtypes.
    """
    if found == wanted or (found in FLOATING and wanted in FLOATING):
        return
    if found in _INTEGERS and (wanted in _INTEGERS or (wanted in FLOATING and found not in ("I8", "U8"))):
        return
    quantized = found in _HOLDS_CODES or wanted in _CODES
    advice = _KEEP if found not in _HOLDS_CODES else _DECODE if wanted not in _HOLDS_CODES else "codes are never cast"
    raise UnsupportedError(
        message(
            f"{source} cannot be cast for {target}"
            + (", one of them holds codes of a quantized tensor" if quantized else ""),
            expected=wanted,
            found=found,
            do=advice if quantized else None,
        )
    )
