"""Tests of square experts that are published transposed, which transformers does not transpose, under the hook."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="hooks from_pretrained of transformers")

from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import tensors_of
from tests.integrations.support import assert_same_model, both
from tests.model_zoo import build_model, write_checkpoint

SQUARE = {"2I == H": "gate_up_proj", "I == H": "down_proj"}
LAYER = "model.language_model.layers.1.mlp.experts"


@pytest.fixture(scope="module", params=SQUARE)
def case(request, tmp_path_factory):
    """Return a model, its published and its saved checkpoint, and which of its matrices are square."""
    model = build_model("qwen3_vl_moe", equal=request.param)
    published, saved = (tmp_path_factory.mktemp(kind) for kind in ("published", "saved"))
    write_checkpoint(model, published)
    write_checkpoint(model, saved, original_format=False)
    return model, published, saved, SQUARE[request.param]


def assert_refused(error, square):
    assert f"{LAYER}.{square}" in str(error.value)
    assert str(error.value).count("proj") == 2  # two layers; the first has no experts
    assert "load_model()" in str(error.value)


def test_with_disk_offload_only_the_published_checkpoint_is_refused(case, tmp_path):
    model, published, saved, square = case
    device_map = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    how = {"device_map": device_map, "offload_folder": str(tmp_path)}
    with pytest.raises(amc.UnsupportedError, match="disk") as error, amc.accelerate_transformers():
        type(model).from_pretrained(published, **how)
    assert_refused(error, square)
    _, _, [load] = both(type(model), saved, **how)
    assert len(load.left) == 4


def test_in_memory_only_the_published_checkpoint_is_refused(case):
    model, published, _, square = case
    with pytest.raises(amc.UnsupportedError, match="opened under the hook") as error, amc.accelerate_transformers():
        type(model).from_pretrained(None, config=model.config, state_dict=tensors_of(published))
    assert_refused(error, square)
    with amc.accelerate_transformers():
        tensors = dict(amc.load_state_dict(published))
        loaded = type(model).from_pretrained(None, config=model.config, state_dict=tensors)
    assert_same_model(loaded, model)


def test_unpaired_square_weight_is_named_everywhere(case, tmp_path):
    model, published, _, square = case
    other = ({"gate_up_proj", "down_proj"} - {square}).pop()
    tensors = {n: t for n, t in tensors_of(published).items() if n != f"{LAYER}.{other}"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    doors = {
        "load_state_dict": lambda: amc.load_state_dict(tmp_path),
        "load_state_dict, not strict": lambda: amc.load_state_dict(tmp_path, strict=False),
        "load_model": lambda: amc.load_model(model, tmp_path),
        "convert_checkpoint": lambda: amc.convert_checkpoint(tmp_path, tmp_path / "made"),
        "convert_state_dict": lambda: amc.convert_state_dict(tensors, model),
    }
    held = {name: tensor for name, tensor in model.state_dict().items() if name != f"{LAYER}.{other}"}
    without_source_layout = {
        "revert_state_dict": lambda: amc.revert_state_dict(held, model, reference=tmp_path),
        "save_checkpoint": lambda: amc.save_checkpoint(
            held, tmp_path / "made", rules=amc.get_model_conversion_mapping(model), reference=tmp_path
        ),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for door in doors.values():
        with pytest.raises(amc.UnsupportedError, match="source_layout=") as error:
            door()
        assert f"{LAYER}.{square} " in str(error.value)
        assert str(error.value).count("proj") == 1
    for name, door in without_source_layout.items():
        with pytest.raises(amc.UnsupportedError, match="leave reference out") as error:
            door()
        assert f"{LAYER}.{square} " in str(error.value), name
        assert "say source_layout" not in str(error.value)
    assert amc.revert_state_dict(held, model)
    assert not (tmp_path / "made").exists()
    with pytest.raises(amc.UnsupportedError, match=r"load_model.*source_layout=") as error:
        with amc.accelerate_transformers():
            type(model).from_pretrained(tmp_path)
    assert f"{LAYER}.{square} " in str(error.value)
    for name, tensor in before.items():
        assert_bytes_equal(model.state_dict()[name], tensor)


def test_square_experts_are_converted_to_layouts(case):
    model, published, saved, _ = case
    for directory in (published, saved):
        converted = amc.load_state_dict(directory, layout="nemo")
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path.endswith(".experts"):
                nemo = {"gate_up_proj": "gate_and_up_projs", "down_proj": "down_projs"}[leaf]
                assert_bytes_equal(converted[f"{path}.{nemo}"], tensor.transpose(1, 2).contiguous())
            else:
                assert torch.equal(converted[name], tensor)
