"""Tests of each cell of the table of formats: a "yes" works, and a "no" is the error that the reason states."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers", reason="the zoo needs transformers")

from transformers import CompressedTensorsConfig

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.zoo.ranks import assert_ranks_read_their_parts
from tests.zoo.rows import COLUMNS, PAGE, ROWS, page
from tests.zoo.writing import arranged, is_known, is_recent, write

pytestmark = pytest.mark.skipif(not is_recent(), reason="the table tells of a recent transformers")
LAYOUTS = ("nemo", "gpt_oss", "vllm")


# Formats that differ from another only in their block, their config or their model.
VARIANTS = {
    "FP8, exponents per 32 x 32",
    "FP8, one scale per matrix",
    "Inkling2Loop MXFP8",
    "ModelOpt MXFP4",
    "ModelOpt NVFP4 of Gemma-4, per expert",
    "ModelOpt W4A16_NVFP4",
    "ModelOpt W8A16",
    "Quark FP8, one scale per matrix",
    "Quark FP8, one scale per row",
    "Quark INT8",
    "Quark NVFP4",
    "compressed-tensors FP8 of Gemma-4, per expert",
    "compressed-tensors FP8, one scale per block",
    "compressed-tensors FP8, one scale per matrix",
    "compressed-tensors INT4 with zero points",
    "compressed-tensors INT8",
    "compressed-tensors MXFP8",
}
PARAMETERS = [
    pytest.param(row, id=row.record.name, marks=[pytest.mark.long] if row.record.name in VARIANTS else [])
    for row in ROWS
]


@pytest.fixture(scope="module", params=PARAMETERS)
def case(request, tmp_path_factory):
    """Write a checkpoint of one layer; return the row, the files, and what transformers loads of the values."""
    if not is_known(request.param.record):
        pytest.skip("this transformers does not have the type")
    written = write(request.param.record, tmp_path_factory.mktemp("format"))
    values = written.model_class.from_pretrained(written.twin, dtype="auto").state_dict()
    return request.param, written, values


def read(row, written, values, directory):
    assert_same(amc.load_state_dict(written.directory), values)


def laid_out(row, written, values, directory):
    for layout in LAYOUTS:
        expected = arranged(values, row.record.config["model_type"], layout)
        assert_same(amc.load_state_dict(written.directory, layout=layout), expected)


def sharded(row, written, values, directory):
    assert_ranks_read_their_parts(written.directory, values)


def kept(row, written, values, directory):
    assert_same(amc.load_state_dict(written.directory, rules=[], dequantize=False), written.stored)
    amc.convert_checkpoint(written.directory, directory / "copy", rules=[])
    assert_same(amc.load_state_dict(directory / "copy", rules=[], dequantize=False), written.stored)


def codes_laid_out(row, written, values, directory):
    for layout in ("vllm", "nemo"):  # the second one is transposed
        there, back = directory / layout, directory / f"from-{layout}"
        amc.convert_checkpoint(written.directory, there, layout=layout)
        assert_same(amc.load_state_dict(there), amc.load_state_dict(written.directory))
        amc.convert_checkpoint(there, back, layout="per_expert")
        if not row.record.divides_experts:  # such experts become grouped, as their type is published
            assert_same(amc.load_state_dict(back, rules=[], dequantize=False), written.stored)


def hook(row, written, values, directory):
    settings = row.record.settings or {}
    decode = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "config_groups" in settings else {}
    with amc.accelerate_transformers() as acceleration:
        model = written.model_class.from_pretrained(written.directory, dtype="auto", **decode)
    left = [name for load in acceleration.loads for name in load.left]
    if left:
        raise LookupError(f"left to transformers: {left}")
    for name, tensor in values.items():
        bits = (part.contiguous().view(torch.int16).int() for part in (model.state_dict()[name], tensor))
        assert next(bits).sub(next(bits)).abs().max() <= 1, name  # transformers may round twice


WORKS = (read, laid_out, sharded, kept, codes_laid_out, hook)


def test_variants_are_rows():
    assert {row.record.name for row in ROWS} > VARIANTS


def test_columns_are_all_tested():
    assert [works.__name__ for works in WORKS] == list(COLUMNS)
    assert all(set(row.no) <= set(COLUMNS) for row in ROWS)


@pytest.mark.parametrize("works", WORKS, ids=lambda works: works.__name__)
def test_cell_is_true(case, works, tmp_path):
    row, written, values = case
    no = row.no.get(works.__name__)
    if no is None:
        works(row, written, values, tmp_path)
        return
    with pytest.raises((amc.ConversionError, ImportError, LookupError)) as raised:
        works(row, written, values, tmp_path)
    assert re.search(no.error, str(raised.value)), raised.value
    assert (tmp_path / "from-vllm").exists() == no.only_transposed


def test_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {row.record.name} |" in text for row in ROWS)
    assert text == page(text), "do: python -m tests.zoo.rows"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(actual[name], tensor)
