"""Tests of the journal of unfinished work: its records, truncation by a crash, and malformed files."""

import json

import pytest

from automodel_conv.files import journal as module
from automodel_conv.files import system
from automodel_conv.files.journal import append_record, read_journal

EMPTY = (None, set(), set(), {})


@pytest.fixture
def journal(tmp_path):
    with system.open_append(str(tmp_path / "journal.jsonl")) as file:
        yield file.fileno()


def written(journal, *records):
    for record in records:
        append_record(journal, record)
    return read_journal(journal)


def test_an_empty_journal_records_nothing(journal):
    assert read_journal(journal) == EMPTY


def test_records_are_lines_of_json_that_add_up(journal, tmp_path):
    records = [
        {"work": {"files": ["a", "b"]}},
        {"finished": "a"},
        {"finished": "b", "verified": True},
        {"placing": {"b": [3, 4], "tokenizer/a": [1, 2]}},
    ]
    state = written(journal, *records)
    assert state == ({"files": ["a", "b"]}, {"a", "b"}, {"b"}, {"b": [3, 4], "tokenizer/a": [1, 2]})
    assert list(state.placing) == ["b", "tokenizer/a"]
    assert [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()] == records


def test_a_shard_that_is_written_again_is_neither_finished_nor_verified(journal):
    state = written(journal, {"work": {}}, {"finished": "a", "verified": True}, {"again": "a"})
    assert (state.finished, state.verified) == (set(), set())
    assert written(journal, {"finished": "a"}).verified == set()


def test_work_that_cannot_be_resumed_has_no_description(journal):
    assert written(journal, {"work": None}, {"finished": "a"}) == (None, {"a"}, set(), {})


def test_a_line_that_a_crash_cut_short_is_cut_off(journal, tmp_path):
    append_record(journal, {"finished": "a"})
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + b'{"finished": "b')
    assert read_journal(journal).finished == {"a"}
    assert (tmp_path / "journal.jsonl").read_bytes() == whole
    assert written(journal, {"finished": "c"}).finished == {"a", "c"}


@pytest.mark.parametrize(
    "line",
    [
        b"\0\xff",
        b"[1]",
        b"3",
        b'{"work": 5}',
        b'{"finished": []}',
        b'{"placing": 3}',
        b'{"placing": {"../a": [1, 2]}}',
        b'{"placing": {"/etc/a": [1, 2]}}',
        b'{"placing": {"a//b": [1, 2]}}',
        b'{"other": "a"}',
        b"[" * 100_000,
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
def test_a_file_with_another_line_is_no_journal(journal, tmp_path, line):
    append_record(journal, {"finished": "a"})
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(line + b"\n")
    assert read_journal(journal) == EMPTY


def test_a_file_that_is_far_too_large_is_no_journal(journal, monkeypatch):
    append_record(journal, {"finished": "a"})
    monkeypatch.setattr(module, "_MOST_JOURNAL_BYTES", system.size(journal))
    assert read_journal(journal).finished == {"a"}
    monkeypatch.setattr(module, "_MOST_JOURNAL_BYTES", system.size(journal) - 1)
    assert read_journal(journal) == EMPTY
