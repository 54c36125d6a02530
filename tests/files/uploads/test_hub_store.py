"""Tests of uploads to repositories of the Hub, which a server on this machine plays."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from automodel_conv.errors import ConversionError, DestinationError, UnsupportedError, WriteError
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.files.uploads.hub_store import HubStore, hub_store
from tests.files.uploads.support import INDEX, complete, content, shards, write, write_beside
from tests.loopback_faults import DENIED, EXPIRED_TOKEN, Faults
from tests.loopback_hub import serve, use

huggingface_hub = pytest.importorskip("huggingface_hub")

OLD, NEW = "org/old", "org/new"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return the function that starts a Hub with one repository, without weights."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "README.md").write_text("of somebody")
    with ExitStack() as stack:

        def start(**settings):
            hub = stack.enter_context(serve({OLD: tmp_path / "repository"}, **settings))
            use(hub, tmp_path / "hub", monkeypatch)
            return hub

        yield start


def files_of(hub, name):
    return {path: file.read_bytes() for path, file in hub.files(name).items()} if name in hub.repositories else {}


def puts(hub):
    """Return how many files have been uploaded."""
    return sum(one.method == "PUT" for one in hub.cdn_server.requests)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("hf://org/name", ("org/name", None, "")),
        ("hf://models/org/name", ("org/name", None, "")),
        ("hf://org/name@dev", ("org/name", "dev", "")),
        ("hf://org/name@feature%2Fone", ("org/name", "feature/one", "")),
        ("hf://org/name@refs/pr/3/nemo", ("org/name", "refs/pr/3", "nemo/")),
        ("hf://org/name/nemo/bf16", ("org/name", None, "nemo/bf16/")),
        ("hf://org/name@dev/nemo", ("org/name", "dev", "nemo/")),
    ],
)
def test_url_names_repository_revision_and_folder(url, parts):
    store = hub_store(url, "hf_token")
    assert (store.repository, store.revision, store.prefix) == parts
    assert "hf_token" not in repr(store)


@pytest.mark.parametrize("url", ["hf://name", "hf://datasets/org/name", "hf://spaces/org/name", "hf://", "hf://org/"])
def test_other_urls_are_refused(url):
    with pytest.raises(UnsupportedError, match="not a URL of a model's repository"):
        hub_store(url, None)


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.parametrize("below", ["", "/nemo/bf16"])
def test_one_commit_adds_all_files(start, name, below):
    hub, plan = start(), shards()
    before = files_of(hub, name)
    folder = folder_of(f"hf://{name}{below}")
    assert folder.names() == ([] if below else sorted(before))
    commit = hub.commit(name) if name == OLD else None
    with folder.open(plan, None) as place:
        for number, shard in enumerate(plan, start=1):
            write(place, [shard])
            assert puts(hub) >= number - 1
        beside = write_beside(place)
        assert files_of(hub, name) == before
        assert commit is None or hub.commit(name) == commit
        place.commit(b"index")
    files = beside | {INDEX: b"index"} | {shard.name: content(shard) for shard in plan}
    prefix = f"{below}/".removeprefix("/")
    assert files_of(hub, name) == before | {prefix + file: data for file, data in files.items()}
    assert not os.path.exists(folder.directory)
    for file, data in files.items():
        assert folder.size(file) == len(data)
    assert folder.size("absent") is None


def test_call_that_is_repeated_uploads_only_what_is_missing(start):
    hub, plan = start(), shards()
    folder = folder_of(f"hf://{OLD}")
    with pytest.raises(RuntimeError, match="stop"), folder.open(plan, {"a": 1}, resume=True) as place:  # noqa: PT012
        write(place, plan[:2])
        place._wait()
        raise RuntimeError("stop")
    assert not os.path.exists(folder.directory)
    assert puts(hub) == 2
    with folder.open(plan, {"a": 1}, resume=True) as place:
        assert len(place.unfinished) == 3
        write(place, plan)
        place.commit(b"index")
    assert puts(hub) == 3
    assert files_of(hub, OLD).keys() >= {shard.name for shard in plan}


def test_repository_with_a_checkpoint_is_refused(start):
    hub = start()
    files = complete(folder_of(f"hf://{OLD}"), shards(1), None)
    with pytest.raises(DestinationError, match=r"(?s)holds a checkpoint already.*hf://org/old.*model\.safetensors"):
        complete(folder_of(f"hf://{OLD}"), shards(1), None)
    assert files_of(hub, OLD) == files | {"README.md": b"of somebody"}


def test_checksums_of_an_earlier_checkpoint_are_removed(start, tmp_path):
    hub = start()
    (tmp_path / "repository" / CHECKSUMS_NAME).write_text("{}")
    complete(folder_of(f"hf://{OLD}"), shards(), None)
    assert CHECKSUMS_NAME not in files_of(hub, OLD)


def test_commit_of_another_process_in_the_meantime_is_refused(start):
    hub, plan = start(), shards()
    with ExitStack() as stack:
        place = stack.enter_context(folder_of(f"hf://{OLD}").open(plan, None))
        write(place, plan)
        huggingface_hub.HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=OLD)
        with pytest.raises(DestinationError, match=r"(?s)another process writes.*hf://org/old"):
            place.commit(b"index")
    assert files_of(hub, OLD).keys() == {"README.md", "config.json"}


def test_branch_that_does_not_exist_is_refused_before_anything_is_uploaded(start):
    hub = start()
    with pytest.raises(WriteError, match=r"(?s)hf://org/old@dev.*create the branch first"):
        complete(folder_of(f"hf://{OLD}@dev"), shards(), None)
    assert puts(hub) == 0


def test_missing_token_is_a_write_error_without_the_token(start):
    start(token="hf_right")
    with pytest.raises(WriteError, match=r"(?s)hf://org/old.*check the credentials") as caught:
        complete(folder_of(f"hf://{OLD}", SourceSettings(token="hf_wrong")), shards(), None)
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize("fault", [EXPIRED_TOKEN, DENIED], ids=["expired", "denied"])
def test_upload_that_fails_leaves_the_repository_as_it_was(start, fault):
    hub = start(cdn_faults=Faults({2: fault}))
    before = files_of(hub, OLD), hub.commit(OLD)
    folder = folder_of(f"hf://{OLD}")
    with pytest.raises(ConversionError, match="hf://org/old"):
        complete(folder, shards(), None)
    assert (files_of(hub, OLD), hub.commit(OLD)) == before
    assert not os.path.exists(folder.directory)


def test_file_that_the_commit_lacks_is_named(start, monkeypatch):
    start()
    real = HubStore._sizes
    hidden = lambda self: {name: size for name, size in real(self).items() if name != "config.json"}  # noqa: E731
    monkeypatch.setattr(HubStore, "_sizes", hidden)
    with pytest.raises(WriteError, match=r"(?s)the commit lacks files.*hf://org/old.*config\.json.*\.gitignore"):
        complete(folder_of(f"hf://{OLD}"), shards(), None)


def test_large_files_go_in_parts(start):
    hub = start(part_size=3000)
    files = complete(folder_of(f"hf://{OLD}"), shards(1), None)
    assert puts(hub) == 3
    assert files_of(hub, OLD) == files | {"README.md": b"of somebody"}
