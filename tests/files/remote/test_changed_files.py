"""Tests of files that change while they are read, and of addresses that expire."""

from __future__ import annotations

import os
import time

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.files.remote import requests, web_files
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.requests import Address, WebError
from automodel_conv.files.remote.web_files import WebFile
from tests.files.remote.scripted import scripted, with_headers
from tests.loopback_faults import CHANGED, DENIED, EXPIRED, RESET, Faults
from tests.loopback_messages import Answer
from tests.loopback_store import serve

CONTENT = os.urandom(300_000)
FIRST = 1000
SMALL = 5_000


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(web_files, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr(web_files, "SMALL_RANGE_BYTES", SMALL)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a").write_bytes(CONTENT)
    return folder


def file_at(url, name="a", headers=None):
    return WebFile(f"{url}/{name}", lambda: Address(f"{url}/{name}", headers or {}), Connections(Traffic()), FIRST)


def get(opened, start, stop):
    """Return bytes, read into two views of poisoned memory."""
    data = bytearray(b"\xa5" * (stop - start))
    middle = (stop - start) // 3
    opened.read_into([memoryview(data)[:middle], memoryview(data)[middle:]], start)
    return bytes(data)


@pytest.mark.parametrize("validators", [True, False])
def test_file_that_changes_is_one_error(folder, validators):
    with serve(folder, validators=validators) as server:
        file = file_at(server.url)
        opened = file.open()
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]
        time.sleep(0.01)
        (folder / "a").write_bytes(CONTENT + b"x")
        with pytest.raises(ReadError, match=r"(?s)has changed.*300000 bytes.*now 300001 bytes.*load again"):
            get(opened, 20_000, 30_000)
        assert file.connections.traffic.retries == 0


@pytest.mark.parametrize("etag", ['"same"', 'W/"same"'])
def test_time_of_equal_bytes_may_change(folder, etag):
    """A strong ETag proves that the bytes are equal; a weak one does not."""

    def change(asked, answer):
        second = "0" if "=0-" in asked.headers["range"] else "1"
        stated = {"ETag": etag, "Last-Modified": f"Wed, 21 Oct 2015 07:28:0{second} GMT"}
        return Answer(answer.status, {**answer.headers, **stated}, answer.body)

    with scripted(folder, change) as server:
        opened = file_at(server.url).open()
        if etag.startswith("W/"):
            with pytest.raises(ReadError, match="has changed"):
                get(opened, 10_000, 20_000)
        else:
            assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_change_of_each_header_is_noticed(folder, header):
    values = {"ETag": 'W/"same"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    other = {"ETag": '"other"', "Last-Modified": "Wed, 21 Oct 2015 07:28:01 GMT"}

    def change(asked, answer):
        stated = values | ({header: other[header]} if "=0-" not in asked.headers["range"] else {})
        return Answer(answer.status, {**answer.headers, **stated}, answer.body)

    with scripted(folder, change) as server:
        opened = file_at(server.url).open()
        with pytest.raises(ReadError, match="has changed"):
            get(opened, 10_000, 20_000)


def test_change_in_the_middle_of_an_answer_that_breaks_off_is_noticed(folder):
    with serve(folder, faults=Faults({1: RESET, 2: CHANGED})) as server:
        opened = file_at(server.url).open()
        with pytest.raises(ReadError, match="has changed"):
            get(opened, 10_000, 300_000)


def test_header_that_only_one_answer_has_is_no_change(folder):
    with scripted(folder, with_headers(ETag=None)) as server:
        file = file_at(server.url)
        opened = file.open()
        server.face = type(server.face)(folder)
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]


def test_identity_is_that_of_now(folder):
    with serve(folder) as server:
        file = file_at(server.url)
        before = file.identity()
        file.open()
        assert file.identity() == before
        time.sleep(0.01)
        (folder / "a").write_bytes(CONTENT[::-1])
        assert file.identity() != before
        (folder / "a").unlink()
        with pytest.raises(OSError, match="404"):
            file.identity()


def test_expired_address_is_renewed_once(folder):
    addresses = iter([f"signature={number}" for number in range(9)])
    with serve(folder) as server:
        locate = lambda: Address(f"{server.url}/a?{next(addresses)}", {})  # noqa: E731
        file = WebFile(f"{server.url}/a", locate, Connections(Traffic()), FIRST)
        opened = file.open()
        server.faults = Faults([EXPIRED, None, None])
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]
        assert get(opened, 20_000, 30_000) == CONTENT[20_000:30_000]
        assert [one.query for one in server.requests] == [f"signature={number}" for number in (0, 0, 1, 1)]


def test_address_that_stays_refused_is_one_error_that_says_so(folder):
    with serve(folder, query="signature=hidden") as server:
        file = WebFile(
            f"{server.url}/a", lambda: Address(f"{server.url}/a?signature=hidden", {}), Connections(Traffic()), 9
        )
        opened = file.open()
        server.faults = Faults([EXPIRED.from_then_on()])
        with pytest.raises(ReadError, match=r"(?s)Request has expired.*signature has.*ask for a new") as error:
            get(opened, 10_000, 20_000)
        assert "hidden" not in str(error.value)
        assert len(server.requests) == 3


def test_refused_address_is_an_error_when_the_file_is_opened(folder):
    with serve(folder, faults=Faults([DENIED.from_then_on()])) as server:
        with pytest.raises(WebError, match="the server refuses access"):
            file_at(server.url).open()
        assert len(server.requests) == 1


def test_failing_renewal_is_an_error_of_the_read(folder):
    calls = []

    def locate():
        calls.append(1)
        if len(calls) > 1:
            raise WebError("no credentials")
        return Address(f"{url}/a", {})

    with serve(folder, faults=Faults({1: EXPIRED})) as server:
        url = server.url
        opened = WebFile(f"{url}/a", locate, Connections(Traffic()), FIRST).open()
        with pytest.raises(ReadError, match="no credentials"):
            get(opened, 10_000, 20_000)
