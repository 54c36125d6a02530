"""Tests of the paths that callers give."""

from pathlib import Path

import pytest
from torch import nn

import automodel_conv as amc
from automodel_conv.files.paths import text_of_path


@pytest.mark.parametrize("path", ["a/b", b"a/b", Path("a/b"), "s3://a/b", b"\xff"])
def test_path_becomes_text(path):
    text = text_of_path(path)
    assert type(text) is str
    assert text.encode(errors="surrogateescape") == (path if type(path) is bytes else str(path).encode())


WRONG = {
    "None": (None, "None"),
    "a number": (3, "a int"),
    "a list": (["a"], "a list"),
    "an empty text": ("", "an empty text"),
    "no bytes": (b"", "an empty text"),
}


@pytest.mark.parametrize(("path", "found"), WRONG.values(), ids=WRONG)
def test_public_functions_say_what_is_no_path(path, found, tmp_path):
    calls = (
        lambda: amc.open_checkpoint(path),
        lambda: amc.load_state_dict(path, rules=[]),
        lambda: amc.load_model(nn.Linear(1, 1), path),
        lambda: amc.convert_checkpoint(path, tmp_path / "new", rules=[]),
        lambda: amc.save_checkpoint(nn.Linear(1, 1), path),
        lambda: amc.verify_checkpoint(path, tmp_path, rules=[]),
        lambda: amc.convert_adapter(path, tmp_path / "new", base=tmp_path, layout="per_expert"),
    )
    for call in calls:
        with pytest.raises(amc.UnsupportedError, match=f"^not a path\n(.|\n)*found: +{found}\n"):
            call()


def test_open_file_is_no_path(tmp_path):
    with open(tmp_path / "file", "wb") as file, pytest.raises(amc.UnsupportedError, match=r"found: +a BufferedWriter"):
        amc.open_checkpoint(file)


def test_destination_without_a_name_is_not_this_folder(tmp_path, monkeypatch):
    amc.save_checkpoint(nn.Linear(1, 1), tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(amc.UnsupportedError, match="not a path"):
        amc.convert_checkpoint(tmp_path / "source", "", rules=[])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
