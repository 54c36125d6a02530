"""Tests of system errors during a write: each becomes one error that names the file and what to check."""

import errno
import os

import pytest

from automodel_conv.errors import WriteError
from automodel_conv.files.write_errors import write_errors


def test_the_file_of_the_error_is_named_and_the_error_is_its_cause(tmp_path):
    path = tmp_path / "no" / "file"
    with pytest.raises(WriteError) as caught, write_errors("/the/directory"):
        path.write_bytes(b"")
    text = str(caught.value)
    assert text.startswith("cannot write to a directory")
    assert f"where:    {path}" in text
    assert "No such file" in text
    assert "do:       create the directory that it should be in" in text
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_error_without_a_file_is_given_the_path_of_the_block():
    with pytest.raises(WriteError) as caught, write_errors("/the/directory", "a file", "room for 5 bytes"):
        raise OSError(28, "No space left on device")
    text = str(caught.value)
    assert text.startswith("cannot write a file\n")
    assert "where:    /the/directory" in text
    assert "expected: room for 5 bytes" in text


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "pass a smaller {max_shard_size=}"),
        (errno.EACCES, "choose a directory that you may write to"),
        (errno.EROFS, "choose a directory that you may write to"),
        (errno.ENOTDIR, "a file is where the directory should be"),
        (errno.EIO, "check the disk space, the quota and the permissions"),
    ],
)
def test_advice_fits_the_number_of_the_error(number, advice):
    with pytest.raises(WriteError) as caught, write_errors("/the/directory"):
        raise OSError(number, os.strerror(number))
    assert advice in str(caught.value).replace("max_shard_size=", "{max_shard_size=}")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), WriteError("earlier")], ids=repr)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, write_errors("/the/directory"):
        raise error
    assert caught.value is error


def test_a_block_that_ends_well_raises_nothing():
    with write_errors("/the/directory"):
        done = True
    assert done
