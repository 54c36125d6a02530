"""Tests of the buckets on the loopback, by clients that others wrote: boto3, s3fs, obstore and gcsfs; and moto's."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from contextlib import closing, contextmanager
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest

from tests import loopback_faults as faults
from tests.loopback_faults import Faults
from tests.loopback_gcs import serve_gcs
from tests.loopback_moto import CREDENTIALS, serve_moto
from tests.loopback_s3 import serve_s3
from tests.loopback_store import serve_elsewhere

DATA = bytes(range(256)) * 100
KEYS = ["a file+1.bin", "empty", "models/one/config.json", "models/one/model.bin", "models/two/model.bin", "z"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "objects"
    for key in KEYS:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(b"" if key == "empty" else key.encode() + DATA)
    return folder


@pytest.fixture
def no_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "*")


@contextmanager
def boto(url, **settings):
    boto3 = pytest.importorskip("boto3")
    config = boto3.session.Config(
        s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 3}, **settings
    )
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    with closing(boto3.client("s3", endpoint_url=url, config=config, **keys)) as client:
        yield client


@pytest.fixture(scope="module")
def moto():
    pytest.importorskip("moto")
    with serve_moto() as url:
        yield url


@pytest.fixture(params=["ours", "moto"])
def s3(request, folder, no_environment):
    """Return boto3's client of the same bucket on this server and on moto's, which is the reference."""
    if request.param == "ours":
        with serve_s3(folder, "bucket") as server, boto(server.url) as client:
            yield client
    else:
        with boto(url := request.getfixturevalue("moto")) as client:
            urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
            client.create_bucket(Bucket="bucket")
            for key in KEYS:
                client.put_object(Bucket="bucket", Key=key, Body=(folder / key).read_bytes())
            yield client


def code(error):
    return error.value.response["Error"]["Code"]


@pytest.fixture
def ClientError():
    return pytest.importorskip("botocore.exceptions").ClientError


def test_objects_are_read_by_range(s3, folder, ClientError):
    for key in KEYS:
        assert s3.get_object(Bucket="bucket", Key=key)["Body"].read() == (folder / key).read_bytes()
    answer = s3.get_object(Bucket="bucket", Key="z", Range="bytes=3-9")
    assert answer["Body"].read() == b"z"[3:] + DATA[2:9]
    assert answer["ContentRange"] == f"bytes 3-9/{len(DATA) + 1}"
    head = s3.head_object(Bucket="bucket", Key="z")
    assert (head["ContentLength"], head["ETag"]) == (len(DATA) + 1, answer["ETag"])
    s3.get_object(Bucket="bucket", Key="z", IfMatch=head["ETag"])
    for query, name in [
        ({"Key": "absent"}, "NoSuchKey"),
        ({"Key": "z", "Range": "bytes=99999-"}, "InvalidRange"),
        ({"Key": "z", "IfMatch": '"other"'}, "PreconditionFailed"),
        ({"Key": "z", "Bucket": "other"}, "NoSuchBucket"),
    ]:
        with pytest.raises(ClientError) as error:
            s3.get_object(**{"Bucket": "bucket"} | query)
        assert code(error) == name
    with pytest.raises(ClientError) as error:
        s3.head_object(Bucket="bucket", Key="absent")
    assert code(error) == "404"


@pytest.mark.parametrize(
    "query",
    [{}, {"Prefix": "models/"}, {"Delimiter": "/"}, {"Prefix": "models/", "Delimiter": "/"}, {"Prefix": "absent"}],
    ids=str,
)
@pytest.mark.parametrize("page", [1, 2, 1000])
def test_objects_are_listed_in_pages(s3, query, page):
    keys, prefixes = [], []
    for answer in s3.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", PaginationConfig={"PageSize": page}, **query
    ):
        assert answer["KeyCount"] <= page
        keys += [(one["Key"], one["Size"]) for one in answer.get("Contents", [])]
        prefixes += [one["Prefix"] for one in answer.get("CommonPrefixes", [])]
    prefix, wanted = query.get("Prefix", ""), [key for key in KEYS if key.startswith(query.get("Prefix", ""))]
    if "Delimiter" in query:
        inner = [key for key in wanted if "/" in key[len(prefix) :]]
        assert prefixes == sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in inner})
        wanted = [key for key in wanted if key not in inner]
    assert keys == [(key, 0 if key == "empty" else len(key) + len(DATA)) for key in wanted]


def test_start_after_skips_keys(s3):
    answer = s3.list_objects_v2(Bucket="bucket", StartAfter="models/one/config.json")
    assert [one["Key"] for one in answer["Contents"]] == KEYS[3:]


def test_multipart_upload_is_complete_or_not_there(s3, ClientError):
    where = {"Bucket": "bucket", "Key": "new/large.bin"}
    name = s3.create_multipart_upload(**where)["UploadId"]
    parts = [bytes([number]) * (5 << 20) for number in (1, 2)] + [b"end"]
    etags = {}
    for number in (3, 1, 2):
        answer = s3.upload_part(**where, UploadId=name, PartNumber=number, Body=parts[number - 1])
        etags[number] = answer["ETag"]
    listed = s3.list_parts(**where, UploadId=name)["Parts"]
    assert [(one["PartNumber"], one["Size"], one["ETag"]) for one in listed] == [
        (number, len(parts[number - 1]), etags[number]) for number in (1, 2, 3)
    ]
    uploads = s3.list_multipart_uploads(Bucket="bucket")["Uploads"]
    assert [(one["Key"], one["UploadId"]) for one in uploads] == [("new/large.bin", name)]
    assert "new/large.bin" not in [one["Key"] for one in s3.list_objects_v2(Bucket="bucket")["Contents"]]

    listed = [{"PartNumber": number, "ETag": etags[number]} for number in (1, 2, 3)]
    etag = s3.complete_multipart_upload(**where, UploadId=name, MultipartUpload={"Parts": listed})["ETag"]
    answer = s3.get_object(**where)
    assert (answer["ETag"], answer["Body"].read()) == (etag, b"".join(parts))
    assert s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
    s3.delete_object(**where)
    with pytest.raises(ClientError):
        s3.head_object(**where)


def test_small_parts_are_refused_except_the_last(s3, ClientError):
    where = {"Bucket": "bucket", "Key": "new"}
    name = s3.create_multipart_upload(**where)["UploadId"]
    etags = [s3.upload_part(**where, UploadId=name, PartNumber=n, Body=b"small")["ETag"] for n in (1, 2)]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    with pytest.raises(ClientError) as error:
        s3.complete_multipart_upload(**where, UploadId=name, MultipartUpload={"Parts": parts})
    assert code(error) == "EntityTooSmall"


def test_aborted_upload_is_not_listed(s3):
    where = {"Bucket": "bucket", "Key": "new"}
    name = s3.create_multipart_upload(**where)["UploadId"]
    s3.upload_part(**where, UploadId=name, PartNumber=1, Body=b"part")
    s3.abort_multipart_upload(**where, UploadId=name)
    assert s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []


def test_wrong_requests_of_uploads_are_refused(folder, no_environment, ClientError):
    """Refuse what the reference of S3 names, which moto's server accepts."""
    where = {"Bucket": "bucket", "Key": "new"}
    with serve_s3(folder, "bucket", least_part=0) as server, boto(server.url) as s3:
        name = s3.create_multipart_upload(**where)["UploadId"]
        etags = [s3.upload_part(**where, UploadId=name, PartNumber=n, Body=b"%d" % n)["ETag"] for n in (1, 2)]

        def complete(*listed, name=name):
            parts = [{"PartNumber": number, "ETag": etag} for number, etag in listed]
            s3.complete_multipart_upload(**where, UploadId=name, MultipartUpload={"Parts": parts})

        for listed, name_of_upload, wrong in [
            ([(2, etags[1]), (1, etags[0])], name, "InvalidPartOrder"),
            ([(1, '"other"')], name, "InvalidPart"),
            ([(2, etags[0])], name, "InvalidPart"),
            ([(3, etags[0])], name, "InvalidPart"),
            ([(1, etags[0])], "other", "NoSuchUpload"),
        ]:
            with pytest.raises(ClientError) as error:
                complete(*listed, name=name_of_upload)
            assert code(error) == wrong
        complete((2, etags[1]))
        assert (folder / "new").read_bytes() == b"2"
        with pytest.raises(ClientError) as error:
            s3.upload_part(**where, UploadId=name, PartNumber=3, Body=b"late")
        assert code(error) == "NoSuchUpload"
        assert not list(server.uploads.folder.iterdir())


def test_put_with_if_none_match_does_not_replace(s3, folder, ClientError):
    s3.put_object(Bucket="bucket", Key="new", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket="bucket", Key="new", Body=b"second", IfNoneMatch="*")
    assert code(error) == "PreconditionFailed"
    assert s3.get_object(Bucket="bucket", Key="new")["Body"].read() == b"first"
    s3.put_object(Bucket="bucket", Key="new", Body=b"third")
    assert s3.get_object(Bucket="bucket", Key="new")["Body"].read() == b"third"


def test_many_objects_are_deleted_at_once(s3):
    s3.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": key} for key in [*KEYS[1:], "absent"]]})
    assert [one["Key"] for one in s3.list_objects_v2(Bucket="bucket")["Contents"]] == KEYS[:1]


def ask(url, target, **headers):
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)) as connection:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_requests_without_a_signature_are_refused(folder):
    with serve_s3(folder, "bucket") as server:
        status, body = ask(server.url, "/bucket/z")
        assert (status, ElementTree.fromstring(body).findtext("Code")) == (403, "AccessDenied")
        assert ask(server.url, "/bucket/z", Authorization="AWS4-HMAC-SHA256 Signature=0")[0] == 200
    with serve_s3(folder, "bucket", anonymous=True) as server:
        assert ask(server.url, "/bucket/z")[0] == 200


def test_presigned_url_expires(folder):
    with serve_s3(folder, "bucket") as server:
        query = "X-Amz-Signature=0&X-Amz-Date=20200101T000000Z&X-Amz-Expires="
        assert ask(server.url, f"/bucket/z?{query}{10**9}") == (200, b"z" + DATA)
        status, body = ask(server.url, f"/bucket/z?{query}60")
        assert (status, ElementTree.fromstring(body).findtext("Message")) == (403, "Request has expired")


@pytest.mark.parametrize("version", ["s3", "s3v4"])
def test_boto3_signs_urls_that_expire(folder, no_environment, version):
    with serve_s3(folder, "bucket") as server, boto(server.url, signature_version=version) as client:

        def status(seconds):
            url = client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "z"}, ExpiresIn=seconds)
            return ask(server.url, url.removeprefix(server.url))[0]

        assert [status(60), status(-10)] == [200, 403]


def test_boto3_retries_faults(folder, no_environment):
    schedule = Faults([faults.failing(503), faults.NO_ANSWER])
    with serve_s3(folder, "bucket", faults=schedule) as server, boto(server.url) as client:
        assert client.get_object(Bucket="bucket", Key="z")["Body"].read() == b"z" + DATA
        assert [one.fault for one in server.requests] == ["failing 503", "no answer", None]


def test_s3fs_reads_lists_and_writes(folder, no_environment):
    s3fs = pytest.importorskip("s3fs")
    with serve_s3(folder, "bucket") as server:
        system = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=server.url, skip_instance_cache=True)
        assert sorted(system.find("bucket")) == sorted(f"bucket/{key}" for key in KEYS)
        assert sorted(system.ls("bucket/models")) == ["bucket/models/one", "bucket/models/two"]
        assert system.cat_file("bucket/z", start=1, end=10) == DATA[:9]
        assert system.cat_ranges(["bucket/z"] * 2, [1, 5], [3, 9]) == [DATA[:2], DATA[4:8]]
        with system.open("bucket/new/large", "wb", block_size=5 << 20) as file:
            file.write(b"0" * (11 << 20))
        assert (folder / "new/large").read_bytes() == b"0" * (11 << 20)
        assert not server.uploads.unfinished
        system.rm("bucket/new", recursive=True)
        assert not (folder / "new").exists()


def test_obstore_reads_lists_and_writes(folder, no_environment):
    obstore = pytest.importorskip("obstore")
    from obstore.store import S3Store

    with serve_s3(folder, "bucket") as server:
        place = {"endpoint": server.url, "access_key_id": "k", "secret_access_key": "s", "region": "us-east-1"}
        store = S3Store("bucket", client_options={"allow_http": True}, **place)
        assert [one["path"] for one in obstore.list(store).collect()] == KEYS
        assert bytes(obstore.get_range(store, "z", start=1, end=10)) == DATA[:9]
        obstore.put(store, "new/large", b"1" * (12 << 20), chunk_size=5 << 20)
        assert (folder / "new/large").read_bytes() == b"1" * (12 << 20)
        with pytest.raises(obstore.exceptions.AlreadyExistsError):
            obstore.put(store, "z", b"other", mode="create", use_multipart=False)
        assert (folder / "z").read_bytes() == b"z" + DATA


def test_bucket_in_a_process_of_its_own(folder, no_environment):
    with serve_elsewhere(folder, s3="bucket") as server, boto(server.url) as client:
        assert client.get_object(Bucket="bucket", Key="z")["Body"].read() == b"z" + DATA
        assert server.counts()["status_200"] == 1


def test_gcs_bucket_in_a_process_of_its_own(folder):
    with serve_elsewhere(folder, gcs="bucket") as server:
        assert ask(server.url, "/storage/v1/b/bucket/o/z?alt=media", Range="bytes=1-9")[1] == DATA[:9]


def test_gcsfs_reads_and_lists(folder, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs.core")  # gcsfs.GCSFileSystem asks Google itself for the layout of a bucket
    monkeypatch.setenv("NO_PROXY", "*")
    with serve_gcs(folder, "bucket") as server:
        place = {"endpoint_url": server.url, "token": "anon", "skip_instance_cache": True, "project": "p"}
        system = gcsfs.GCSFileSystem(**place)
        assert sorted(system.find("bucket")) == sorted(f"bucket/{key}" for key in KEYS)
        assert sorted(system.ls("bucket/models")) == ["bucket/models/one", "bucket/models/two"]
        assert system.info("bucket/z")["size"] == len(DATA) + 1
        for key in KEYS:
            assert system.cat_file(f"bucket/{key}") == (folder / key).read_bytes()
        assert system.cat_file("bucket/z", start=1, end=10) == DATA[:9]
        with pytest.raises(FileNotFoundError):
            system.cat_file("bucket/absent")


def test_google_client_reads_and_lists(folder, monkeypatch):
    storage = pytest.importorskip("google.cloud.storage")
    from google.auth.credentials import AnonymousCredentials

    with serve_gcs(folder, "bucket") as server:
        options = {"api_endpoint": server.url}
        client = storage.Client(project="p", credentials=AnonymousCredentials(), client_options=options)
        assert [one.name for one in client.list_blobs("bucket", page_size=2)] == KEYS
        assert client.bucket("bucket").blob("models/two/model.bin").download_as_bytes(start=0, end=5) == b"models"


def test_gcs_lists_pages_and_prefixes(folder):
    with serve_gcs(folder, "bucket", authorization="Bearer t") as server:
        assert ask(server.url, "/storage/v1/b/bucket/o")[0] == 401
        token, names = "", []
        while token is not None:
            target = f"/storage/v1/b/bucket/o?delimiter=%2F&maxResults=2&pageToken={token}"
            value = json.loads(ask(server.url, target, Authorization="Bearer t")[1])
            names.append([one["name"] for one in value["items"]] + value["prefixes"])
            token = value.get("nextPageToken")
        assert names == [["a file+1.bin", "empty"], ["z", "models/"]]
