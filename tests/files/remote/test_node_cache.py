"""Tests of ``node_cache``: bytes are equal, come over the network once, and survive processes, disks and changes."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import ReadError, UnsupportedError
from automodel_conv.files import system
from automodel_conv.files.remote import node_cache
from automodel_conv.files.remote.cache_blocks import BLOCK_BYTES, CacheBlocks
from automodel_conv.files.remote.folders import find_folder
from automodel_conv.files.remote.node_cache import CachedFile, cache_directory
from automodel_conv.files.source import LocalFile, opened
from automodel_conv.files.waits import seconds_waited
from tests import loopback_hub
from tests.comparing import assert_same
from tests.crash_safety.disk import stop
from tests.files.remote.cache_reader import NAME, open_through, read_all, read_group
from tests.files.remote.support import TENSORS, write_sharded
from tests.loopback_faults import DENIED, Faults, busy, cut
from tests.loopback_store import serve

ROOT = Path(__file__).parents[3]
# Not a multiple of blocks, groups or pages.
NBYTES = 21 * BLOCK_BYTES + 12345


def write(folder, nbytes=NBYTES, seed=7):
    folder.mkdir(exist_ok=True)
    data = random.Random(seed).randbytes(nbytes)
    (folder / NAME).write_bytes(data)
    return data


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "published")


@pytest.fixture
def server(tmp_path, data):
    with serve(tmp_path / "published") as server:
        yield server


@pytest.fixture
def kept(tmp_path):
    """Return the directory that keeps the bytes."""
    return tmp_path / "kept"


@contextmanager
def readers(url, directory, processes=1, *options):
    """Start processes that read; yield the one that started them."""
    command = [sys.executable, "-m", "tests.files.remote.cache_reader", url, str(directory), str(processes), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process


def ranges(requests):
    """Return the ranges that were asked for: first byte and the byte after the last."""
    pairs = (one.range.removeprefix("bytes=").split("-") for one in requests)
    return [(int(first), int(last) + 1) for first, last in pairs]


def checksums(process):
    return [int(line.split()[1]) for line in process.stdout if line.startswith("crc")]


def test_four_processes_have_all_bytes_and_the_server_sends_them_once(server, data, kept):
    with readers(server.url, kept, 4) as process:
        assert checksums(process) == [zlib.crc32(data)] * 4
    assert len(data) <= server.sent <= 1.02 * len(data)


def test_forked_process_shares_the_bytes(server, data, kept):
    with readers(server.url, kept, 1, "--fork") as process:
        assert checksums(process) == [zlib.crc32(data)] * 2
    assert len(data) <= server.sent <= 1.02 * len(data)


def test_killed_process_does_not_stop_the_others(tmp_path, data, kept):
    with serve(tmp_path / "published", gb_per_s=0.01) as server, readers(server.url, kept, 3) as process:
        reader = int(process.stdout.readline())
        while sum(file.stat().st_blocks for file in kept.glob("*")) * 512 < 2 * BLOCK_BYTES:
            time.sleep(0.01)
        os.kill(reader, signal.SIGKILL)
        assert checksums(process) == [zlib.crc32(data)] * 2
    # Only bytes that were on their way to the killed process are fetched again.
    assert len(data) <= server.sent <= 1.8 * len(data)


@pytest.mark.parametrize("nbytes", [1, 100, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
@pytest.mark.parametrize("threads", [1, 3])
def test_file_of_any_size_is_read_and_kept(tmp_path, kept, nbytes, threads):
    data = write(tmp_path / "small", max(nbytes, 8))
    with serve(tmp_path / "small") as server:
        for _ in range(2):
            assert read_all(open_through(server.url, kept), threads) == data
        starts = ranges(server.of(NAME))
    assert len(starts) == 2 + 1  # two headers, and the bytes once


def test_requests_of_a_load_are_long(server, data, kept):
    assert read_all(open_through(server.url, kept), threads=1) == data
    lengths = [stop - start for start, stop in ranges(server.of(NAME)[1:])]
    assert lengths == [16 << 20, len(data) - (16 << 20)]


def test_ranges_between_blocks_are_fetched_in_whole_blocks_once(server, data, kept):
    source, out = open_through(server.url, kept), memoryview(bytearray(b"\xa5" * len(data)))
    with opened(source) as file:
        spans = [(BLOCK_BYTES - 3, BLOCK_BYTES + 5), (4 * BLOCK_BYTES + 9, 4 * BLOCK_BYTES + 10), (5, 6)]
        file.expect(spans)
        for start, stop_ in spans:
            file.read_into([out[start:stop_]], start)
            assert out[start:stop_] == data[start:stop_]
        file.read_into([], 7)
        file.read_into([out[:0]], 9 * BLOCK_BYTES)
    fetched = ranges(server.of(NAME)[1:])
    assert fetched == [(0, 2 * BLOCK_BYTES), (4 * BLOCK_BYTES, 5 * BLOCK_BYTES)]


def test_thread_fetches_what_nobody_else_does_before_it_waits(server, data, kept):
    source = open_through(server.url, kept)
    out = memoryview(bytearray(len(data)))
    with opened(source) as file:
        blocks = CacheBlocks(source._path, len(data))
        with blocks.claimed([0]) as claims:
            thread = threading.Thread(target=read_group, args=(file, out, 0, 4 * BLOCK_BYTES))
            thread.start()
            while not all(map(blocks.is_complete, range(1, 4))):
                pass
            assert not blocks.is_complete(0)
            blocks.write(0, memoryview(data)[:BLOCK_BYTES])
            claims.end(0)
            thread.join()
    assert out[: 4 * BLOCK_BYTES] == data[: 4 * BLOCK_BYTES]
    assert ranges(server.of(NAME)[1:]) == [(BLOCK_BYTES, 4 * BLOCK_BYTES)]


def test_block_that_its_holder_never_completes_is_fetched_in_the_end(server, data, kept, monkeypatch):
    monkeypatch.setattr(node_cache, "PATIENCE_SECONDS", 0.1)
    source = open_through(server.url, kept)
    with opened(source):
        with CacheBlocks(source._path, len(data)).claimed([0, 3]):
            assert read_all(source) == data


def test_wait_for_the_holder_of_a_block_counts_as_a_wait_for_an_answer(server, data, kept, monkeypatch):
    monkeypatch.setattr(node_cache, "PATIENCE_SECONDS", 0.2)
    source = open_through(server.url, kept)
    with opened(source) as file, CacheBlocks(source._path, len(data)).claimed([2]):
        before = seconds_waited()
        read_group(file, memoryview(bytearray(len(data))), 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
        assert seconds_waited() - before >= 0.1


def test_thread_that_waits_for_others_ends_when_reading_is_stopped(server, data, kept):
    source, errors = open_through(server.url, kept), []

    def read(file):
        try:
            read_group(file, memoryview(bytearray(len(data))), 0, 4 * BLOCK_BYTES)
        except ReadError as error:
            errors.append(error)

    with opened(source) as file, CacheBlocks(source._path, len(data)).claimed([2]):
        thread = threading.Thread(target=read, args=(file,))
        thread.start()
        while len(server.of(NAME)) < 3:
            pass
        file.abort()
        thread.join(10)
        assert not thread.is_alive()
    assert "stopped" in str(errors[0])
    assert read_all(source) == data


@pytest.mark.parametrize("at", [0, 5 * BLOCK_BYTES + 77, NBYTES - 1])
def test_damaged_block_is_fetched_again_and_no_other(server, data, kept, at):
    read_all(open_through(server.url, kept))
    [file] = kept.iterdir()
    with open(file, "r+b") as opened_file:
        opened_file.seek(at)
        opened_file.write(bytes([data[at] ^ 0x10]))
    before = len(server.requests)
    for _ in range(2):
        assert read_all(open_through(server.url, kept)) == data
    block = at // BLOCK_BYTES * BLOCK_BYTES
    fetched = [each for each in ranges(server.requests[before:]) if each != (0, 4096)]
    assert fetched == [(block, min(block + BLOCK_BYTES, len(data)))]


def test_kept_file_that_was_truncated_is_filled_again(server, data, kept):
    read_all(open_through(server.url, kept))
    [file] = kept.iterdir()
    os.truncate(file, 3 * BLOCK_BYTES)
    assert read_all(open_through(server.url, kept)) == data


def test_changed_file_is_kept_apart(server, tmp_path, data, kept):
    assert read_all(open_through(server.url, kept)) == data
    new = write(tmp_path / "published", seed=8)
    assert read_all(open_through(server.url, kept)) == new
    assert len(list(kept.iterdir())) == 2


def test_file_that_changes_under_a_load_is_one_error_and_nothing_of_it_is_kept(server, tmp_path, data, kept):
    source = open_through(server.url, kept)
    with opened(source) as file:
        out = memoryview(bytearray(len(data)))
        read_group(file, out, 0, BLOCK_BYTES)
        new = write(tmp_path / "published", seed=8)
        with pytest.raises(ReadError, match="has changed since it was opened"):
            read_group(file, out, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
        read_group(file, out, 0, BLOCK_BYTES)
        assert out[:BLOCK_BYTES] == data[:BLOCK_BYTES]
    [path] = kept.iterdir()
    assert [CacheBlocks(str(path), len(data)).is_complete(block) for block in range(4)] == [True, False, False, False]
    assert read_all(open_through(server.url, kept)) == new


def test_faults_of_the_network_leave_equal_bytes(tmp_path, data, kept):
    faults = Faults({2: cut("reset", 0.4), 3: busy("0")}, ending=NAME)
    with serve(tmp_path / "published", faults=faults) as server:
        assert read_all(open_through(server.url, kept)) == data
        assert read_all(open_through(server.url, kept)) == data
    assert len(faults.dealt) == 2


def test_failed_fetch_ends_its_claims(tmp_path, data, kept):
    faults = Faults({1: DENIED, 2: DENIED}, ending=NAME)
    with serve(tmp_path / "published", faults=faults) as server:
        source = open_through(server.url, kept)
        with opened(source) as file:
            with pytest.raises(ReadError, match="403"):
                read_group(file, memoryview(bytearray(len(data))), 0, 2 * BLOCK_BYTES)
            with CacheBlocks(source._path, len(data)).claimed([0, 1]) as claims:
                assert claims.blocks == [0, 1]
            assert read_all(source) == data


def test_full_disk_is_an_error_that_names_the_option(server, data, kept, monkeypatch):
    real, calls = system.pwritev, []

    def full(fd, views, offset):
        calls.append(offset)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, views, offset)

    with monkeypatch.context() as patch:
        patch.setattr(system, "pwritev", full)
        with pytest.raises(ReadError, match=r"node_cache names cannot be used(.|\n)*No space left"):
            read_all(open_through(server.url, kept), threads=1)
    before = server.sent
    assert read_all(open_through(server.url, kept)) == data
    assert server.sent - before < len(data) - 2 * BLOCK_BYTES  # three blocks were complete


@pytest.mark.parametrize("call", ["make_directory", "open_append", "open_existing", "open_again", "lock_range"])
def test_directory_that_cannot_be_used_is_an_error_that_names_the_option(server, kept, monkeypatch, call):
    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))

    monkeypatch.setattr(system, call, refuse)
    with pytest.raises(ReadError, match=r"node_cache names cannot be used(.|\n)*Read-only file system"):
        read_all(open_through(server.url, kept))


def test_file_in_the_place_of_the_directory_is_an_error(server, kept):
    kept.write_text("")
    with pytest.raises(ReadError, match="node_cache names cannot be used"):
        read_all(open_through(server.url, kept))


@pytest.mark.parametrize("number", range(1, 14))
def test_bytes_are_equal_after_the_power_failed(tmp_path, kept, number):
    data = write(tmp_path / "small", 5 * BLOCK_BYTES + 1)
    with serve(tmp_path / "small") as server:
        source = open_through(server.url, kept)

        def read() -> None:
            with opened(source) as file:
                read_group(file, memoryview(bytearray(len(data))), 0, len(data))

        disk = stop(read, number)
        if kept.exists():
            disk.lose(kept, random.Random(number))
        assert read_all(open_through(server.url, kept)) == data


def test_server_that_states_no_version_is_refused(tmp_path, data, kept):
    with serve(tmp_path / "published", validators=False) as server:
        with pytest.raises(UnsupportedError, match="states no version"):
            open_through(server.url, kept)
    assert not kept.exists()


def test_another_query_of_the_same_file_finds_its_bytes(server, data, kept):
    for query in ("signature=1", "signature=2"):
        folder = find_folder(f"{server.url}/{NAME}?{query}", "", None)
        source = CachedFile(folder.file(NAME, 4096, None), str(kept))
        source.open().close()
        assert read_all(source) == data
    assert server.sent < 1.02 * len(data)


def test_descriptions_are_those_of_the_file(server, kept):
    source = open_through(server.url, kept)
    assert source.is_remote
    assert source.describe() == f"{server.url}/{NAME}"
    assert str(NBYTES) in source.identity()
    assert NAME in repr(source)
    with opened(source) as file:
        assert file.descriptor() is None
        assert file.size() == NBYTES
        with pytest.raises(ReadError, match="ends too early"):
            file.read_into([memoryview(bytearray(2))], NBYTES - 1)
    assert [path.name.endswith(NAME) for path in kept.iterdir()] == [True]


def test_loads_use_it_and_plans_fetch_headers_only(tmp_path, kept):
    with serve(write_sharded(tmp_path / "sharded")) as server:
        checkpoint = amc.open_checkpoint(server.url, node_cache=kept)
        amc.compile_plan(server.url, rules=[], node_cache=kept)
        assert not kept.exists()
        assert checkpoint.is_remote
        assert all(isinstance(source, CachedFile) for source in checkpoint.sources)
        for _ in range(2):
            assert_same(amc.load_state_dict(server.url, rules=[], node_cache=kept), TENSORS)
        requests = server.of(".safetensors")
    assert len(list(kept.iterdir())) == 2
    assert len(requests) == 4 * 2 + 2  # four headers of each file, and the bytes of each file once


def test_model_is_filled_with_the_kept_bytes(tmp_path, kept):
    with serve(write_sharded(tmp_path / "sharded")) as server:
        for _ in range(2):
            model = torch.nn.ParameterDict(
                {name: torch.nn.Parameter(torch.full_like(t, -1), False) for name, t in TENSORS.items()}
            )
            amc.load_model(model, server.url, rules=[], node_cache=str(kept), threads=3)
            assert_same(model.state_dict(), TENSORS)


def test_files_on_this_machine_are_read_where_they_are(tmp_path, kept):
    save_file({"a": torch.ones(2)}, tmp_path / NAME)
    checkpoint = amc.open_checkpoint(tmp_path, node_cache=kept)
    assert checkpoint.sources == (LocalFile(str(tmp_path / NAME)),)
    assert_same(amc.load_state_dict(tmp_path, rules=[], node_cache=kept), {"a": torch.ones(2)})
    assert not kept.exists()


def test_file_in_the_cache_of_the_hub_is_read_there_and_the_other_is_kept(tmp_path, kept, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with loopback_hub.serve({"org/name": write_sharded(tmp_path / "repository")}) as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        huggingface_hub.hf_hub_download("org/name", first)
        for _ in range(2):
            assert_same(amc.load_state_dict("org/name", rules=[], node_cache=kept), TENSORS)
        checkpoint = amc.open_checkpoint("org/name", node_cache=kept)
        requests = [one for one in hub.requests_of(second) if one.method == "GET"]
    assert [type(source) for source in checkpoint.sources] == [LocalFile, CachedFile]
    [file] = kept.iterdir()
    assert file.name.endswith(second)
    assert len(requests) == 3 + 1  # three headers, and the bytes once


def test_path_of_the_directory_expands_and_is_no_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("~/kept") == str(tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    assert cache_directory(Path("kept")) == str(tmp_path / "kept")
    with pytest.raises(UnsupportedError, match=r"only a path on this machine(.|\n)*s3://bucket/kept"):
        cache_directory("s3://bucket/kept")
