"""Tests of calls that repeat a complete conversion: compared, or refused if anything differs."""

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
    """Return a source and its complete conversion."""
    source, converted = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(plain(), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    amc.convert_checkpoint(source, converted, rules=[], max_shard_size="300B")
    return source, converted


def again(source, converted, **options):
    return amc.convert_checkpoint(source, converted, **{"rules": [], "max_shard_size": "300B", **options})


@pytest.mark.parametrize("verify", [True, False])
def test_repeated_complete_conversion_compares_and_writes_nothing(complete, verify):
    before = {path: path.stat().st_mtime_ns for path in complete[1].iterdir()}
    report = again(*complete, verify=verify)
    assert report.was_complete
    assert str(report).startswith("complete already             compared with the source; nothing was written\n")
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
    source, converted = complete
    before = contents(converted)
    other = plain()
    other["codes"][-1, -1] += 1
    save_file(other, source / "model.safetensors")
    with pytest.raises(DestinationError, match="differs from the result of this conversion") as error:
        again(source, converted)
    assert "codes" in str(error.value)
    assert contents(converted) == before


@pytest.mark.parametrize("change", ["a config", "an index", "one byte", "a file more", "a file less", "a header"])
def test_changed_output_of_a_complete_conversion_is_refused(complete, change):
    source, converted = complete
    shard = sorted(converted.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if change == "a config":
        (converted / "config.json").write_text("{ }")
    elif change == "an index":
        index = converted / "model.safetensors.index.json"
        index.write_text(index.read_text() + "\n")
    elif change == "a file more":
        (converted / "model.safetensors").write_bytes(bytes(data))
    elif change == "a file less":
        shard.unlink()
    else:
        data[-1 if change == "one byte" else 9] ^= 1
        shard.write_bytes(bytes(data))
    before = contents(converted)
    with pytest.raises(DestinationError):
        again(source, converted)
    assert contents(converted) == before


def test_complete_conversion_of_a_single_file_is_recognized(tmp_path):
    save_file({"a": torch.ones(3), "empty": torch.ones(0, 4)}, tmp_path / "one.safetensors")
    for expected in (False, True):
        assert again(tmp_path / "one.safetensors", tmp_path / "out").was_complete is expected


def test_conversion_onto_its_own_source_is_refused_under_any_path(complete, tmp_path):
    converted = complete[1]
    (tmp_path / "link").symlink_to(converted)
    before = contents(converted)
    for place in (converted, tmp_path / "link", f"{converted}/../{converted.name}/"):
        with pytest.raises(DestinationError, match="the destination is the directory of the source"):
            again(converted, place)
    assert contents(converted) == before


def test_change_of_either_source_file_of_one_name_is_detected(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        save_file({folder: torch.ones(3)}, source / folder / "x.safetensors")
    weight_map = {folder: f"{folder}/x.safetensors" for folder in ("a", "b")}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def stop(*arguments):
        raise KeyboardInterrupt

    for folder in ("a", "b"):
        converted = tmp_path / f"made {folder}"
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "commit", stop)
            with pytest.raises(KeyboardInterrupt):
                again(source, converted)
        os.utime(source / folder / "x.safetensors", ns=(1, 2 * 10**18))
        with pytest.raises(DestinationError, match=f"source files differ: {folder}/x.safetensors\n"):
            again(source, converted)
