"""Tests of files mistaken for those of a checkpoint: the error identifies them."""

import pytest

from tests.files.support import TWO, refused, write_sharded

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
def test_file_in_place_of_weights_is_identified(tmp_path, data, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(tmp_path, str(path), "not a safetensors file", *words)


@pytest.mark.parametrize("length", [int.from_bytes(start, "little") for start in (b"\x80\x02", b"\x1f\x8b", b"<a>")])
def test_truncated_file_is_not_mistaken_for_another_format(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":')
    refused(tmp_path, "the length of a header is impossible", "truncated", f"{length} bytes")


@pytest.mark.parametrize("data", [POINTER.encode(), b"<html></html>"])
def test_file_in_place_of_an_index_is_identified(tmp_path, data):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    words = ["git lfs pull"] if data.startswith(b"v") else ["page of HTML"]
    refused(tmp_path, "malformed JSON", "model.safetensors.index.json", *words)


def test_truncated_index_is_malformed(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"x": "a.saf')
    assert "login" not in refused(tmp_path, "malformed JSON")
