"""Config, headers, checksums and index of a save."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from automodel_conv.errors import WriteError
from automodel_conv.files import system
from automodel_conv.files.destination import open_destination
from automodel_conv.files.shards import CHECKSUMS_NAME, LAYOUT_KEY, Naming, Spec, divide
from automodel_conv.publishing.save_files import begin_save, finish_save

INDEX = "model.safetensors.index.json"
VALUES = {"a": bytes(range(16)), "b": bytes(range(100, 116))}
NAMING = Naming(layout="nemo")


@pytest.fixture
def shards():
    return divide([Spec(name, "F32", (4,)) for name in VALUES], 16, NAMING)


def saved(directory, shards, model=None, threads=0):
    with open_destination(str(directory), shards, None) as destination:
        begin_save(destination, shards, model)
        for shard in shards:
            with open(destination.path(shard.name), "r+b") as file:
                assert file.read() == shard.header + bytes(shard.nbytes - len(shard.header))
                for spec, offset in zip(shard.specs, shard.offsets, strict=True):
                    file.seek(offset)
                    file.write(VALUES[spec.name])
        finish_save(destination, shards, model, NAMING, threads)


def test_a_save_is_a_checkpoint_that_safetensors_reads(tmp_path, shards):
    saved(tmp_path, shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*sorted(shard.name for shard in shards), INDEX]
    for shard, name in zip(shards, VALUES, strict=True):
        with safe_open(tmp_path / shard.name, framework="pt") as file:
            assert file.get_tensor(name).view(torch.uint8).tolist() == list(VALUES[name])


def test_the_index_counts_the_parameters_of_the_model_or_of_the_tensors(tmp_path, shards):
    for model, parameters in ((None, 8), (nn.Linear(2, 3), 9)):
        directory = tmp_path / str(parameters)
        saved(directory, shards, model)
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"] == {"total_parameters": parameters, "total_size": 32, LAYOUT_KEY: "nemo"}


@pytest.mark.parametrize("threads", [1, 2])
def test_checksums_are_those_of_the_bytes_of_all_files(tmp_path, shards, threads):
    saved(tmp_path, shards, threads=threads)
    sums = json.loads((tmp_path / CHECKSUMS_NAME).read_text())["tensors"]
    assert sums == {name: f"{zlib.crc32(value):08x}" for name, value in VALUES.items()}


def test_without_threads_no_checksums_are_written(tmp_path, shards):
    saved(tmp_path, shards)
    assert not (tmp_path / CHECKSUMS_NAME).exists()


def test_a_config_is_written_before_any_data(tmp_path, shards):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    with open_destination(str(tmp_path), shards, None) as destination:
        begin_save(destination, shards, model, torch.float16)
        config = json.loads(Path(destination.path("config.json")).read_text())
        assert config["architectures"] == ["LlamaModel"]
        assert config.get("dtype", config.get("torch_dtype")) == "float16"
        finish_save(destination, shards, model, NAMING)
    assert (tmp_path / "config.json").exists()


def test_a_disk_without_room_is_told_before_any_data_and_leaves_nothing(tmp_path, shards, monkeypatch):
    def full(fd, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "reserve", full)
    with pytest.raises(WriteError, match=r"(?s)room for [0-9.]+ (bytes|.B).*No space left"):
        saved(tmp_path, shards)
    assert list(tmp_path.iterdir()) == []
