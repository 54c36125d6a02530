"""Tests of the requests to an S3 store; whole uploads are in ``test_uploading.py``."""

from __future__ import annotations

import threading

import pytest

from automodel_conv.errors import WriteError
from automodel_conv.files.uploads import s3_store
from automodel_conv.files.uploads.s3_store import MOST_PARTS, PART_BYTES, parts_of
from automodel_conv.files.uploads.upload_journal import Upload
from tests.files.uploads.support import new_folder, s3_folder
from tests.stores import BUCKET, client_error, watch_calls

MIB = 1 << 20


@pytest.fixture
def name():
    return new_folder()


@pytest.fixture
def store(server, name):
    return s3_folder(server, name).store


@pytest.mark.parametrize("nbytes", [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 10 * PART_BYTES, 3 << 40])
def test_parts_are_all_bytes_in_order_and_not_too_many(nbytes):
    parts = parts_of(nbytes)
    assert [part.number for part in parts] == [*range(1, len(parts) + 1)]
    ends = [part.start + part.nbytes for part in parts]
    assert [0, *ends] == [*(part.start for part in parts), nbytes]
    assert len(parts) <= MOST_PARTS
    assert all(part.nbytes >= 5 * MIB for part in parts[:-1])
    assert parts[-1].nbytes > 0


def ask_for_less(monkeypatch, store, method, **limit):
    """Limit the answers of a request, so that it has several pages."""
    real = type(store.system).call_s3

    def call(self, called, **named):
        return real(self, called, **named, **(limit if called == method else {}))

    monkeypatch.setattr(type(store.system), "call_s3", call)


def test_names_are_those_of_the_folder_itself_on_all_pages(server, store, name, monkeypatch):
    assert store.names() == []
    wanted = [f"{number:02}" for number in range(7)]
    for file in (*wanted, "below/a"):
        server.put(name, file)
    server.put(f"{name}-other", "b")
    ask_for_less(monkeypatch, store, "list_objects_v2", MaxKeys=2)
    assert store.names() == wanted


def test_bucket_itself_is_a_folder(server):
    folder = s3_folder(server, "")
    assert folder.store.prefix == ""
    server.system.call_s3("put_object", Bucket=BUCKET, Key="top", Body=b"12345")
    assert "top" in folder.names()
    assert folder.size("top") == 5
    server.system.call_s3("delete_object", Bucket=BUCKET, Key="top")
    assert folder.size("top") is None


def test_mark_is_kept_next_to_the_users_own_metadata(server, tmp_path):
    name = new_folder()
    store = s3_folder(server, name, s3_additional_kwargs={"Metadata": {"owner": "me"}}).store
    (tmp_path / "a").write_bytes(b"data")
    store.publish(["a"], {"a": str(tmp_path / "a")}, {}, "mark")
    head = server.system.call_s3("head_object", Bucket=BUCKET, Key=f"{name}/a")
    assert head["Metadata"] == {"owner": "me", "automodel-conv": "mark"}
    assert store.is_marked("a", "mark")
    assert not store.is_marked("a", "other")
    assert not store.is_marked("b", "mark")


def test_only_marked_files_are_removed(server, store, name, tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    store.publish(["a", "b"], dict.fromkeys("ab", str(tmp_path / "a")), {}, "mark")
    server.put(name, "b", b"of another")
    store.remove(["a", "b", "c"], "mark")
    assert server.files(name) == {"b": b"of another"}
    store.remove(["b"])
    assert server.files(name) == {}


def uploaded(store, path, nbytes, records=None):
    path.write_bytes(bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256))
    upload = Upload()
    store.upload("a", str(path), nbytes, upload, "mark", ([] if records is None else records).append, threading.Event())
    return upload


def test_each_step_is_recorded_after_the_store_has_it(store, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "PART_BYTES", 1000)
    records = []
    upload = uploaded(store, tmp_path / "a", 2500, records)
    assert records[:2] == [{"upload": "a", "id": None}, {"upload": "a", "id": upload.id}]
    parts = sorted((record["part"], record["etag"]) for record in records[2:])
    assert parts == sorted(upload.parts.items())
    assert [number for number, _ in parts] == [1, 2, 3]
    assert store.has_parts("a", upload, 2500)
    assert not store.has_parts("a", upload, 2501)
    assert not store.has_parts("a", Upload(upload.id, {1: upload.parts[1]}), 2500)
    assert not store.has_parts("a", Upload(), 2500)
    store.abort({"a": upload})
    assert not store.has_parts("a", upload, 2500)


def test_parts_of_all_pages_are_found(store, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "PART_BYTES", 10)
    upload = uploaded(store, tmp_path / "a", 95)
    ask_for_less(monkeypatch, store, "list_parts", MaxParts=3)
    assert store.has_parts("a", upload, 95)
    store.abort({"a": upload})


def test_first_part_that_fails_ends_the_upload(store, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)
    seen = []

    def fail(number, method):
        seen.append(method)
        if method == "upload_part":
            raise client_error("ExpiredToken", "the token has expired")

    watch_calls(monkeypatch, fail)
    text = r"(?s)bucket/.*/a\n.*ExpiredToken: the token has expired\n.*renew the credentials"
    with pytest.raises(WriteError, match=text):
        uploaded(store, tmp_path / "a", 100 * 500)
    assert 1 <= seen.count("upload_part") <= s3_store.THREADS


def test_parts_that_the_store_finds_too_small_are_a_write_error(store, tmp_path, monkeypatch):
    def fail(number, method):
        if method == "complete_multipart_upload":
            raise client_error("EntityTooSmall", "Your proposed upload is smaller than the minimum allowed")

    upload = uploaded(store, tmp_path / "a", 100)
    watch_calls(monkeypatch, fail)
    with pytest.raises(WriteError, match=r"(?s)bucket/.*/a\n.*EntityTooSmall"):
        store.publish(["a"], {}, {"a": upload}, "mark")
    store.abort({"a": upload})


def test_bucket_that_does_not_exist_is_a_write_error(server):
    store = s3_folder(server, "a").store.__class__(server.system, "none", "a/", "s3://none/a")
    for call in (store.names, lambda: store.abort({"a": Upload()})):
        with pytest.raises(WriteError, match=r"(?s)s3://none/a.*NoSuchBucket.*which must exist"):
            call()


def test_wrong_credentials_and_no_server_are_write_errors_without_secrets(server):
    folder = s3_folder(server, "a", endpoint_url="http://127.0.0.1:1", config_kwargs={"retries": {"max_attempts": 0}})
    folder.store.system.retries = 1
    with pytest.raises(WriteError, match=r"(?s)s3://bucket/a.*Could not connect") as caught:
        folder.names()
    assert server.options["secret"] not in str(caught.value)


def test_first_error_is_reported_if_the_store_then_tells_nothing(store, tmp_path, monkeypatch):
    def fail(number, method):
        raise client_error("AccessDenied", f"no {method}")

    (tmp_path / "a").write_bytes(b"data")
    watch_calls(monkeypatch, fail)
    with pytest.raises(WriteError, match="no put_object"):
        store.publish(["model.safetensors"], {"model.safetensors": str(tmp_path / "a")}, {}, "mark")
