"""The table of formats in the documentation: what works with each, and the reason if something does not.

``test_rows.py`` tests each cell. ``python -m tests.zoo.rows`` writes the table to ``docs/formats.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.zoo import configs
from tests.zoo.configs import Config
from tests.zoo.formats import FORMATS
from tests.zoo.published import Published

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
COLUMNS = {
    "read": "read",
    "laid_out": "laid out",
    "sharded": "sharded",
    "kept": "kept as codes",
    "codes_laid_out": "codes laid out",
    "hook": "in the hook",
}
"""Columns of the table, with their headings."""


@dataclass(frozen=True)
class No:
    """Why something is refused."""

    reason: str
    """The reason, as the table states it."""
    error: str
    """A pattern of the error; ``"left"`` if the hook leaves the tensors to transformers."""
    only_transposed: bool = False
    """Whether only transposed layouts are refused."""

    @property
    def cell(self) -> str:
        return f"{'not transposed' if self.only_transposed else 'no'}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """A format, and a checkpoint of one layer with it."""

    record: Published
    publishers: str
    no: Mapping[str, No] = field(default_factory=dict)
    """Columns that are not "yes"."""


PACKED = No("packed codes stay as they are", "codes of the format .* cannot be rearranged")
OF_A_MATRIX = No("one scale for a whole matrix", "its scales cannot be combined")
OF_ONE_ELEMENT = No("one scale for a whole matrix", "its scales would not fit the config")
OF_A_ROW = No("blocks of one row", "its scales would not fit the config", only_transposed=True)
OF_ONE_DIMENSION = No("scales of one dimension", "its scales cannot be combined", only_transposed=True)
OF_FOUR_DIMENSIONS = No("scales of four dimensions", "its scales cannot be combined", only_transposed=True)
ALTERNATING = No("rows of gate and up alternate in a stack", "a scale would apply to other values")
OWN_NAMES = No("scales are not named after the weight", "are not named after it")
NO_QUANTIZER = No("transformers has no quantizer of it", "transformers would load codes of quantized tensors as values")
NO_RULE = No("transformers has no rule that groups these experts", "transformers would initialize the experts")
ROUNDED = No("left to transformers, which rounds twice", "left")
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"model.layers.0.block_sparse_moe.experts": {"quant_algo": "NVFP4", "group_size": 16}},
}


def _needs(package: str, error: str) -> No:
    return No(f"transformers needs {package}", error)


QUARK = _needs("Quark, which keeps codes", "latest version of Quark")
GPTQ = _needs("optimum, which keeps codes", "requires optimum")
AWQ = _needs("gptqmodel, which keeps codes", "requires gptqmodel")
FBGEMM = _needs("a GPU, and keeps codes", "requires a GPU")


def one_layer(config: Config) -> Config:
    """Return a config with one layer only."""
    if "text_config" in config:
        return {**config, "text_config": one_layer(config["text_config"])}
    kinds = {"layer_types": ["full_attention"]} if "layer_types" in config else {}
    return {**config, "num_hidden_layers": 1, **kinds}


EACH = r"\.experts\.\d+\..*\.weight$"
FUSED = r"experts\.(gate_up|down)_proj$"


def _row(
    name: str,
    publishers: str,
    *,
    format: str | None = None,
    config: Config | None = None,
    weights: str = EACH,
    divides: bool = False,
    settings: Mapping[str, Any] | None = None,
    **no: No,
) -> Row:
    """Return the row of a format.

    Args:
        format: its key in ``FORMATS``, by default ``name``.
        config: model with weights in the format, by default Mixtral of one layer.
        divides: whether experts are published grouped, and quantized one by one.
        settings: the ``quantization_config``, by default that of the format.
    """
    format = format or name
    settings = settings or FORMATS[format].settings or None
    small = one_layer(configs.mixtral()) if config is None else config
    record = Published(
        name=name, config=small, special="", formats=((weights, format),), settings=settings, divides_experts=divides
    )
    return Row(record, publishers, no)


ROWS: tuple[Row, ...] = (
    _row("FP8, one scale per block", "DeepSeek-V3, Qwen3-FP8, GLM-5-FP8, MiniMax-M2.5, MiMo-V2-Flash"),
    _row("FP8, one scale per matrix", "Mistral's FP8", codes_laid_out=OF_A_MATRIX),
    _row("FP8, exponents per block", "DeepSeek-V4-Flash, outside its experts", codes_laid_out=OWN_NAMES),
    _row("FP8, exponents per 32 x 32", "DeepSeek-V4.1-Flash, outside its experts", codes_laid_out=OWN_NAMES),
    _row(
        "FP8 shards with one scale",
        "Qwen3.8-Flash-Next-FP8, its n-gram embedding",
        config=configs.qwen4_exp_text(),
        weights=r"ngram_embedding\.shard_\d+\.weight$",
    ),
    _row("FP4 experts of DeepSeek", "DeepSeek-V4-Flash, V4.1-Flash", codes_laid_out=PACKED),
    _row("MXFP4 of gpt-oss", "gpt-oss", config=one_layer(configs.gpt_oss()), weights=FUSED, codes_laid_out=PACKED),
    _row("compressed-tensors INT4", "Kimi-K2-Thinking, Kimi-K2.5", codes_laid_out=PACKED),
    _row("compressed-tensors INT4 with zero points", "RedHatAI's W4A16_ASYM", codes_laid_out=PACKED),
    _row(
        "compressed-tensors INT4, rows that end in padding",
        "weights whose columns are no multiple of 8",
        format="compressed-tensors INT4 per channel",
        config=one_layer(configs.mixtral() | {"intermediate_size": configs.INTERMEDIATE - 4}),
        codes_laid_out=PACKED,
    ),
    _row("compressed-tensors INT8", "RedHatAI's W8A8", codes_laid_out=OF_A_ROW),
    _row("compressed-tensors FP8", "RedHatAI's FP8-dynamic", codes_laid_out=OF_A_ROW),
    _row("compressed-tensors FP8, one scale per matrix", "RedHatAI's FP8", codes_laid_out=OF_ONE_ELEMENT),
    _row("compressed-tensors FP8, one scale per block", "RedHatAI's FP8-block"),
    _row(
        "compressed-tensors FP8 of Granite, per expert",
        "RedHatAI's and IBM's FP8 of Granite",
        format="compressed-tensors FP8",
        config=one_layer(configs.granitemoe()),
        divides=True,
        codes_laid_out=OF_A_ROW,
        hook=NO_RULE,
    ),
    _row(
        "compressed-tensors FP8 of Gemma-4, per expert",
        "RedHatAI's FP8 of Gemma-4",
        format="compressed-tensors FP8",
        config=one_layer(configs.gemma4()),
        divides=True,
        codes_laid_out=OF_A_ROW,
        hook=NO_RULE,
    ),
    _row("compressed-tensors NVFP4", "RedHatAI's NVFP4", codes_laid_out=PACKED, hook=ROUNDED),
    _row("compressed-tensors MXFP4", "Kimi-K3", codes_laid_out=PACKED),
    _row("compressed-tensors MXFP8", "llm-compressor's users", codes_laid_out=OF_A_ROW),
    _row("fbgemm_fp8", "Llama-4-Maverick-17B-128E-Instruct-FP8", codes_laid_out=OF_A_ROW, hook=FBGEMM),
    _row("ModelOpt FP8", "Nemotron-3-Super-120B-A12B-FP8", codes_laid_out=OF_A_MATRIX, hook=NO_QUANTIZER),
    _row("ModelOpt NVFP4", "Kimi-K2.5-NVFP4, GLM-5-NVFP4", codes_laid_out=PACKED, hook=NO_QUANTIZER),
    _row("ModelOpt FP8 per channel", "ModelOpt's users", codes_laid_out=OF_ONE_DIMENSION, hook=NO_QUANTIZER),
    _row(
        "ModelOpt FP8_PB_WO",
        "ModelOpt's users, also as FP8_BLOCK_SCALES",
        codes_laid_out=OF_FOUR_DIMENSIONS,
        hook=NO_QUANTIZER,
    ),
    _row("ModelOpt MXFP4", "ModelOpt's users", codes_laid_out=PACKED, hook=NO_QUANTIZER),
    _row("ModelOpt W8A16", "ModelOpt's users", codes_laid_out=OF_ONE_DIMENSION, hook=NO_QUANTIZER),
    _row("ModelOpt MXFP8", "MiniMax-M3-NVFP4, outside its experts", codes_laid_out=OF_A_ROW, hook=NO_QUANTIZER),
    _row("ModelOpt W4A16_NVFP4", "ModelOpt's users", codes_laid_out=PACKED, hook=NO_QUANTIZER),
    _row(
        "ModelOpt MIXED_PRECISION, by module",
        "MiniMax-M3-NVFP4, DeepSeek-V4-Flash-NVFP4",
        format="ModelOpt NVFP4",
        settings=MIXED,
        codes_laid_out=PACKED,
        hook=NO_QUANTIZER,
    ),
    _row(
        "ModelOpt NVFP4 of Llama-4",
        "Llama-4-Scout-17B-16E-Instruct-NVFP4",
        config=one_layer(configs.llama4()),
        weights=FUSED,
        codes_laid_out=PACKED,
        hook=NO_QUANTIZER,
    ),
    _row(
        "ModelOpt NVFP4 of Gemma-4, per expert",
        "Gemma-4-26B-A4B-NVFP4",
        format="ModelOpt NVFP4",
        config=one_layer(configs.gemma4()),
        divides=True,
        codes_laid_out=PACKED,
        hook=NO_RULE,
    ),
    _row(
        "Inkling2Loop NVFP4, a quotient per expert",
        "Inkling2Loop",
        format="Inkling2Loop NVFP4",
        config=configs.inkling2_loop(),
        weights=r"experts\.w(13|2)_weight$",
        codes_laid_out=PACKED,
    ),
    _row(
        "Inkling2Loop MXFP8",
        "Inkling2Loop",
        config=configs.inkling2_loop(),
        weights=r"experts\.w(13|2)_weight$",
        codes_laid_out=ALTERNATING,
    ),
    _row("Quark MXFP4", "amd's MXFP4", codes_laid_out=PACKED, hook=QUARK),
    _row("Quark FP8, one scale per block", "Quark's users", hook=QUARK),
    _row("Quark FP8, one scale per matrix", "amd's FP8-KV", codes_laid_out=OF_A_MATRIX, hook=QUARK),
    _row("Quark FP8, one scale per row", "amd's PTPC-FP8", codes_laid_out=OF_ONE_DIMENSION, hook=QUARK),
    _row("Quark NVFP4", "Quark's users", codes_laid_out=PACKED, hook=QUARK),
    _row("Quark INT8", "amd's INT8", codes_laid_out=OF_ONE_DIMENSION, hook=QUARK),
    _row("GPTQ", "Qwen's GPTQ-Int4, and many others", codes_laid_out=PACKED, hook=GPTQ),
    _row("AWQ", "many on the Hub", codes_laid_out=PACKED, hook=AWQ),
)


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| format | published as | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        cells = ["yes" if column not in row.no else row.no[column].cell for column in COLUMNS]
        lines.append(f"| {row.record.name} | {row.publishers} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_START, _END = "<!-- table of tests/zoo/rows.py -->\n\n", "\n<!-- end of the table -->"


def page(text: str) -> str:
    """Return the page with the table in its place."""
    before, after = text.split(_START)[0], text.split(_END)[1]
    return before + _START + table() + _END + after


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
