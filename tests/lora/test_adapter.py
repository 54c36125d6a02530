"""Tests of opening adapters: which tensors belong together, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.errors import CheckpointError, NameProblems, UnsupportedError
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.lora.adapter import Pair, open_adapter
from tests.lora.support import PREFIX, in_memory, lora, write_adapter

ONE = lora("q_proj", 4, 3)


def test_matrices_of_a_module_are_a_pair():
    adapter = in_memory(lora("b.q_proj", 4, 3) | lora("a.k_proj", 4, 3))
    assert [(pair.module, adapter.tensors.names[pair.a], adapter.tensors.names[pair.b]) for pair in adapter.pairs] == [
        (name, f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight") for name in ("b.q_proj", "a.k_proj")
    ]
    assert adapter.whole == {}


def test_order_of_the_file_does_not_matter():
    adapter = in_memory(dict(reversed(ONE.items())))
    assert adapter.pairs == (Pair("q_proj", 1, 0),)


@pytest.mark.parametrize("end", ["weight", "default.weight"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_prefix_and_name_of_the_adapter_may_be_absent(prefix, end):
    adapter = in_memory({f"{prefix}m.lora_{part}.{end}": torch.zeros(2, 2) for part in "AB"})
    assert adapter.pairs == (Pair("m", 0, 1),)


def test_embedding_has_matrices_of_its_own_name():
    tensors = {f"{PREFIX}embed.lora_embedding_{part}": torch.zeros(2, 2) for part in "AB"}
    assert in_memory(tensors).pairs == (Pair("embed", 0, 1, is_embedding=True),)


def test_other_tensors_replace_those_of_the_base():
    whole = {f"{PREFIX}head.weight": torch.zeros(4), f"{PREFIX}lm.base_layer.weight": torch.zeros(2)}
    adapter = in_memory(ONE | whole)
    assert adapter.whole == {"head.weight": 2, "lm.weight": 3}


ODD = {
    "m.lora_A.bias": torch.zeros(2, 2),
    "m.lora_B.bias": torch.zeros(2),
    "m.lora_magnitude_vector.weight": torch.zeros(2, 2),
    "m.lora_embedding_A.weight": torch.zeros(2, 2),
    "m.lora_A": torch.zeros(2, 2),
    "conv.lora_A.weight": torch.zeros(2, 2, 1, 1),
    "m.lora_A.other.weight": torch.zeros(2, 2),
    "head.weight": torch.zeros(2, dtype=torch.int32),
    "int.lora_A.weight": torch.zeros(2, 2, dtype=torch.int8),
}


@pytest.mark.parametrize("name", ODD)
def test_tensor_of_another_kind_is_named(name):
    with pytest.raises(UnsupportedError, match=f"(?s)memory.*{name}"):
        in_memory(ONE | {PREFIX + name: ODD[name]})


def test_all_tensors_of_other_kinds_are_in_one_error():
    with pytest.raises(UnsupportedError) as caught:
        in_memory(ONE | {PREFIX + name: tensor for name, tensor in ODD.items()})
    assert all(name in str(caught.value) for name in ODD)


def test_lone_matrices_are_in_one_error():
    tensors = lora("a", 2, 2) | lora("b", 2, 2) | ONE
    del tensors[f"{PREFIX}a.lora_A.weight"], tensors[f"{PREFIX}b.lora_B.weight"]
    with pytest.raises(NameProblems, match=r"(?s)lack a matrix.*a: only lora_B\n.*b: only lora_A") as caught:
        in_memory(tensors)
    assert "q_proj" not in str(caught.value)


def test_matrix_of_an_embedding_is_no_partner_of_one_of_a_layer():
    tensors = {f"{PREFIX}m.lora_A.weight": torch.zeros(2, 2), f"{PREFIX}m.lora_embedding_B": torch.zeros(2, 2)}
    with pytest.raises(NameProblems, match=r"(?s)m: only lora_A\n.*m: only lora_B"):
        in_memory(tensors)


def test_no_tensors_are_no_adapter():
    with pytest.raises(CheckpointError, match=r"holds no adapter"):
        in_memory({})


def test_adapter_is_opened_by_its_directory(tmp_path):
    directory = write_adapter(tmp_path / "a", ONE, r=2)
    adapter = open_adapter(directory, -0.5)
    assert adapter.path == str(directory)
    assert (adapter.weight, adapter.form) == (-0.5, None)
    assert adapter.pairs == (Pair("q_proj", 0, 1),)
    names = {source.describe() for source in adapter.sources}
    assert names == {str(directory / "adapter_config.json"), str(directory / "adapter_model.safetensors")}
    for row, tensor in zip((1, 0), adapter.tensors.read([1, 0]), strict=True):
        assert torch.equal(tensor, ONE[adapter.tensors.names[row]])


def test_relative_path_is_made_absolute(tmp_path, monkeypatch):
    write_adapter(tmp_path / "a", ONE)
    monkeypatch.chdir(tmp_path)
    assert open_adapter("a").path == str(tmp_path / "a")


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"(?s)no such adapter.*nowhere"):
        open_adapter(tmp_path / "nowhere")


def test_file_in_place_of_the_directory_is_named(tmp_path):
    write_adapter(tmp_path, ONE)
    with pytest.raises(CheckpointError, match=r"(?s)no such adapter.*adapter_model\.safetensors"):
        open_adapter(tmp_path / "adapter_model.safetensors")


def test_missing_weights_are_named(tmp_path):
    write_adapter(tmp_path, ONE)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors") as caught:
        open_adapter(tmp_path)
    assert "adapter_model.bin" not in str(caught.value)


def test_weights_in_a_bin_file_are_not_loaded_and_the_error_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    torch.save(ONE, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)adapter_model.bin with PEFT.*save_pretrained"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100])
def test_broken_weights_are_named(tmp_path, size):
    path = write_adapter(tmp_path, ONE) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors"):
        open_adapter(tmp_path)


def test_form_that_the_file_states_is_read(tmp_path):
    write_adapter(tmp_path, ONE)
    path = tmp_path / "adapter_model.safetensors"
    save_file(ONE, path, metadata={LAYOUT_KEY: "vllm"})
    assert open_adapter(tmp_path).form == "vllm"
