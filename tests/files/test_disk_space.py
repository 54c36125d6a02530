"""Tests of the free space of a directory, determined without writing to it."""

import pytest

from automodel_conv.errors import WriteError
from automodel_conv.files import system
from automodel_conv.files.disk_space import disk_space_of
from automodel_conv.files.staging import STAGING_NAME


@pytest.fixture(autouse=True)
def free(monkeypatch):
    asked = []
    monkeypatch.setattr(system, "free_bytes", lambda directory: asked.append(directory) or 1000)
    return asked


def test_missing_directory_has_the_space_of_its_nearest_parent(tmp_path, free):
    assert disk_space_of(str(tmp_path / "a" / "b")) == (1000, False, ())
    assert free == [str(tmp_path)]
    assert not list(tmp_path.iterdir())


def test_space_of_unfinished_work_counts_as_free(tmp_path):
    staging = tmp_path / STAGING_NAME
    staging.mkdir()
    (staging / "model-00001-of-00002.safetensors").write_bytes(bytes(30))
    (staging / "journal.jsonl").write_bytes(bytes(4))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(50))  # moved by an interrupted commit
    assert disk_space_of(str(tmp_path)) == (1034, True, ())


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_only_existing_weights_block_a_destination(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    assert disk_space_of(str(tmp_path)).existing_weights == ()
    (tmp_path / name).write_text("{}")
    assert disk_space_of(str(tmp_path)).existing_weights == (name,)


def test_error_of_the_system_is_raised(tmp_path, monkeypatch):
    def refuse(directory):
        raise PermissionError(13, "Permission denied", directory)

    monkeypatch.setattr(system, "free_bytes", refuse)
    with pytest.raises(WriteError, match="Permission denied"):
        disk_space_of(str(tmp_path))
