"""Tests of choosing the files of a checkpoint: other paths are refused with what they are and what to do."""

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from tests.files.support import TWO, A, packed, refused, write_sharded


@pytest.mark.parametrize("placed", [[], ["model-00001-of-00002.safetensors"], ["a.safetensors"], ["config.json"]])
def test_unfinished_conversion_is_identified(tmp_path, placed):
    (tmp_path / STAGING_NAME).mkdir()
    for name in placed:
        (tmp_path / name).write_bytes(packed({}))
    refused(tmp_path, "not finished", STAGING_NAME, "same conversion or save again")
    refused(tmp_path / STAGING_NAME, "not finished", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["malformed JSON"]),
        ("{", ["malformed JSON"]),
        ("[]", ["malformed JSON", "list"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": []}', ["weight_map"]),
        ('{"weight_map": {}}', ["weight_map"]),
        ('{"weight_map": {"t": 1}}', ["tensor 't'"]),
        ('{"weight_map": {"t": ["a"]}}', ["tensor 't'"]),
        ('{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}', ["'t' occurs 2 times"]),
    ],
)
def test_malformed_index(tmp_path, text, words):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(tmp_path, str(path), *words)


def test_a_config_is_no_index(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    refused(tmp_path / "config.json", "not an index of a checkpoint", "config.json", "pass the directory")


@pytest.mark.parametrize(
    "file",
    [
        "",
        "..",
        "../evil.safetensors",
        "sub/../../evil.safetensors",
        "sub\\..\\..\\evil.safetensors",
        "{root}/evil.safetensors",
        "//host/evil.safetensors",
        "\\evil.safetensors",
        "C:\\evil.safetensors",
        "C:evil.safetensors",
        "a\0.safetensors",
    ],
)
def test_index_cannot_name_a_file_outside_of_its_directory(tmp_path, file, monkeypatch):
    (tmp_path / "evil.safetensors").write_bytes(packed({"t": A}, b"12"))
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    write_sharded(directory, {}, {"t": file.format(root=tmp_path)})
    opened, real = [], system.open_readonly
    monkeypatch.setattr(system, "open_readonly", lambda path: opened.append(path) or real(path))
    refused(directory, "outside of its directory", "tensor 't'", str(directory))
    assert opened == [str(directory / "model.safetensors.index.json")]


def test_missing_shards_are_all_named(tmp_path):
    weight_map = {"x": "a.safetensors", "p": "c.safetensors", "q": "d.safetensors"}
    write_sharded(tmp_path, TWO, weight_map)
    refused(tmp_path, "2 of 3 files", str(tmp_path), "c.safetensors", "d.safetensors")


def test_directory_in_place_of_a_shard_is_a_missing_shard(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path, "1 of 2 files", "a.safetensors")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no safetensors weights", "empty directory"]),
        (["config.json"], ["no safetensors weights", "config.json"]),
        (["a.safetensors", "b.safetensors"], ["model.safetensors.index.json is missing"]),
        (["model-00002-of-00003.safetensors"], ["model.safetensors.index.json is missing"]),
        (["a.safetensors.index.json", "b.safetensors.index.json"], ["more than one index"]),
    ],
    ids=str,
)
def test_directory_without_a_clear_checkpoint(tmp_path, files, words):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    refused(tmp_path, str(tmp_path), *words, *files)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.pt", "save_pretrained"),
        ("model.pth", "save_pretrained"),
        ("model.pkl", "save_pretrained"),
        ("model.Q4_K.gguf", "gguf_file"),
    ],
)
def test_other_formats_are_refused_with_advice(tmp_path, file, advice):
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path / file, str(tmp_path / file), advice, error=UnsupportedError)
    refused(tmp_path, str(tmp_path), file, advice, error=UnsupportedError)
    write_sharded(tmp_path, {}, {"t": file})
    refused(tmp_path, str(tmp_path / file), advice, error=UnsupportedError)


def test_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(tmp_path / "model.onnx", "model.onnx", ".safetensors", error=UnsupportedError)
