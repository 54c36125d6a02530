"""A quantization method that exists nowhere else, in one file, with its own names, groups and elements."""

from automodel_conv.planning.arrangement import TRANSPOSED
from automodel_conv.planning.methods.method import FLOAT_SCALES, Method, Packing, Scheme, UnsupportedScheme, block_of


def _schemes(config):
    if config.get("style") != "plain":
        raise UnsupportedScheme(f"toy's {config.get('style')}", "plain")
    return [Scheme(format, block_of(config["tile"]), FLOAT_SCALES) for format in ("int4", "e4m3")]


TOY = Method(
    name="toy",
    schemes=_schemes,
    # Three I16 hold the 12 codes of a group of a transposed weight; an I32 holds four FP8 codes.
    codes=(Packing(".nibbles", "I16", "int4", group=3, arrangement=TRANSPOSED), Packing("_quads", "I32", "e4m3")),
    scales=(".steps",),
    dropped=(".note",),
    refused={".shuffle": "is in an order of its own"},
)
