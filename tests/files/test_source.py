"""Tests of a local file as a source of bytes."""

import os

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.files.source import LocalFile, opened
from tests.faults import descriptors


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    return LocalFile(str(tmp_path / "a"))


def test_views_are_filled_with_the_bytes_from_the_offset_on(source):
    first, second = bytearray(3), bytearray(2)
    with opened(source) as file:
        assert file.size() == 10
        file.read_into([memoryview(first), memoryview(second)], 4)
        file.read_into([], 99)
        assert os.pread(file.descriptor(), 2, 8) == b"89"
    assert (bytes(first), bytes(second)) == (b"456", b"78")


def test_its_identity_changes_with_its_size_and_with_its_time(source):
    os.utime(source.path, ns=(1, 2))
    identity = source.identity()
    assert identity == source.identity() == LocalFile(source.path).identity()
    os.utime(source.path, ns=(1, 3))
    assert source.identity() != identity
    with open(source.path, "ab") as file:
        file.write(b"x")
    os.utime(source.path, ns=(1, 2))
    assert source.identity() != identity


def test_a_file_that_is_gone_is_named_and_has_no_identity(tmp_path):
    source = LocalFile(str(tmp_path / "gone"))
    with pytest.raises(ReadError, match=r"(?s)cannot open.*gone"), opened(source):
        pass
    with pytest.raises(OSError, match="gone"):
        source.identity()


def test_a_file_that_ends_too_early_is_named(source):
    with opened(source) as file, pytest.raises(ReadError, match=f"(?s)ends too early.*{source.describe()}"):
        file.read_into([memoryview(bytearray(11))], 0)


def test_a_block_that_fails_closes_the_file(source):
    before = descriptors()
    with pytest.raises(ZeroDivisionError), opened(source):
        1 / 0  # noqa: B018
    assert descriptors() == before
