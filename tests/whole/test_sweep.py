"""Tests of every model type that transformers converts: loads equal those of ``from_pretrained``.

The list comes from the installed registry (``tests/model_zoo``), so another transformers is another sweep; a type that
cannot be built fails ``tests/whole/test_model_zoo.py`` unless ``EXCLUDED`` lists it with a reason.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="compares with from_pretrained of transformers")

import automodel_conv as amc
from automodel_conv.execution import filling
from automodel_conv.testing import POISON
from tests.comparing import assert_same_in_order
from tests.execution.simulated import SimulatedDevice
from tests.model_zoo import EXCLUDED, build_model, write_checkpoint, zoo_names

pytestmark = pytest.mark.sweep
NAMES = [name for name in zoo_names() if name not in EXCLUDED]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """Write a checkpoint in its published format, in several shards; return it with transformers' load."""
    model = build_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(model, directory)
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    return directory, loaded, info


def test_state_dict_equals_from_pretrained(case):
    directory, upstream, info = case
    loaded = amc.load_state_dict(directory)
    assert_same_in_order(loaded, upstream.state_dict())
    assert_reports(loaded.report, info)
    for name, other in upstream.all_tied_weights_keys.items():
        assert loaded[name].data_ptr() == loaded[other].data_ptr()


def test_state_dict_streamed_to_a_device_equals_from_pretrained(case, monkeypatch):
    directory, upstream, info = case
    monkeypatch.setattr(filling, "transfer_device", lambda device: SimulatedDevice())
    loaded = amc.load_state_dict(directory, threads=2, scratch_bytes=1 << 18, device_scratch_bytes=1 << 17)
    assert_same_in_order(loaded, upstream.state_dict())
    assert_reports(loaded.report, info)
    assert 0 < loaded.report.peak_extra_bytes <= 3 << 17


def test_model_in_memory_equals_from_pretrained(case):
    directory, upstream, info = case
    model = copy.deepcopy(upstream)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    report = amc.load_model(model, directory, strict=False)
    assert_same_in_order(provided(model.state_dict(), report), provided(upstream.state_dict(), report))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    assert_reports(report, info)


def test_model_on_meta_equals_from_pretrained_in_computed_buffers_too(case):
    directory, upstream, info = case
    with torch.device("meta"):
        model = type(upstream)._from_config(copy.deepcopy(upstream.config))
    report = amc.load_model(model, directory, strict=False)
    assert_same_in_order(provided(model.state_dict(), report), provided(upstream.state_dict(), report))
    assert_same_in_order(dict(model.named_buffers()), dict(upstream.named_buffers()))
    assert_reports(report, info)


@pytest.mark.parametrize("name", NAMES)
def test_converted_format_equals_from_pretrained(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path, original_format=False)
    upstream, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    loaded = amc.load_state_dict(tmp_path, strict=False)
    assert_same_in_order(loaded, provided(upstream.state_dict(), loaded.report))
    assert_reports(loaded.report, info)


def test_sweep_names_the_models_people_load():
    """Check the list of the registry, which must include these if this transformers has them."""
    from transformers import CONFIG_MAPPING

    wanted = """mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 deepseek_v4 olmoe minimax_m2 qwen3_next glm4_moe
        glm4v_moe kimi_k25 ernie4_5_moe longcat_flash jamba nemotron_h qwen3_vl_moe llava""".split()
    assert {name for name in wanted if name in CONFIG_MAPPING} <= set(NAMES)
    assert any("qwen3_moe" in name and name != "qwen3_moe" for name in NAMES), "a VLM with a MoE text tower"


def assert_reports(report, info) -> None:
    assert set(report.missing_keys) == set(info["missing_keys"])
    assert set(report.unexpected_keys) == set(info["unexpected_keys"])
    assert {name for name, *_ in report.mismatched_keys} == {name for name, *_ in info["mismatched_keys"]}
    assert report.fallbacks == ()


def provided(tensors, report):
    return {name: tensor for name, tensor in tensors.items() if name not in report.missing_keys}
