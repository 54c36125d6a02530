"""Tests of the blocks of a kept file: what counts as complete, and who may fetch a block."""

from __future__ import annotations

import errno
import threading

import pytest

from automodel_conv.errors import WriteError
from automodel_conv.files import system
from automodel_conv.files.remote.cache_blocks import BLOCK_BYTES, CacheBlocks

SIZES = [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "new" / "file")


def bytes_of(blocks, block):
    start, stop = blocks.range_of(block)
    return memoryview(bytes(i * 7 % 251 + block for i in range(1000)) * (BLOCK_BYTES // 1000 + 1))[: stop - start]


def read(blocks, start, stop):
    data = memoryview(bytearray(b"\xa5" * (stop - start)))
    blocks.read([data], start)
    return data


@pytest.mark.parametrize("nbytes", SIZES)
def test_written_blocks_are_complete_and_are_read_by_another_open(path, nbytes):
    blocks = CacheBlocks(path, nbytes)
    assert [blocks.is_complete(block) for block in range(blocks.count)] == [False] * blocks.count
    for block in reversed(range(blocks.count)):
        blocks.write(block, bytes_of(blocks, block))
        assert blocks.is_complete(block)
    other = CacheBlocks(path, nbytes)
    assert all(map(other.is_complete, range(other.count)))
    assert read(other, 0, nbytes) == b"".join(bytes_of(blocks, block) for block in range(blocks.count))


@pytest.mark.parametrize("nbytes", SIZES)
def test_blocks_cover_each_byte_once(path, nbytes):
    blocks = CacheBlocks(path, nbytes)
    ranges = [blocks.range_of(block) for block in range(blocks.count)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == nbytes
    assert list(blocks.blocks_of(0, nbytes)) == list(range(blocks.count))
    assert list(blocks.blocks_of(nbytes - 1, nbytes)) == [blocks.count - 1]


@pytest.mark.parametrize("at", [0, BLOCK_BYTES // 2, BLOCK_BYTES - 1])
def test_a_changed_byte_makes_only_its_block_incomplete(path, at):
    blocks = CacheBlocks(path, 2 * BLOCK_BYTES)
    for block in range(2):
        blocks.write(block, bytes_of(blocks, block))
    with open(path, "r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert [blocks.is_complete(block) for block in range(2)] == [False, True]


def test_block_of_zeros_is_not_complete_before_it_is_written(path):
    blocks = CacheBlocks(path, BLOCK_BYTES)
    assert not blocks.is_complete(0)
    blocks.write(0, memoryview(bytes(BLOCK_BYTES)))
    assert blocks.is_complete(0)


def test_a_block_whose_bytes_were_not_all_written_has_no_record(path, monkeypatch):
    blocks = CacheBlocks(path, BLOCK_BYTES)
    real, left = system.pwritev, [1]

    def full_disk(fd, views, offset):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        return real(fd, [views[0][:1000]], offset)

    monkeypatch.setattr(system, "pwritev", full_disk)
    with pytest.raises(WriteError, match=r"1000 bytes, then(.|\n)*No space left"):
        blocks.write(0, bytes_of(blocks, 0))
    assert not blocks.is_complete(0)


def test_a_claim_excludes_other_threads_and_opens_until_it_ends(path):
    first, second = CacheBlocks(path, 4 * BLOCK_BYTES), CacheBlocks(path, 4 * BLOCK_BYTES)
    with first.claimed([0, 1, 3]) as mine:
        assert mine.blocks == [0, 1, 3]
        with second.claimed(range(4)) as others:
            assert others.blocks == [2]
        seen = []

        def claim():
            with first.claimed(range(4)) as claims:
                seen.append(claims.blocks)

        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()
        assert seen == [[2]]
        mine.end(1)
        with second.claimed(range(4)) as others:
            assert others.blocks == [1, 2]
    with second.claimed(range(4)) as others:
        assert others.blocks == [0, 1, 2, 3]


def test_claims_end_with_an_error(path):
    blocks = CacheBlocks(path, BLOCK_BYTES)
    with pytest.raises(ZeroDivisionError), blocks.claimed([0]):
        1 / 0  # noqa: B018
    with blocks.claimed([0]) as claims:
        assert claims.blocks == [0]


def test_without_locks_everybody_can_claim_a_block(path, monkeypatch):
    monkeypatch.setattr(system, "can_lock_ranges", lambda: False)
    blocks = CacheBlocks(path, BLOCK_BYTES)
    with blocks.claimed([0]) as mine, blocks.claimed([0]) as others:
        assert mine.blocks == others.blocks == [0]
        mine.end(0)


def test_removed_file_is_still_read_written_and_claimed(path, tmp_path):
    blocks = CacheBlocks(path, BLOCK_BYTES)
    (tmp_path / "new" / "file").unlink()
    with blocks.claimed([0]) as claims:
        blocks.write(0, bytes_of(blocks, 0))
        claims.end(0)
    assert blocks.is_complete(0)


def test_truncated_file_is_extended_and_lacks_what_was_cut_off(path):
    blocks = CacheBlocks(path, 2 * BLOCK_BYTES)
    for block in range(2):
        blocks.write(block, bytes_of(blocks, block))
    with open(path, "r+b") as file:
        file.truncate(BLOCK_BYTES)
    other = CacheBlocks(path, 2 * BLOCK_BYTES)
    assert [other.is_complete(block) for block in range(2)] == [False, False]
    other.write(1, bytes_of(other, 1))
    assert [other.is_complete(block) for block in range(2)] == [False, True]
