"""Tests of loads without patching transformers: this package's tensors in ``state_dict=`` of ``from_pretrained``."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="uses from_pretrained of transformers")

from safetensors.torch import load_file
from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.support import assert_same_model, hashes, saved
from tests.model_zoo import build_model, write_checkpoint


@pytest.mark.parametrize("name", ["mixtral", "olmoe-tied", "mistral3+mixtral", "nemotron_h", "gpt_oss"])
def test_state_dict_of_this_package_equals_the_load_of_from_pretrained(tmp_path, name):
    path = tmp_path / "published"
    original = build_model(name)
    write_checkpoint(original, path)
    stock, info = type(original).from_pretrained(path, output_loading_info=True)
    tensors = amc.load_state_dict(path)
    config = AutoConfig.from_pretrained(path)
    options = {"config": config, "state_dict": dict(tensors), "output_loading_info": True}
    model, own_info = type(original).from_pretrained(None, **options)
    assert own_info == info
    assert_same_model(model, stock)
    assert all(tensor.data_ptr() == tensors[n].data_ptr() for n, tensor in model.state_dict().items())
    saved(stock, tmp_path / "stock")
    model.save_pretrained(
        tmp_path / "own",
        state_dict=amc.revert_state_dict(model.state_dict(), model, reference=path),
        save_original_format=False,
    )
    assert hashes(tmp_path / "own") == hashes(tmp_path / "stock")
    config_file = "config.json"
    assert (tmp_path / "own" / config_file).read_text() == (tmp_path / "stock" / config_file).read_text()


def test_only_name_generation_config_and_saved_format_differ(tmp_path):
    path = tmp_path / "published"
    original = build_model("mixtral")
    original.generation_config.max_new_tokens = 77
    write_checkpoint(original, path)
    stock = type(original).from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    model = type(original).from_pretrained(None, config=config, state_dict=amc.load_state_dict(path))
    assert (stock.name_or_path, model.name_or_path) == (str(path), "None")
    assert (stock.generation_config.max_new_tokens, model.generation_config.max_new_tokens) == (77, None)
    model.save_pretrained(tmp_path / "own")
    grouped = {n: t for file in (tmp_path / "own").glob("*.safetensors") for n, t in load_file(file).items()}
    assert grouped.keys() == model.state_dict().keys()
    again = type(original).from_pretrained(tmp_path / "own")
    for name, tensor in again.state_dict().items():
        assert_bytes_equal(tensor, stock.state_dict()[name])
