"""Tests of the Hub on the loopback, by huggingface_hub: redirects to signed links, access, and uploads."""

from __future__ import annotations

import http.client
import os
import time
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests import loopback_faults as faults
from tests.loopback_faults import Faults
from tests.loopback_hub import serve, use

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download  # noqa: E402
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError  # noqa: E402

NAME, WEIGHTS = "some-org/Some.Model", os.urandom(100_000)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def start(repository, tmp_path, monkeypatch):
    """Return the function that starts a Hub for huggingface_hub in this process."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**settings):
            hub = stack.enter_context(serve({NAME: repository}, **settings))
            use(hub, tmp_path / "cache", monkeypatch)
            return hub

        yield start


def ask(url, **headers):
    place = urlsplit(url)
    with closing(http.client.HTTPConnection(place.netloc, timeout=10)) as connection:
        connection.request("GET", f"{place.path}?{place.query}", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_weights_come_from_the_other_host_without_credentials(start):
    hub = start(redirects=True, token="hf_right")
    path = hf_hub_download(NAME, "model.safetensors", token="hf_right")
    assert open(path, "rb").read() == WEIGHTS
    assert hub.server.saw_credentials("127.0.0.1")
    assert [one.host for one in hub.cdn_server.requests] == ["localhost"]
    assert not hub.cdn_server.saw_credentials("localhost")
    hf_hub_download(NAME, "config.json", token="hf_right")
    assert len(hub.cdn_server.requests) == 1


def test_redirect_describes_the_file(start):
    hub = start(redirects=True)
    found = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(NAME, "model.safetensors"))
    assert (found.size, found.commit_hash) == (len(WEIGHTS), hub.commit(NAME))
    status, headers, _ = ask(f"{hub.url}/{NAME}/resolve/main/model.safetensors")
    assert (status, urlsplit(headers["Location"]).hostname) == (302, "localhost")
    assert headers["ETag"] == headers["X-Linked-ETag"] == f'"{found.etag}"'
    assert ask(headers["Location"], Range="bytes=5-9")[2] == WEIGHTS[5:10]


@pytest.mark.parametrize("settings", [{"link_uses": 2}, {"link_seconds": 0.3}], ids=str)
def test_link_expires(start, settings):
    hub = start(redirects=True, **settings)
    url = ask(f"{hub.url}/{NAME}/resolve/main/model.safetensors")[1]["Location"]
    assert [ask(url)[0] for _ in range(2)] == [200, 200]
    time.sleep(settings.get("link_seconds", 0))
    status, _, body = ask(url)
    assert status == 403
    assert b"Request has expired" in body
    assert ask(ask(f"{hub.url}/{NAME}/resolve/main/model.safetensors")[1]["Location"])[0] == 200


def test_links_expire_at_once_and_need_their_signature(start):
    hub = start(redirects=True)
    url = ask(f"{hub.url}/{NAME}/resolve/main/model.safetensors")[1]["Location"]
    assert ask(url, Authorization="Bearer hf_x")[0] == 400
    assert ask(url.partition("?")[0] + "?")[0] == 403
    hub.cdn.expire()
    assert ask(url)[0] == 403


def test_private_repository_does_not_exist_for_others(start):
    hub = start(token="hf_right", private={NAME}, strangers={"hf_stranger"})
    for token in (False, "hf_stranger"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(NAME, "model.safetensors", token=token)
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info(NAME, token=token)
    assert {one.status for one in hub.requests} == {401, 404}
    assert HfApi().model_info(NAME, token="hf_right").private


def test_gated_repository_is_described_to_everyone(start):
    hub = start(token="hf_right", gated={NAME}, strangers={"hf_stranger"})
    for token in (False, "hf_stranger"):
        assert HfApi().model_info(NAME, token=token).gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download(NAME, "model.safetensors", token=token)
    assert {one.status for one in hub.requests_of("model.safetensors")} == {401, 403}
    hf_hub_download(NAME, "model.safetensors", token="hf_right")


def test_moved_repository_redirects(start):
    start(moved={"old-org/Old": NAME})
    assert open(hf_hub_download("old-org/Old", "model.safetensors"), "rb").read() == WEIGHTS
    assert HfApi().model_info("old-org/Old").id == NAME


def test_files_are_listed_with_their_sizes(start):
    start(redirects=True)
    entries = {one.path: one for one in HfApi().list_repo_tree(NAME, recursive=True)}
    assert {path: one.size for path, one in entries.items()} == {"config.json": 22, "model.safetensors": len(WEIGHTS)}
    assert entries["config.json"].lfs is None
    assert entries["model.safetensors"].lfs.size == len(WEIGHTS)
    assert [one.size for one in HfApi().get_paths_info(NAME, ["model.safetensors"])] == [len(WEIGHTS)]


@pytest.mark.parametrize("redirects", [False, True])
def test_file_system_reads_ranges(start, redirects):
    hub = start(redirects=redirects)
    system = huggingface_hub.HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    assert system.cat_file(f"{NAME}/model.safetensors", start=10, end=20) == WEIGHTS[10:20]
    with system.open(f"{NAME}/model.safetensors", block_size=1000) as file:
        file.seek(50_000)
        assert file.read(10) == WEIGHTS[50_000:50_010]


@pytest.mark.parametrize("part_size", [1 << 20, 16_000, 100_000])
def test_large_files_are_uploaded_and_then_committed(start, tmp_path, part_size):
    hub, api = start(token="hf_right", part_size=part_size, redirects=True), HfApi(token="hf_right")
    assert str(api.create_repo("new-org/new", private=True)) == f"{hub.url}/new-org/new"
    assert api.create_repo("new-org/new", exist_ok=True)
    weights = [CommitOperationAdd(f"model-{number}.safetensors", WEIGHTS[number:]) for number in range(2)]
    api.preupload_lfs_files("new-org/new", weights)
    assert hub.files("new-org/new") == {}
    parts = sum(-(-len(WEIGHTS[number:]) // part_size) for number in range(2))
    assert sum(one.method == "PUT" for one in hub.cdn_server.requests) == parts
    assert not hub.cdn_server.saw_credentials("localhost")
    index = CommitOperationAdd("a/index.json", b"{}")
    made = api.create_commit("new-org/new", [*weights, index], commit_message="Upload")
    assert made.oid == hub.commit("new-org/new")
    assert sorted(hub.files("new-org/new")) == ["a/index.json", "model-0.safetensors", "model-1.safetensors"]
    folder = snapshot_download("new-org/new", token="hf_right")
    for number in range(2):
        assert open(f"{folder}/model-{number}.safetensors", "rb").read() == WEIGHTS[number:]
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("new-org/new")


def test_known_content_is_not_uploaded_again(start):
    hub, api = start(), HfApi()
    for path in ("one.bin", "two.bin"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo=path, repo_id=NAME)
    assert sum(one.method == "PUT" for one in hub.cdn_server.requests) == 1
    assert hub.files(NAME)["two.bin"].read_bytes() == WEIGHTS


def test_folder_is_uploaded(start, repository, tmp_path):
    hub = start(part_size=64_000)
    (repository / "README.md").write_text("---\nlicense: mit\n---\n")
    (repository / "empty.bin").write_bytes(b"")
    HfApi().create_repo("new-org/copy")
    HfApi().upload_folder(repo_id="new-org/copy", folder_path=repository)
    assert {name: path.read_bytes() for name, path in hub.files("new-org/copy").items()} == {
        name: path.read_bytes() for name, path in hub.files(NAME).items()
    }


def test_commit_after_another_one_is_refused(start):
    hub, api = start(), HfApi()
    first = hub.commit(NAME)
    delete = CommitOperationDelete("config.json")
    api.create_commit(NAME, [delete], commit_message="Delete", parent_commit=first)
    assert sorted(hub.files(NAME)) == ["model.safetensors"]
    add = CommitOperationAdd("config.json", b"{}")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(NAME, [add], commit_message="Add", parent_commit=first)
    assert sorted(hub.files(NAME)) == ["model.safetensors"]


def test_uploads_need_the_token(start):
    hub = start(token="hf_right", gated={NAME})
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError):
            HfApi(token=token).create_repo("new-org/new")
        with pytest.raises(HfHubHTTPError):
            HfApi(token=token).upload_file(path_or_fileobj=b"{}", path_in_repo="x.json", repo_id=NAME)
    assert "x.json" not in hub.files(NAME)
    assert list(hub.repositories) == [NAME]


def test_part_is_sent_again_after_a_fault(start):
    hub = start(part_size=40_000, cdn_faults=Faults([None, faults.failing(503)], method="PUT"))
    HfApi().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="new.bin", repo_id=NAME)
    assert [one.status for one in hub.cdn_server.requests] == [200, 503, 200, 200]
    assert hub.files(NAME)["new.bin"].read_bytes() == WEIGHTS
