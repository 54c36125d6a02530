"""What is no checkpoint, or a broken one: refused with what it is instead, and what to do."""

import os
import sys

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from tests.files.support import TWO, A, packed, refused, write_sharded


def test_repository_without_huggingface_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", "org/name", "pip install huggingface_hub")


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "./missing/name",
        "../a/b",
        "a/b/c",
        "/missing/x",
        "a/b.safetensors",
        "a/b.bin",
        "",
    ],
)
def test_missing_path_of_another_shape_is_not_downloaded(monkeypatch, path, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(path, "no such checkpoint", path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4976698672\n"

LOOKALIKES = {
    "git-lfs": (POINTER.encode(), ["Git-LFS pointer", "git lfs pull"]),
    "xet": (b"# xet version 0\nfilesize = 5\nhash = '00'\n", ["Xet pointer"]),
    "page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>" + 900 * b"x", ["page of HTML", "login"]),
    "answer": (b'{"error": "Repository not found"}', ["JSON", "Repository not found"]),
    "words": (b"Access to model is restricted." * 40, ["text: Access to model is restricted.", "login"]),
    "short": (b"404", ["text: 404"]),
    "pickle": (b"PK\x03\x04" + bytes(60), ["torch.save"]),
    "accents": (("é" * 400).encode(), ["text: é"]),
}


@pytest.mark.parametrize(("data", "words"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_stands_in_the_place_of_weights_is_told(tmp_path, data, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(tmp_path, str(path), "not a safetensors file", *words)


@pytest.mark.parametrize("length", [int.from_bytes(start, "little") for start in (b"\x80\x02", b"\x1f\x8b", b"<a>")])
def test_a_cut_file_is_not_taken_for_what_the_length_of_its_header_looks_like(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":')
    refused(tmp_path, "the length of a header is impossible", "truncated", f"{length} bytes")


@pytest.mark.parametrize("data", [POINTER.encode(), b"<html></html>"])
def test_what_stands_in_the_place_of_an_index_is_told(tmp_path, data):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    words = ["git lfs pull"] if data.startswith(b"v") else ["page of HTML"]
    refused(tmp_path, "malformed JSON", "model.safetensors.index.json", *words)


def test_an_index_that_is_cut_is_told_as_malformed(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"x": "a.saf')
    assert "login" not in refused(tmp_path, "malformed JSON")


@pytest.mark.parametrize("placed", [[], ["model-00001-of-00002.safetensors"], ["a.safetensors"], ["config.json"]])
def test_an_unfinished_conversion_is_named_as_one(tmp_path, placed):
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


def test_tensor_of_the_index_that_its_file_lacks_is_named(tmp_path):
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "lost": "b.safetensors"}
    write_sharded(tmp_path, TWO, weight_map)
    text = refused(tmp_path, str(tmp_path), "'lost' in b.safetensors")
    assert "'y' in a.safetensors, which b.safetensors holds" in text
    assert "'x'" not in text


def test_bad_shard_among_good_ones_is_named(tmp_path):
    write_sharded(tmp_path, {f"{i}.safetensors": {f"t{i}": b"x"} for i in range(40)})
    os.truncate(tmp_path / "23.safetensors", os.path.getsize(tmp_path / "23.safetensors") - 1)
    refused(tmp_path, str(tmp_path / "23.safetensors"), "tensor 't23'")


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


def test_file_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(tmp_path / "model.onnx", "model.onnx", ".safetensors", error=UnsupportedError)
