"""Tests of published checkpoints, shrunk: every door gives the values of the twin that transformers loads."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the zoo needs transformers")

from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same_in_order
from tests.zoo.published import PUBLISHED, QUICK
from tests.zoo.ranks import assert_ranks_read_their_parts
from tests.zoo.writing import arranged, is_known, is_recent, write

pytestmark = pytest.mark.sweep


def _parameters():
    for record in PUBLISHED:
        marks = [] if record.name in QUICK else [pytest.mark.long]
        marks += [] if is_known(record) else [pytest.mark.skip(reason="this transformers does not have the type")]
        yield pytest.param(record, id=record.name, marks=marks)


@pytest.fixture(scope="module", params=_parameters())
def case(request, tmp_path_factory):
    """Write a checkpoint and its twin; return the record, the files, and what transformers loads of the twin."""
    written = write(request.param, tmp_path_factory.mktemp("zoo"))
    return request.param, written, written.model_class.from_pretrained(written.twin, dtype="auto")


@pytest.fixture
def options(case):
    record, _, _ = case
    return {} if record.recipe is None else {"rules": getattr(amc.recipes, record.recipe)()}


def test_state_dict_equals_that_of_the_twin(case, options):
    _, written, upstream = case
    loaded = amc.load_state_dict(written.directory, **options)
    check = assert_same if options else assert_same_in_order  # a recipe knows no order
    check(loaded, upstream.state_dict())
    assert not loaded.report.missing_keys
    assert not loaded.report.fallbacks


def test_model_on_meta_equals_the_twin(case):
    _, written, upstream = case
    config = AutoConfig.from_pretrained(written.twin)
    with torch.device("meta"):
        model = written.model_class._from_config(config, dtype=upstream.dtype)
    report = amc.load_model(model, written.directory)
    assert not report.missing_keys
    for name, tensor in upstream.state_dict().items():
        assert_bytes_equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_layouts_are_those_of_the_loaded_experts(case, options, layout):
    record, written, upstream = case
    loaded = amc.load_state_dict(written.directory, layout=layout, **options)
    assert_same(loaded, arranged(upstream.state_dict(), record.config["model_type"], layout))


def test_ranks_read_their_parts(case, options):
    _, written, upstream = case
    assert_ranks_read_their_parts(written.directory, upstream.state_dict(), **options)


def test_converted_on_disk_and_back(case, options, tmp_path):
    record, written, upstream = case
    decode = {"dequantize": True} if record.formats else {}
    amc.convert_checkpoint(written.directory, tmp_path / "there", layout="nemo", **decode, **options)
    amc.verify_checkpoint(written.directory, tmp_path / "there", layout="nemo", **decode, **options)
    amc.convert_checkpoint(tmp_path / "there", tmp_path / "back", layout="per_expert", **options)
    loaded = amc.load_state_dict(tmp_path / "back", **options)
    assert_same(loaded, upstream.state_dict())
    if not record.formats and not record.saved_otherwise:
        amc.verify_checkpoint(written.directory, tmp_path / "back", **options)
    else:
        assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
        assert not (tmp_path / "back" / "hf_quant_config.json").exists()


@pytest.mark.skipif(not is_recent(), reason="this transformers decodes less")
def test_from_pretrained_loads_the_same_with_and_without_the_hook(case):
    record, written, twin = case
    if record.hook == "left":
        pytest.skip("transformers keeps the codes")
    if record.hook:
        with amc.accelerate_transformers(), pytest.raises(amc.ConversionError, match=record.hook):
            written.model_class.from_pretrained(written.directory, dtype="auto")
        return
    stock = written.model_class.from_pretrained(written.directory, dtype="auto").state_dict()
    with amc.accelerate_transformers() as acceleration:
        hooked = written.model_class.from_pretrained(written.directory, dtype="auto").state_dict()
    assert not any(load.left for load in acceleration.loads)
    assert list(hooked) == list(stock)
    for name, tensor in twin.state_dict().items():
        if record.undivided is not None and record.undivided in name:
            assert_bytes_equal(hooked[name], tensor)
            continue
        assert_bytes_equal(hooked[name], stock[name])
        assert_within_one_ulp(stock[name], tensor)


def test_codes_and_scales_are_kept(case, tmp_path):
    _, written, _ = case
    loaded = amc.load_state_dict(written.directory, rules=[], dequantize=False)
    assert_same(loaded, written.stored)
    amc.convert_checkpoint(written.directory, tmp_path / "copy", rules=[])
    amc.verify_checkpoint(written.directory, tmp_path / "copy", rules=[])
    assert_same(amc.load_state_dict(tmp_path / "copy", rules=[], dequantize=False), loaded)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(actual[name], tensor)


def assert_within_one_ulp(actual, expected):
    """Check tensors of transformers, which rounds FP8 twice."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.dtype != torch.bfloat16:
        assert_bytes_equal(actual, expected)
    else:
        bits = (tensor.contiguous().view(torch.int16).int() for tensor in (actual, expected))
        assert next(bits).sub(next(bits)).abs().max() <= 1
