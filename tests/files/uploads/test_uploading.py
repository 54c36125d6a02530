"""Tests of uploads that become a checkpoint in one step, with a real server. Killed processes: ``crash_safety``."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from automodel_conv.errors import ConversionError, DestinationError, WriteError
from automodel_conv.files import system
from automodel_conv.files.destination import open_destination
from automodel_conv.files.shards import CHECKSUMS_NAME, is_checkpoint
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.uploads import s3_store
from tests.crash_safety.support import files as files_below
from tests.faults import workers
from tests.files.uploads.support import (
    INDEX,
    WORK,
    complete,
    content,
    left_on_disk,
    new_folder,
    s3_folder,
    shards,
    write,
    write_beside,
)
from tests.stores import BUCKET, client_error, watch_calls


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_store, "PART_BYTES", 3000)  # three parts for each file


@pytest.fixture
def name():
    return new_folder()


@pytest.fixture
def folder(server, name):
    return s3_folder(server, name)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_equal_those_of_a_directory(server, folder, name, tmp_path, count):
    plan = shards(count)
    complete(folder, plan)
    with open_destination(str(tmp_path / "out"), plan, WORK) as place:
        write(place, plan)
        write_beside(place)
        place.commit(None if count == 1 else b"index")
    assert server.files(name) == files_below(tmp_path / "out")
    assert not server.open_uploads(name)
    assert not os.path.exists(folder.directory)


def test_nothing_is_visible_before_the_end_and_the_disk_holds_two_files(server, folder, name):
    plan = shards()
    with folder.open(plan, WORK) as place:
        for shard in plan:
            Path(place.path(shard.name)).write_bytes(content(shard))
            place.finish(shard)
            assert len([file for file in left_on_disk(folder) if file.endswith(".safetensors")]) <= 2
            assert not server.files(name)
        write_beside(place)
        assert not server.files(name)
        place.commit(b"index")
    assert len(server.files(name)) == len(plan) + 3


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["x-1-of-2.safetensors", "x-2-of-2.safetensors"], ["1-of", "2-of", "conf", "toke", "i"]),
        (["a.safetensors", "model.safetensors"], ["i", "a.s", "conf", "toke", "model.s"]),
        (["model.safetensors"], ["conf", "toke", "model.s"]),
    ],
)
def test_file_that_makes_it_a_checkpoint_is_the_last(folder, monkeypatch, names, order):
    plan = [shard._replace(name=name) for shard, name in zip(shards(3), names, strict=False)]
    seen, real = [], s3_store.S3Store._write
    watched = lambda self, method, name, *a, **k: seen.append(name) or real(self, method, name, *a, **k)  # noqa: E731
    monkeypatch.setattr(s3_store.S3Store, "_write", watched)
    with folder.open(plan, WORK) as place:
        write(place, plan)
        write_beside(place)
        place.commit(None if len(names) == 1 else b"index")
    index = [INDEX] if len(names) > 1 else []
    every = [*names, "config.json", "tokenizer/vocab.json", *index]
    short = {"i": INDEX, "conf": "config.json", "toke": "tokenizer/vocab.json"}
    assert seen == [short.get(one) or next(name for name in every if one in name) for one in order]


def interrupted(folder, plan, finished=1, **options):
    """Finish some files and then fail."""
    with pytest.raises(RuntimeError, match="stop"), folder.open(plan, WORK, **options) as place:  # noqa: PT012
        write(place, plan[:finished])
        place._wait()
        raise RuntimeError("stop")


def test_finished_files_are_not_uploaded_again(server, folder, name, monkeypatch):
    plan = shards()
    interrupted(folder, plan, 2)
    assert server.open_uploads(name) == [f"{name}/{shard.name}" for shard in plan[:2]]
    calls = watch_calls(monkeypatch)
    with folder.open(plan, WORK, resume=True) as place:
        assert place.unfinished == {plan[2].name}
        assert "upload_part" not in calls
        write(place, plan)
        place.commit(b"index")
    assert server.files(name) == {INDEX: b"index"} | {shard.name: content(shard) for shard in plan}
    assert calls.count("upload_part") == len(s3_store.parts_of(plan[2].nbytes))
    assert not server.open_uploads(name)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_parts_of_an_interrupted_upload_are_not_uploaded_again(server, folder, name, monkeypatch, failing):
    plan = shards(1)
    monkeypatch.setattr(s3_store, "THREADS", 1)
    with monkeypatch.context() as patch:
        sent = []

        def refuse(number, method):
            sent.append(method == "upload_part")
            if sum(sent) == failing and sent[-1]:
                raise client_error("InternalError")

        watch_calls(patch, refuse)
        with pytest.raises(WriteError, match="InternalError"):
            complete(folder, plan)
    assert f"{STAGING_NAME}/{plan[0].name}" in left_on_disk(folder)
    call = server.system.call_s3
    [one] = call("list_multipart_uploads", Bucket=BUCKET, Prefix=name)["Uploads"]
    present = call("list_parts", Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"]).get("Parts", ())
    assert failing - 1 <= len(present) < 3
    calls = watch_calls(monkeypatch)
    with folder.open(plan, WORK, resume=True) as place:
        assert not place.unfinished
        place.commit(None)
    assert calls.count("upload_part") == 3 - len(present)
    assert server.files(name) == {plan[0].name: content(plan[0])}


def test_file_whose_upload_the_store_has_lost_is_written_again(server, folder, name):
    plan = shards()
    interrupted(folder, plan, 3)
    system_calls = server.system.call_s3
    for one in system_calls("list_multipart_uploads", Bucket=BUCKET, Prefix=name)["Uploads"][:1]:
        system_calls("abort_multipart_upload", Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"])
        lost = one["Key"].removeprefix(f"{name}/")
    with folder.open(plan, WORK, resume=True) as place:
        assert place.unfinished == {lost}
        write(place, plan)
        place.commit(b"index")
    assert server.files(name) == {INDEX: b"index"} | {shard.name: content(shard) for shard in plan}


def test_part_that_was_changed_in_the_store_is_uploaded_again(server, folder, name):
    plan = shards(1)
    interrupted(folder, plan)
    call = server.system.call_s3
    [one] = call("list_multipart_uploads", Bucket=BUCKET, Prefix=name)["Uploads"]
    call("upload_part", Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"], PartNumber=2, Body=bytes(3000))
    with folder.open(plan, WORK, resume=True) as place:
        assert place.unfinished == {plan[0].name}
        write(place, plan)
        place.commit(None)
    assert server.files(name) == {plan[0].name: content(plan[0])}
    assert not server.open_uploads(name)


@pytest.mark.parametrize("needed", ["verify", "checksums"])
def test_file_that_lacks_a_comparison_or_checksums_is_written_again(folder, needed):
    plan = shards()
    interrupted(folder, plan, 3)
    with pytest.raises(RuntimeError), folder.open(plan, WORK, resume=True, **{needed: True}) as place:  # noqa: PT012
        assert place.unfinished == {shard.name for shard in plan}
        write(place, plan, verified=True, checksums={"a": "0"})
        raise RuntimeError
    with folder.open(plan, WORK, resume=True, **{needed: True}) as place:
        assert not place.unfinished
        assert place.verified == {shard.name for shard in plan}
        assert place.checksums == {shard.name: {"a": "0"} for shard in plan}
        place.commit(b"index")


def test_work_that_is_not_resumed_removes_its_uploads(server, folder, name):
    plan = shards()
    interrupted(folder, plan, 2)
    with folder.open(plan, WORK, resume=False) as place:
        assert len(place.unfinished) == 3
        assert not server.open_uploads(name)
        write(place, plan)
        place.commit(b"index")
    assert len(server.files(name)) == 4


def test_other_work_is_refused_and_keeps_the_uploads(server, folder, name):
    plan = shards()
    interrupted(folder, plan, 2)
    other = {**WORK, "files": ["y"], "options": {"layout": "vllm"}}
    text = r"(?s)differs from this one.*nemo.*vllm"
    with pytest.raises(DestinationError, match=text), folder.open(plan, other, resume=True):
        pass
    assert len(server.open_uploads(name)) == 2
    with folder.open(plan, WORK, resume=True) as place:
        assert place.unfinished == {plan[2].name}


@pytest.mark.parametrize("present", [INDEX, "model.safetensors", "pytorch_model.bin"])
def test_folder_that_holds_a_checkpoint_is_refused(server, folder, name, present):
    server.put(name, present)
    text = f"(?s)holds a checkpoint already.*{present}"
    with pytest.raises(DestinationError, match=text), folder.open(shards(), None):
        pass
    assert server.files(name) == {present: b"data"}
    assert not server.open_uploads(name)
    assert not os.path.exists(folder.directory)


def test_other_files_of_the_folder_stay_or_are_replaced(server, folder, name):
    for file in ("README.md", "config.json", CHECKSUMS_NAME, "below/model.safetensors"):
        server.put(name, file)
    written = complete(folder, shards())
    assert server.files(name) == written | {"README.md": b"data", "below/model.safetensors": b"data"}


def test_second_process_of_this_machine_is_refused(folder):
    with (
        folder.open(shards(), WORK),
        pytest.raises(DestinationError, match="another process writes"),
        folder.open(shards(), WORK, resume=True),
    ):
        pass


@pytest.mark.parametrize("count", [1, 3])
def test_of_two_machines_one_makes_nothing_visible(server, folder, name, monkeypatch, tmp_path, count):
    plan = shards(count)
    with folder.open(plan, WORK) as first:
        write(first, plan)
        first.write("config.json", b"first")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
        other = s3_folder(server, name)
        with pytest.raises(DestinationError, match="another process writes"), other.open(plan, None) as second:  # noqa: PT012
            write(second, plan)
            first.commit(None if count == 1 else b"index")
            if count > 1:
                second.write("config.json", b"second")
            second.commit(None if count == 1 else b"index of the second")
    index = {INDEX: b"index"} if count > 1 else {}
    assert server.files(name) == {"config.json": b"first"} | index | {shard.name: content(shard) for shard in plan}
    assert not server.open_uploads(name)


def test_store_without_conditions_is_written_to(server, folder, name, monkeypatch):
    real, refused = s3_store.S3Store._send, []

    def send(self, method, name, **arguments):
        if "IfNoneMatch" in arguments:
            refused.append(name)
            raise client_error("NotImplemented")
        return real(self, method, name, **arguments)

    monkeypatch.setattr(s3_store.S3Store, "_send", send)
    written = complete(folder, shards())
    assert server.files(name) == written
    assert len(refused) == 4


def test_large_file_beside_the_weights_is_uploaded_in_parts(server, folder, name, monkeypatch):
    plan, data = shards(1), bytes(range(256)) * 30
    calls = watch_calls(monkeypatch)
    with folder.open(plan, WORK) as place:
        write(place, plan)
        place.write("tokenizer.json", data)
        place.write("empty.txt", b"")
        place.commit(None)
    assert calls.count("upload_part") == 6
    assert server.files(name) == {plan[0].name: content(plan[0]), "tokenizer.json": data, "empty.txt": b""}


def total_calls(server, monkeypatch, count):
    with monkeypatch.context() as patch:
        calls = watch_calls(patch)
        complete(s3_folder(server, new_folder()), shards(count), None)
    return len(calls)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_failure_at_any_request_leaves_nothing_behind(server, monkeypatch, count, moment):
    total, plan = total_calls(server, monkeypatch, count), shards(count)
    for failing in range(1, total + 1):
        name = new_folder()
        folder = s3_folder(server, name)

        def fail(number, method, failing=failing):
            if number == failing:
                raise client_error("AccessDenied")

        with monkeypatch.context() as patch:
            watch_calls(patch, **{moment: fail})
            try:
                complete(folder, plan, None)
            except ConversionError as error:
                assert "AccessDenied" in str(error)  # noqa: PT017
                assert not server.files(name)
            else:  # the file was written, and only the answer was lost
                assert moment == "after"
        assert not os.path.exists(folder.directory)
        assert not server.open_uploads(name), f"request {failing}"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_work_that_failed_at_any_request_is_resumed(server, monkeypatch, count, moment):
    total, plan = total_calls(server, monkeypatch, count), shards(count)
    for failing in range(1, total + 1):
        name = new_folder()
        folder = s3_folder(server, name)

        def fail(number, method, failing=failing):
            if number == failing:
                raise client_error("SlowDown")

        with monkeypatch.context() as patch:
            watch_calls(patch, **{moment: fail})
            try:
                complete(folder, plan)
            except WriteError:
                visible = server.files(name)
                assert not {INDEX, "model.safetensors"} & visible.keys()
                with folder.open(plan, WORK, resume=True) as place:
                    write(place, plan)
                    write_beside(place)
                    place.commit(None if count == 1 else b"index")
            assert not os.path.exists(folder.directory)
        assert not server.open_uploads(name), f"request {failing}"
        expected = {shard.name: content(shard) for shard in plan} | ({} if count == 1 else {INDEX: b"index"})
        assert {file: data for file, data in server.files(name).items() if is_checkpoint(file)} == expected
        assert len(server.files(name)) == len(expected) + 2


def test_error_of_the_removal_is_added_to_the_first_one(folder, monkeypatch):
    def fail(number, method):
        if method in ("upload_part", "abort_multipart_upload"):
            raise client_error("AccessDenied", f"no {method}")

    watch_calls(monkeypatch, fail)
    with pytest.raises(WriteError, match=r"(?s)no upload_part.*cannot be removed.*no abort_multipart_upload"):
        complete(folder, shards(), None)


def test_full_disk_is_a_write_error_that_names_the_folder_on_this_machine(folder, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "write_end", fail)
    with pytest.raises(WriteError, match=f"(?s){folder.directory}.*No space left"):
        complete(folder, shards(), None)


def test_journal_has_no_credentials(server, folder):
    plan = shards()
    interrupted(folder, plan, 3)
    texts = [path.read_bytes() for path in Path(folder.directory).rglob("*") if path.is_file()]
    assert any(json.loads(text.splitlines()[0])["work"] == WORK for text in texts if text)
    for value in server.options["key"], server.options["secret"]:
        assert not any(value.encode() in text for text in texts)


def test_interrupt_does_not_wait_for_the_upload(server, folder, name, monkeypatch):
    plan, sent = shards(), []
    monkeypatch.setattr(s3_store, "PART_BYTES", 10)

    def slow(number, method):
        if method == "upload_part":
            sent.append(number)
            time.sleep(0.05)

    with monkeypatch.context() as patch:
        watch_calls(patch, slow)
        with pytest.raises(KeyboardInterrupt), folder.open(plan, WORK) as place:  # noqa: PT012
            write(place, plan[:1])
            while not sent:
                time.sleep(0.01)
            raise KeyboardInterrupt
    assert len(sent) < 100 < len(s3_store.parts_of(plan[0].nbytes))
    assert workers() == []
    with folder.open(plan, WORK, resume=True) as place:
        assert plan[0].name not in place.unfinished
        write(place, plan)
        place.commit(b"index")
    assert server.files(name) == {INDEX: b"index"} | {shard.name: content(shard) for shard in plan}


def test_signal_that_another_thread_receives_does_not_wait_for_the_upload(folder, monkeypatch):
    plan, sent = shards(), []
    monkeypatch.setattr(s3_store, "PART_BYTES", 10)

    def slow(number, method):
        if method == "upload_part":
            sent.append(number)
            time.sleep(0.05)
            if number == sent[0] + 20:  # the main thread waits by now
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    watch_calls(monkeypatch, slow)
    with pytest.raises(KeyboardInterrupt), folder.open(plan, WORK) as place:
        write(place, plan[:2])
    assert len(sent) < 100 < len(s3_store.parts_of(plan[0].nbytes))
    assert workers() == []


def test_error_of_an_upload_in_the_background_ends_the_work(folder, monkeypatch):
    def fail(number, method):
        if method == "upload_part":
            raise client_error("AccessDenied", "not this one")

    watch_calls(monkeypatch, fail)
    with pytest.raises(WriteError, match="not this one"), folder.open(shards(), None) as place:
        write(place, shards())
    assert workers() == []
