"""For those who replace nothing of transformers: our tensors through ``from_pretrained``'s own ``state_dict=``."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="from_pretrained is transformers'")

from safetensors.torch import load_file
from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.support import assert_same_model, hashes, saved
from tests.model_zoo import build_model, write_checkpoint


@pytest.mark.parametrize("name", ["mixtral", "olmoe-tied", "mistral3+mixtral", "nemotron_h", "gpt_oss"])
def test_a_state_dict_of_ours_makes_the_model_of_from_pretrained_and_the_files_it_saves(tmp_path, name):
    path = tmp_path / "published"
    made = build_model(name)
    write_checkpoint(made, path)
    stock, info = type(made).from_pretrained(path, output_loading_info=True)
    tensors = amc.load_state_dict(path)
    config = AutoConfig.from_pretrained(path)
    options = {"config": config, "state_dict": dict(tensors), "output_loading_info": True}
    model, own_info = type(made).from_pretrained(None, **options)
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


def test_what_differs_is_the_name_the_generation_config_and_the_format_it_saves_by_itself(tmp_path):
    path = tmp_path / "published"
    made = build_model("mixtral")
    made.generation_config.max_new_tokens = 77
    write_checkpoint(made, path)
    stock = type(made).from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    model = type(made).from_pretrained(None, config=config, state_dict=amc.load_state_dict(path))
    assert (stock.name_or_path, model.name_or_path) == (str(path), "None")
    assert (stock.generation_config.max_new_tokens, model.generation_config.max_new_tokens) == (77, None)
    model.save_pretrained(tmp_path / "own")
    grouped = {n: t for file in (tmp_path / "own").glob("*.safetensors") for n, t in load_file(file).items()}
    assert grouped.keys() == model.state_dict().keys()
    again = type(made).from_pretrained(tmp_path / "own")
    for name, tensor in again.state_dict().items():
        assert_bytes_equal(tensor, stock.state_dict()[name])
