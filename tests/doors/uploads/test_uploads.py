"""Tests of public functions that write to S3 and to the Hub: the same bytes as in a directory."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers", reason="builds a transformers model")

import automodel_conv as amc
from automodel_conv.errors import DestinationError, VerificationError, WriteError, size_text
from automodel_conv.execution import comparing
from automodel_conv.files import system
from automodel_conv.files.uploads import s3_store
from automodel_conv.publishing import conversion_files
from tests.cli.support import run
from tests.crash_safety.support import files as files_below
from tests.doors.adapters.support import default_adapter, published, write_base
from tests.doors.converting.support import plain
from tests.loopback_hub import serve, use
from tests.stores import BUCKET, client_error, watch_calls

SIZES = {"max_shard_size": "3KB"}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("uploads")
    write_base(root / "base", published(), files=3)
    (root / "base" / "tokenizer").mkdir()
    (root / "base" / "tokenizer" / "vocab.json").write_text("words")
    default_adapter(root / "adapter")
    return root / "base"


@pytest.fixture
def name():
    return f"door-{next(_numbers)}"


@pytest.fixture
def url(name):
    return f"s3://{BUCKET}/{name}"


CALLS = {
    "convert": lambda base, out, **o: amc.convert_checkpoint(base, out, layout="nemo", **SIZES, **o),
    "one file": lambda base, out, **o: amc.convert_checkpoint(base, out, dtype=torch.float32, **o),
    "checksums": lambda base, out, **o: amc.convert_checkpoint(base, out, checksums=True, verify=False, **SIZES, **o),
    "merge": lambda base, out, **o: amc.merge_adapter(base, base.parent / "adapter", out, **SIZES, **o),
    "adapter": lambda base, out, **o: amc.convert_adapter(base.parent / "adapter", out, base=base, layout="vllm", **o),
    "save": lambda base, out, **o: amc.save_checkpoint(plain(), out, rules=[], max_shard_size=500, checksums=True, **o),
    "save one": lambda base, out, **o: amc.save_checkpoint(plain(), out, rules=[], **o),
    "save no bytes": lambda base, out, **o: amc.save_checkpoint({"a": torch.empty(0, 4)}, out, rules=[], **o),
    "carry": lambda base, out, **o: amc.save_checkpoint(plain(), out, rules=[], carry=base, max_shard_size=900, **o),
}


@pytest.mark.parametrize("call", CALLS)
def test_files_equal_those_of_a_directory(server, base, name, url, cache, tmp_path, call):
    local = CALLS[call](base, tmp_path / "out")
    remote = CALLS[call](base, url, storage_options=server.options)
    assert server.files(name) == files_below(tmp_path / "out")
    assert (remote.files, remote.bytes_written) == (local.files, local.bytes_written)
    assert not server.open_uploads(name)
    assert not list(cache.rglob("*.safetensors"))
    assert not os.listdir(cache / "automodel_conv" / "uploads")


@pytest.mark.parametrize("call", ["convert", "one file", "checksums", "merge"])
def test_complete_destination_is_compared_and_nothing_is_written(server, base, name, url, monkeypatch, call):
    CALLS[call](base, url, storage_options=server.options)
    before = server.files(name)
    calls = watch_calls(monkeypatch)
    assert CALLS[call](base, url, storage_options=server.options).was_complete
    assert not {"put_object", "create_multipart_upload", "upload_part", "delete_object"} & set(calls)
    assert server.files(name) == before


def test_complete_destination_that_differs_is_refused(server, base, name, url):
    report = CALLS["convert"](base, url, storage_options=server.options)
    data = bytearray(server.files(name)[report.files[0]])
    data[-1] ^= 1
    server.put(name, report.files[0], bytes(data))
    with pytest.raises(DestinationError, match=rf"(?s)differs from the result.*where: +{url}\n"):
        CALLS["convert"](base, url, storage_options=server.options)
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        CALLS["convert"](base, url, storage_options=server.options, resume=False)
    assert server.files(name)[report.files[0]] == data


@pytest.mark.parametrize("call", ["adapter", "save"])
def test_destination_with_weights_is_refused(server, base, name, url, call):
    server.put(name, "model.safetensors")
    with pytest.raises(DestinationError, match=rf"(?s)holds a checkpoint already.*{url}"):
        CALLS[call](base, url, storage_options=server.options)
    assert server.files(name) == {"model.safetensors": b"data"}


def test_uploads_have_a_bar_with_their_bytes(server, base, url, capsys):
    report = amc.convert_checkpoint(base, url, rules=[], progress=True, storage_options=server.options)
    bars = dict(re.findall(r"(\w+): +100%\|[^|]*\| [\w.]+/([\w.]+)", capsys.readouterr().err))
    assert list(bars) == ["writing", "verifying", "uploading"]
    assert bars["writing"] == bars["verifying"]
    assert float(bars["uploading"].rstrip("kM")) > 0
    assert sum(report.phases.values()) == pytest.approx(report.seconds)


def test_disk_needs_room_for_two_files_only(server, base, url, monkeypatch, tmp_path):
    report = CALLS["convert"](base, tmp_path / "out")
    sizes = [(tmp_path / "out" / file).stat().st_size for file in report.files]
    largest = max(map(sum, pairwise(sizes)))
    monkeypatch.setattr(system, "free_bytes", lambda directory: largest - 1)
    with pytest.raises(WriteError, match=rf"(?s)too little room.*{size_text(largest)} for 2 files"):
        CALLS["convert"](base, url, storage_options=server.options)
    monkeypatch.setattr(system, "free_bytes", lambda directory: largest)
    assert CALLS["convert"](base, url, storage_options=server.options).files == report.files


def test_disk_never_holds_the_model(server, base, url, cache, monkeypatch):
    seen = []
    watch_calls(monkeypatch, lambda number, method: seen.append(len(list(cache.rglob("*.safetensors")))))
    for call in ("convert", "save"):
        CALLS[call](base, f"{url}/{call}", storage_options=server.options)
    assert max(seen) == 2


@pytest.mark.parametrize("call", ["convert", "merge", "checksums"])
def test_conversion_that_failed_continues_with_what_was_uploaded(server, base, name, url, tmp_path, monkeypatch, call):
    CALLS[call](base, tmp_path / "out")

    def fail(number, method):
        parts.append(method == "upload_part")
        if sum(parts) == 3:
            raise client_error("ExpiredToken", "the token has expired")

    parts = []
    with monkeypatch.context() as patch:
        watch_calls(patch, fail)
        with pytest.raises(WriteError, match=rf"(?s){url}.*ExpiredToken.*renew the credentials, then repeat") as error:
            CALLS[call](base, url, storage_options=server.options)
    assert server.options["secret"] not in str(error.value)
    assert server.files(name) == {}
    report = CALLS[call](base, url, storage_options=server.options)
    # Two were uploaded, the upload of one was interrupted, and the next one may have been written meanwhile.
    assert report.files_resumed in (3, 4)
    assert server.files(name) == files_below(tmp_path / "out")


def test_shard_that_was_not_compared_is_written_and_compared_again(server, base, name, url, monkeypatch):
    def fail(number, method):
        if method == "complete_multipart_upload":
            raise client_error("InternalError")

    with monkeypatch.context() as patch:
        watch_calls(patch, fail)
        with pytest.raises(WriteError, match="InternalError"):
            CALLS["convert"](base, url, storage_options=server.options, verify=False)
    compared = []
    real = comparing.compare_file
    monkeypatch.setattr(
        conversion_files, "compare_file", lambda slabs, source, *a: compared.append(source) or real(slabs, source, *a)
    )
    report = CALLS["convert"](base, url, storage_options=server.options)
    assert report.files_resumed == 0
    assert len(compared) == len(report.files)


def test_file_that_differs_from_its_source_is_not_uploaded(server, base, name, url, monkeypatch):
    def fail(*arguments):
        raise VerificationError("differs")

    monkeypatch.setattr(conversion_files, "compare_file", fail)
    with pytest.raises(VerificationError):
        CALLS["convert"](base, url, storage_options=server.options)
    assert not server.open_uploads(name)


@pytest.mark.parametrize("failing", ["upload_part", "complete_multipart_upload", "put_object"])
def test_save_that_failed_leaves_nothing(server, base, name, url, cache, monkeypatch, failing):
    def fail(number, method):
        if method == failing:
            raise client_error("AccessDenied", "not allowed")

    with monkeypatch.context() as patch:
        watch_calls(patch, fail)
        with pytest.raises(WriteError, match=rf"(?s){url}.*AccessDenied: not allowed.*check the credentials"):
            CALLS["save"](base, url, storage_options=server.options)
    assert server.files(name) == {}
    assert not server.open_uploads(name)
    assert not os.listdir(cache / "automodel_conv" / "uploads")
    CALLS["save"](base, url, storage_options=server.options)


def test_unfinished_conversion_of_other_options_is_refused(server, base, url, monkeypatch):
    def fail(number, method):
        if method == "complete_multipart_upload":
            raise client_error("SlowDown")

    with monkeypatch.context() as patch:
        watch_calls(patch, fail)
        with pytest.raises(WriteError):
            CALLS["convert"](base, url, storage_options=server.options)
    with pytest.raises(DestinationError, match=r"(?s)differs from this one.*layout='nemo'.*layout='vllm'"):
        amc.convert_checkpoint(base, url, layout="vllm", storage_options=server.options, **SIZES)
    with pytest.raises(DestinationError, match="this call:  a save"):
        CALLS["save"](base, url, storage_options=server.options)
    amc.convert_checkpoint(base, url, layout="vllm", storage_options=server.options, resume=False, **SIZES)


def test_memory_of_the_upload_is_in_the_report(server, base, url, tmp_path):
    report = CALLS["save"](base, url, storage_options=server.options, scratch_bytes=1 << 20)
    local = CALLS["save"](base, tmp_path / "out", scratch_bytes=1 << 20)
    assert report.peak_extra_bytes == local.peak_extra_bytes + s3_store.PART_BYTES * s3_store.THREADS


def test_source_that_changes_is_refused_and_nothing_is_visible(server, base, name, url, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "source")

    def change(number, method):
        if method == "upload_part":
            os.utime(tmp_path / "source" / "model-00001-of-00003.safetensors", ns=(number, number))

    watch_calls(monkeypatch, change)
    with pytest.raises(DestinationError, match="the source was changed"):
        CALLS["convert"](tmp_path / "source", url, storage_options=server.options)
    assert server.files(name) == {}


@pytest.mark.parametrize("call", ["convert", "one file", "merge", "adapter", "save"])
def test_repository_of_the_hub_gets_the_same_files(base, tmp_path, monkeypatch, cache, call):
    pytest.importorskip("huggingface_hub")
    CALLS[call](base, tmp_path / "out")
    with serve({}) as hub:
        use(hub, tmp_path / "hub", monkeypatch)
        CALLS[call](base, "hf://org/new", token="hf_right")
        assert {path: file.read_bytes() for path, file in hub.files("org/new").items()} == files_below(tmp_path / "out")
        if call in ("convert", "one file", "merge"):
            assert CALLS[call](base, "hf://org/new").was_complete
        else:
            with pytest.raises(DestinationError, match="hf://org/new"):
                CALLS[call](base, "hf://org/new")
    assert not os.listdir(cache / "automodel_conv" / "uploads")


def test_command_line_writes_to_a_store(server, base, name, url, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    command = ["convert", str(base), url, "--layout", "nemo", "--max-shard-size", "3KB"]
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert server.files(name) == {}
    assert run(*command).exit_code == 0
    CALLS["convert"](base, tmp_path / "out")
    assert server.files(name) == files_below(tmp_path / "out")
    again = run(*command, "--dry-run")
    assert again.exit_code == 1
    assert "the directory holds a checkpoint already" in again.stderr


def test_config_of_a_model_is_uploaded(server, name, url, tmp_path):
    from tests.model_zoo import build_model

    model = build_model("mixtral")
    amc.save_checkpoint(model, tmp_path / "out", max_shard_size="100KB")
    amc.save_checkpoint(model, url, max_shard_size="100KB", storage_options=server.options)
    assert server.files(name) == files_below(tmp_path / "out")
    assert "config.json" in server.files(name)
    assert json.loads(server.files(name)["config.json"])["model_type"] == "mixtral"
