"""What a directory has room for, seen without writing to it."""

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


def test_a_directory_that_is_not_there_has_the_room_of_the_nearest_above_it(tmp_path, free):
    assert disk_space_of(str(tmp_path / "a" / "b")) == (1000, False, ())
    assert free == [str(tmp_path)]
    assert not list(tmp_path.iterdir())


def test_what_an_unfinished_work_takes_counts_as_free(tmp_path):
    staging = tmp_path / STAGING_NAME
    staging.mkdir()
    (staging / "model-00001-of-00002.safetensors").write_bytes(bytes(30))
    (staging / "journal.jsonl").write_bytes(bytes(4))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(50))  # put there by a commit that was cut short
    assert disk_space_of(str(tmp_path)) == (1034, True, ())


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_weights_are_in_the_way_and_nothing_else(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    assert disk_space_of(str(tmp_path)).existing_weights == ()
    (tmp_path / name).write_text("{}")
    assert disk_space_of(str(tmp_path)).existing_weights == (name,)


def test_what_the_system_refuses_is_told(tmp_path, monkeypatch):
    def refuse(directory):
        raise PermissionError(13, "Permission denied", directory)

    monkeypatch.setattr(system, "free_bytes", refuse)
    with pytest.raises(WriteError, match="Permission denied"):
        disk_space_of(str(tmp_path))
