"""Tests of the journal of an upload: its records, and malformed files."""

from __future__ import annotations

import pytest

from automodel_conv.files.uploads.upload_journal import Upload, UploadState, upload_state

RECORDS = [
    {"work": {"files": ["a"]}, "mark": "m"},
    {"written": "a", "verified": True, "checksums": {"w": "0"}},
    {"upload": "a", "id": None},
    {"upload": "a", "id": "1"},
    {"part": 2, "of": "a", "etag": "two"},
    {"part": 1, "of": "a", "etag": "one"},
    {"uploaded": "a"},
    {"written": "b", "verified": False, "checksums": None},
    {"publishing": ["a", "tokenizer/b"]},
]


def test_records_add_up():
    state = upload_state(RECORDS)
    assert state == UploadState(
        work={"files": ["a"]},
        mark="m",
        verified={"a"},
        checksums={"a": {"w": "0"}, "b": None},
        uploads={"a": Upload("1", {1: "one", 2: "two"})},
        uploaded={"a"},
        publishing=("a", "tokenizer/b"),
    )
    assert state.written == {"a", "b"}


def test_new_upload_of_a_file_has_no_parts():
    state = upload_state([*RECORDS, {"upload": "a", "id": "2"}])
    assert state.uploads == {"a": Upload("2")}


def test_file_that_is_written_again_is_forgotten():
    state = upload_state([*RECORDS, {"again": "a"}, {"again": "never written"}])
    assert (state.written, state.uploaded, state.verified, state.uploads) == ({"b"}, set(), set(), {})
    assert state.mark == "m"


@pytest.mark.parametrize(
    "record",
    [
        {"finished": "a"},
        ["a"],
        {"work": 1, "mark": "m"},
        {"part": 1, "of": "unknown", "etag": "x"},
        {"publishing": ["../a"]},
        {"publishing": [1]},
        {"written": "a", "verified": True, "checksums": []},
    ],
)
def test_journal_with_an_odd_line_records_nothing(record):
    assert upload_state([*RECORDS, record]) == UploadState()


@pytest.mark.parametrize("records", [None, []])
def test_file_that_is_no_journal_records_nothing(records):
    assert upload_state(records) == UploadState()
