"""Tests of buckets: addresses that are signed, signatures that expire, names of all kinds, credentials in no text."""

from __future__ import annotations

import json
import traceback
from contextlib import ExitStack

import pytest
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, ConversionError
from automodel_conv.files.remote import requests
from automodel_conv.files.remote.web_files import WebFile
from tests.comparing import assert_same
from tests.files.remote.support import TENSORS, write_sharded
from tests.loopback_faults import DENIED, EXPIRED, EXPIRED_TOKEN, PASSING, Faults
from tests.loopback_gcs import serve_gcs
from tests.loopback_kinds import BUCKET, no_other_credentials
from tests.loopback_s3 import serve_s3

SECRET = "hidden-credential"
ODD_NAMES = ["a b", "a%20b", "a#b", "a?b", "a+b", "ü", "日本", "a&b=c"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    no_other_credentials(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path / "published")


@pytest.fixture(params=["s3", "gs"])
def bucket(request, folder, monkeypatch):
    """Yield a function that serves the folder, and returns the server, the URL and the options."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    with ExitStack() as stack:

        def start(**settings):
            serve = {"s3": serve_s3, "gs": serve_gcs}[request.param]
            server = stack.enter_context(serve(folder, BUCKET, **settings))
            own = {"key": "key", "secret": SECRET} if request.param == "s3" else {"token": "anon"}
            options = {"endpoint_url": server.url, "skip_instance_cache": True, **own}
            return server, f"{request.param}://{BUCKET}", {"storage_options": options}

        yield start


def test_bucket_is_read_over_http_by_range(bucket, folder):
    server, url, options = bucket()
    checkpoint = amc.open_checkpoint(url, **options)
    assert all(isinstance(source, WebFile) for source in checkpoint.sources)
    assert checkpoint.files[0] == f"{url}/model-00001-of-00002.safetensors"
    before = len(server.requests)
    assert_same(amc.load_state_dict(url, rules=[], **options), TENSORS)
    weights = [one for one in server.requests[before:] if one.range is not None]
    assert sum(one.sent for one in weights) <= 2 * sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("name", ODD_NAMES)
def test_keys_of_all_kinds_are_read(bucket, folder, name):
    file = f"{name}.safetensors"
    write_sharded(folder / name)
    save_file({"a": TENSORS["a"]}, folder / name / file)
    _, url, options = bucket()
    assert_same(amc.load_state_dict(url, rules=[], subfolder=name, **options), TENSORS)
    (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert_same(amc.load_state_dict(f"{url}/{name}", rules=[], **options), {"a": TENSORS["a"]})


@pytest.mark.parametrize("fault", [EXPIRED, EXPIRED_TOKEN], ids=lambda fault: fault.name)
def test_address_that_expires_during_a_load_is_renewed(bucket, fault):
    server, url, options = bucket()
    checkpoint = amc.open_checkpoint(url, **options)
    server.faults = Faults({0: fault}, ending=".safetensors", method="GET")
    data = memoryview(bytearray(100))
    checkpoint.sources[0].open().read_into([data], 5000)
    assert server.faults.dealt
    assert any(data)


@pytest.mark.parametrize("fault", [EXPIRED, EXPIRED_TOKEN, DENIED], ids=lambda fault: fault.name)
def test_access_that_stays_refused_is_one_error_without_credentials(bucket, fault):
    server, url, options = bucket()
    amc.open_checkpoint(url, **options)
    server.faults = Faults([fault.from_then_on()], ending=".safetensors", method="GET")
    with pytest.raises(ConversionError, match=r"40[03].*the server refuses access") as error:
        amc.load_state_dict(url, rules=[], **options)
    text = "".join(traceback.format_exception(error.value))
    assert SECRET not in text
    assert "Signature=" not in text
    assert len(server.of(".safetensors")) < 20


def test_absent_bucket_and_folder_are_errors_without_credentials(bucket):
    _, url, options = bucket()
    for absent in (f"{url}/absent", url.replace(BUCKET, "other")):
        with pytest.raises(CheckpointError) as error:
            amc.open_checkpoint(absent, **options)
        assert SECRET not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("seed", range(4))
def test_faults_of_a_bucket_pass(bucket, seed):
    server, url, options = bucket()
    faults = Faults.random(seed, 0.2, PASSING, ending=".safetensors", method="GET")
    server.faults = faults
    assert_same(amc.load_state_dict(url, rules=[], **options), TENSORS)


def test_settings_of_the_environment_apply(folder, monkeypatch):
    pytest.importorskip("s3fs")
    with serve_s3(folder, BUCKET) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        options = {"storage_options": {"skip_instance_cache": True}}
        assert_same(amc.load_state_dict(f"s3://{BUCKET}", rules=[], **options), TENSORS)
        assert all(SECRET not in repr(one) for one in server.requests)


def test_public_bucket_is_read_without_credentials(folder):
    pytest.importorskip("s3fs")
    with serve_s3(folder, BUCKET, anonymous=True) as server:
        options = {"storage_options": {"anon": True, "endpoint_url": server.url, "skip_instance_cache": True}}
        assert_same(amc.load_state_dict(f"s3://{BUCKET}", rules=[], **options), TENSORS)
        assert not any("X-Amz-Signature" in one.query or one.has_credentials for one in server.requests)


def test_presigned_url_that_has_expired_says_so(folder):
    """A URL that the caller got from somebody cannot be renewed."""
    pytest.importorskip("s3fs")
    with serve_s3(folder, BUCKET) as server:
        url = f"{server.url}/{BUCKET}/model-00001-of-00002.safetensors?X-Amz-Date=20200101T000000Z&X-Amz-Expires=60"
        url += f"&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k&X-Amz-SignedHeaders=host&X-Amz-Signature={SECRET}"
        with pytest.raises(CheckpointError, match=r"(?s)403.*Request has expired.*signature has expired") as error:
            amc.open_checkpoint(url)
        assert SECRET not in "".join(traceback.format_exception(error.value))


def test_token_of_google_is_sent_and_not_to_another_host(folder, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    credentials = pytest.importorskip("google.oauth2.credentials")
    with serve_gcs(folder, BUCKET, authorization=f"Bearer {SECRET}") as server:
        token = credentials.Credentials(SECRET)
        options = {"storage_options": {"token": token, "endpoint_url": server.url, "skip_instance_cache": True}}
        assert_same(amc.load_state_dict(f"gs://{BUCKET}", rules=[], **options), TENSORS)
        assert SECRET not in repr(amc.open_checkpoint(f"gs://{BUCKET}", **options).sources)
