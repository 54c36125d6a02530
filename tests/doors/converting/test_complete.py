"""A conversion that is called again when it is complete: compared, or refused where anything is another."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import DestinationError
from automodel_conv.files.destination import Destination
from tests.comparing import contents
from tests.doors.converting.support import plain


@pytest.fixture
def complete(tmp_path):
    """A source, and what the conversion of it to float32 and other files has made."""
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    save_file(plain(), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    amc.convert_checkpoint(source, made, rules=[], max_shard_size="300B")
    return source, made


def again(source, made, **options):
    return amc.convert_checkpoint(source, made, **{"rules": [], "max_shard_size": "300B", **options})


@pytest.mark.parametrize("verify", [True, False])
def test_a_complete_conversion_called_again_compares_and_writes_nothing(complete, verify):
    before = {path: path.stat().st_mtime_ns for path in complete[1].iterdir()}
    report = again(*complete, verify=verify)
    assert report.was_complete
    assert report.bytes_written == 0
    assert report.files_resumed == len(report.files) > 1
    assert {path: path.stat().st_mtime_ns for path in complete[1].iterdir()} == before


@pytest.mark.parametrize(
    "options",
    [{"resume": False}, {"dtype": torch.float32}, {"max_shard_size": "5GB"}, {"drop": ["codes"]}, {"checksums": True}],
    ids=str,
)
def test_other_options_are_refused_by_a_complete_conversion(complete, options):
    before = contents(complete[1])
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        again(*complete, **options)
    assert contents(complete[1]) == before


def test_another_source_is_refused_by_a_complete_conversion(complete):
    source, made = complete
    before = contents(made)
    other = plain()
    other["codes"][-1, -1] += 1
    save_file(other, source / "model.safetensors")
    with pytest.raises(DestinationError, match="differs from the result of this conversion") as told:
        again(source, made)
    assert "codes" in str(told.value)
    assert contents(made) == before


@pytest.mark.parametrize("change", ["a config", "an index", "one byte", "a file more", "a file less", "a header"])
def test_what_was_changed_after_a_conversion_is_refused(complete, change):
    source, made = complete
    shard = sorted(made.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if change == "a config":
        (made / "config.json").write_text("{ }")
    elif change == "an index":
        index = made / "model.safetensors.index.json"
        index.write_text(index.read_text() + "\n")
    elif change == "a file more":
        (made / "model.safetensors").write_bytes(bytes(data))
    elif change == "a file less":
        shard.unlink()
    else:
        data[-1 if change == "one byte" else 9] ^= 1
        shard.write_bytes(bytes(data))
    before = contents(made)
    with pytest.raises(DestinationError):
        again(source, made)
    assert contents(made) == before


def test_a_complete_conversion_of_one_file_and_of_nothing_beside_it_is_known(tmp_path):
    save_file({"a": torch.ones(3), "empty": torch.ones(0, 4)}, tmp_path / "one.safetensors")
    for expected in (False, True):
        assert again(tmp_path / "one.safetensors", tmp_path / "made").was_complete is expected


def test_a_conversion_onto_its_own_source_is_refused_by_whatever_path_it_is_called(complete, tmp_path):
    made = complete[1]
    (tmp_path / "link").symlink_to(made)
    before = contents(made)
    for place in (made, tmp_path / "link", f"{made}/../{made.name}/"):
        with pytest.raises(DestinationError, match="holds a checkpoint already"):
            again(made, place)
    assert contents(made) == before


def test_a_change_of_either_of_two_source_files_of_one_name_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        save_file({folder: torch.ones(3)}, source / folder / "x.safetensors")
    weight_map = {folder: f"{folder}/x.safetensors" for folder in ("a", "b")}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def stop(*arguments):
        raise KeyboardInterrupt

    for folder in ("a", "b"):
        made = tmp_path / f"made {folder}"
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "commit", stop)
            with pytest.raises(KeyboardInterrupt):
                again(source, made)
        os.utime(source / folder / "x.safetensors", ns=(1, 2 * 10**18))
        with pytest.raises(DestinationError, match=f"source files, {folder}/x.safetensors"):
            again(source, made)
