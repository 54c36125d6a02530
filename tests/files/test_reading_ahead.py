"""Tests of reading ahead: files are cached afterwards, and short, broken or ended reads stop it silently."""

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.compiling import opening
from automodel_conv.files import reading_ahead as module
from automodel_conv.files import system
from automodel_conv.files.reading_ahead import LEAST_BYTES, read_ahead, reading_ahead
from automodel_conv.files.source import LocalFile
from automodel_conv.publishing import conversion_files
from tests.faults import descriptors, workers

ALL = (0, 1)
PORTION_BYTES = 1 << 20
# One page more than whole portions, so that the last portion is short.
SIZES = (3 * PORTION_BYTES, PORTION_BYTES + 4096)


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(module, "PORTION_BYTES", PORTION_BYTES)


@pytest.fixture
def files(tmp_path):
    """Write files to the disk and evict them from the cache."""
    if sys.platform != "linux" or not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("only Linux tells what is cached")
    made = [str(tmp_path / f"{number}.safetensors") for number in range(len(SIZES))]
    for path, nbytes in zip(made, SIZES, strict=True):
        with open(path, "wb") as file:
            file.write(bytes(nbytes))
            file.flush()
            os.fsync(file.fileno())
            system.drop_cache(file.fileno())
    if any(map(cached_pages, made)):
        pytest.skip("this file system does not forget")
    return made


def cached_pages(path):
    """Return the number of cached pages of a file. Reading a byte with RWF_NOWAIT would start to load its page."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapped)
        start, nbytes = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None).mincore(start, nbytes, found)
        del first
        assert not failed
        return sum(byte & 1 for byte in found)


def wait_until_cached(files):
    """Wait until pending reads have finished."""
    until = time.monotonic() + 60
    while sum(map(cached_pages, files)) * mmap.PAGESIZE < sum(SIZES):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write two files that count as uncached; record the reads into the cache: (file, offset, bytes)."""
    calls = []
    paths = []
    for number, nbytes in enumerate(SIZES):
        paths.append(str(tmp_path / f"{number}.safetensors"))
        with open(paths[-1], "wb") as file:
            file.truncate(nbytes)

    def read_into_cache(fd, offset, nbytes):
        calls.append((paths.index(os.readlink(f"/proc/self/fd/{fd}")), offset, nbytes))
        return nbytes

    monkeypatch.setattr(system, "is_cached", lambda fd, offset: False)
    monkeypatch.setattr(system, "read_into_cache", read_into_cache)
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 60)
    return SimpleNamespace(paths=paths, calls=calls)


def test_all_bytes_are_cached_and_none_is_read_twice(files, monkeypatch):
    assert 0 < read_ahead(files, ALL, threading.Event()) <= sum(SIZES)
    wait_until_cached(files)
    monkeypatch.setattr(system, "read_into_cache", None)
    assert read_ahead(files, ALL, threading.Event()) == 0


def test_a_block_reads_ahead_until_it_ends(files):
    checkpoint: Any = SimpleNamespace(sources=tuple(map(LocalFile, files)), is_remote=False, nbytes=[LEAST_BYTES])
    with reading_ahead(checkpoint):
        wait_until_cached(files)
    assert workers() == []


def test_portions_come_in_the_order_of_the_files(fake):
    assert read_ahead(fake.paths, ALL, threading.Event()) == sum(SIZES)
    last = (1, PORTION_BYTES, 4096)
    assert fake.calls == [*((0, n * PORTION_BYTES, PORTION_BYTES) for n in range(3)), (1, 0, PORTION_BYTES), last]


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_ranks_read_each_portion_once(fake, shares):
    expected = read_ahead(fake.paths, ALL, threading.Event())
    whole = sorted(fake.calls)
    fake.calls.clear()
    parts = [read_ahead(fake.paths, (number, shares), threading.Event()) for number in range(shares)]
    assert sorted(fake.calls) == whole
    assert sum(parts) == expected


def test_it_stops_after_the_current_portion(fake, monkeypatch):
    stop, read_into_cache = threading.Event(), system.read_into_cache

    def stopping(*arguments):
        stop.set()
        return read_into_cache(*arguments)

    monkeypatch.setattr(system, "read_into_cache", stopping)
    assert read_ahead(fake.paths, ALL, stop) == PORTION_BYTES
    assert read_ahead(fake.paths, ALL, stop) == 0
    assert len(fake.calls) == 1


def test_nothing_is_read_if_the_system_cannot_report_cached_pages(fake, monkeypatch):
    monkeypatch.setattr(system, "is_cached", lambda fd, offset: None)
    assert read_ahead(fake.paths, ALL, threading.Event()) == 0


@pytest.mark.parametrize("shares", [1, 2])
def test_all_ranks_together_take_half_of_the_free_memory(fake, monkeypatch, shares):
    monkeypatch.setattr(module, "free_memory", lambda: 4 * PORTION_BYTES)
    assert read_ahead(fake.paths, (0, shares), threading.Event()) == 2 * PORTION_BYTES // shares


def test_it_stops_if_memory_runs_short(fake, monkeypatch):
    free = iter([1 << 60, 1 << 60, 4 * PORTION_BYTES])
    monkeypatch.setattr(module, "free_memory", lambda: next(free))
    monkeypatch.setattr(module, "_LOOK_BYTES", PORTION_BYTES)
    assert read_ahead(fake.paths, ALL, threading.Event()) == 2 * PORTION_BYTES


@pytest.mark.parametrize("free", [None, 0])
def test_without_memory_nothing_is_read(fake, monkeypatch, free):
    monkeypatch.setattr(module, "free_memory", lambda: free)
    assert read_ahead(fake.paths, ALL, threading.Event()) == 0


@pytest.mark.parametrize("call", ["open_readonly", "size", "read_into_cache"])
def test_failing_call_ends_it_silently(fake, monkeypatch, call):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = descriptors()
    monkeypatch.setattr(system, call, fail)
    assert read_ahead(fake.paths, ALL, threading.Event()) == 0
    assert descriptors() == before


@pytest.fixture
def large(fake):
    return SimpleNamespace(sources=tuple(map(LocalFile, fake.paths)), is_remote=False, nbytes=[LEAST_BYTES])


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt], ids=str)
def test_no_thread_is_left_after_the_block_ends_or_raises(large, monkeypatch, error):
    started = threading.Event()

    def reads(files, share, stop):
        started.set()
        assert stop.wait(60)

    monkeypatch.setattr(module, "read_ahead", reads)
    caught = None
    try:
        with reading_ahead(large):
            assert started.wait(60)
            if error is not None:
                raise error
    except (KeyError, KeyboardInterrupt) as raised:
        caught = type(raised)
    assert caught is error
    assert [thread.name for thread in threading.enumerate() if "ahead" in thread.name] == []


@pytest.mark.parametrize("change", [{"is_remote": True}, {"nbytes": [LEAST_BYTES - 1]}], ids=str)
def test_remote_and_small_checkpoints_are_not_read_ahead(large, monkeypatch, change):
    monkeypatch.setattr(threading.Thread, "start", None)
    vars(large).update(change)
    with reading_ahead(large):
        pass


def test_failure_to_start_a_thread_is_not_an_error(large, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with reading_ahead(large):
        pass


@pytest.fixture
def tried(monkeypatch):
    """Record which doors read ahead, in a process that has not imported any models yet."""
    shares = []

    def noting(checkpoint, share):
        shares.append(share)
        return reading_ahead(checkpoint, share)

    monkeypatch.setattr(opening, "models_are_imported", lambda: False)
    monkeypatch.setattr(opening, "reading_ahead", noting)
    return shares


def test_only_loads_that_build_a_model_read_ahead(tmp_path, tried, monkeypatch):
    pytest.importorskip("transformers", reason="needs a transformers model")
    from tests.model_zoo import build_model, write_checkpoint

    model = build_model("mixtral")
    write_checkpoint(model, tmp_path / "published", 1 << 30)
    plan = amc.compile_plan(tmp_path / "published")
    amc.load_state_dict(tmp_path / "published", model)
    amc.load_state_dict(tmp_path / "published", plan=plan)
    amc.load_state_dict(tmp_path / "published", rules=[])
    amc.load_model(model, tmp_path / "published")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "copied", rules=[])
    assert tried == []
    amc.load_state_dict(tmp_path / "published")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped", layout="nemo")
    assert tried == [(0, 1), (3, 4)]
    monkeypatch.setattr(opening, "models_are_imported", lambda: True)
    amc.load_state_dict(tmp_path / "published")
    assert len(tried) == 2
    assert conversion_files.while_importing is opening.while_importing


def test_errors_of_planning_are_unchanged(tmp_path, tried):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(amc.UnsupportedError, match=r"config\.json|needs transformers"):
        amc.load_state_dict(tmp_path)
    assert tried == [(0, 1)]
    assert workers() == []
