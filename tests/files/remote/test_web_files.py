"""Tests of files on web servers: ranges that are stated, and answers that break off."""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import time

import pytest

from automodel_conv.errors import CheckpointError, ReadError
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.remote import connections as connections_module
from automodel_conv.files.remote import requests, web_files
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.requests import Address
from automodel_conv.files.remote.web_files import Stream, WebFile
from tests.files.remote.random_faults import within
from tests.files.remote.scripted import scripted
from tests.loopback_faults import RESET, SHORT, STALL, Faults, cut, failing
from tests.loopback_messages import Answer, Cut
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


def ranges(server):
    return [one.range for one in server.requests]


def test_first_bytes_are_requested_once_and_kept(folder):
    with serve(folder) as server:
        file = file_at(server.url)
        opened = file.open()
        assert opened.size() == file.nbytes == len(CONTENT)
        assert get(opened, 0, 8) == CONTENT[:8]
        assert get(opened, 8, FIRST) == CONTENT[8:FIRST]
        file.open()
        assert ranges(server) == [f"bytes=0-{FIRST - 1}"]
        assert (file.is_remote, opened.descriptor(), file.describe()) == (True, None, f"{server.url}/a")


@pytest.mark.parametrize("nbytes", [0, 1, FIRST - 1, FIRST, FIRST + 1])
def test_files_of_any_size_are_opened(folder, nbytes):
    (folder / "a").write_bytes(CONTENT[:nbytes])
    with serve(folder) as server:
        opened = file_at(server.url).open()
        assert opened.size() == nbytes
        opened.read_into([], 0)
        opened.read_into([memoryview(b"")], nbytes)
        assert get(opened, 0, nbytes) == CONTENT[:nbytes]


def test_absent_file_is_an_error_when_it_is_opened(folder):
    with serve(folder) as server, pytest.raises(OSError, match="404 Not Found"):
        file_at(server.url, "absent").open()


@pytest.mark.parametrize(("start", "stop"), [(299_999, 300_001), (300_000, 300_001), (0, 300_001)])
def test_bytes_behind_the_end_are_an_error_without_a_request(folder, start, stop):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        with pytest.raises(ReadError, match=r"(?s)ends too early.*300000 bytes in all"):
            get(opened, start, stop)
        assert len(server.requests) == 1


def test_reads_follow_each_other_in_the_answer_for_a_stated_range(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 200_000), (250_000, 300_000)])
        cuts = [10_000, 10_001, 50_000, 120_000, 200_000]
        for start, stop in itertools.pairwise(cuts):
            assert get(opened, start, stop) == CONTENT[start:stop]
        assert get(opened, 250_000, 300_000) == CONTENT[250_000:]
        assert ranges(server)[1:] == ["bytes=10000-199999", "bytes=250000-299999"]
        assert server.connections == 1


def test_gaps_between_reads_of_a_range_are_received_and_thrown_away(folder):
    with serve(folder) as server:
        file = file_at(server.url)
        opened = file.open()
        opened.expect([(10_000, 200_000)])
        for start, stop in ((10_000, 20_000), (30_000, 40_000), (110_000, 110_001), (190_000, 200_000)):
            assert get(opened, start, stop) == CONTENT[start:stop]
        assert len(server.requests) == 2
        assert file.connections.traffic.bytes_received == FIRST + 190_000


def test_range_is_requested_from_the_first_byte_that_is_read(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 200_000)])
        assert get(opened, 50_000, 60_000) == CONTENT[50_000:60_000]
        assert ranges(server)[1:] == ["bytes=50000-199999"]


def test_bytes_before_the_last_read_have_a_request_of_their_own(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 200_000)])
        assert get(opened, 50_000, 60_000) == CONTENT[50_000:60_000]
        assert get(opened, 20_000, 30_000) == CONTENT[20_000:30_000]
        assert get(opened, 60_000, 70_000) == CONTENT[60_000:70_000]
        assert ranges(server)[1:] == ["bytes=50000-199999", "bytes=20000-29999"]


def test_small_ranges_are_read_in_any_order_and_again(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 10_000 + SMALL)])
        for start, stop in ((14_000, 14_500), (10_000, 11_000), (14_900, 15_000), (10_500, 12_000)):
            assert get(opened, start, stop) == CONTENT[start:stop]
        assert ranges(server)[1:] == [f"bytes=10000-{10_000 + SMALL - 1}"]


def test_ranges_that_were_not_stated_are_requested_as_they_are_read(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]
        assert get(opened, 20_000, 20_001) == CONTENT[20_000:20_001]
        assert ranges(server)[1:] == ["bytes=10000-19999", "bytes=20000-20000"]


def test_new_statement_and_close_end_what_was_begun(folder):
    with serve(folder) as server:
        file = file_at(server.url)
        opened = file.open()
        for _ in range(2):
            opened.expect([(10_000, 300_000)])
            get(opened, 10_000, 20_000)
            assert file.connections.traffic.connections == 1
        opened.expect([])
        assert file.connections.traffic.connections == 0
        opened.expect([(10_000, 300_000)])
        get(opened, 10_000, 20_000)
        opened.close()
        assert file.connections.traffic.connections == 0


def test_threads_state_ranges_of_their_own(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        results: dict[int, bytes] = {}
        meet = threading.Barrier(4, timeout=30)

        def work(number: int) -> None:
            start = 20_000 + number * 60_000
            opened.expect([(start, start + 60_000)])
            meet.wait()
            results[number] = get(opened, start, start + 25_000) + get(opened, start + 25_000, start + 60_000)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for number in range(4):
            assert results[number] == CONTENT[20_000 + number * 60_000 : 80_000 + number * 60_000]
        assert len(server.requests) == 5


@pytest.mark.parametrize(
    "fault", [RESET, SHORT, cut("reset", 0.0), cut("close", 0.99)], ids=lambda fault: str(fault.cut)
)
def test_answer_that_breaks_off_continues_with_the_rest(folder, fault):
    with serve(folder, faults=Faults({1: fault, 3: fault})) as server:
        file = file_at(server.url)
        opened = file.open()
        opened.expect([(10_000, 300_000)])
        assert get(opened, 10_000, 100_000) + get(opened, 100_000, 300_000) == CONTENT[10_000:]
        assert ranges(server)[1] == "bytes=10000-299999"
        assert all(one.range.endswith("-299999") for one in server.requests[1:])
        assert file.connections.traffic.retries in (1, 2)
        assert sum(one.sent for one in server.requests) < 290_000 + FIRST + 2 * 290_000


def test_progress_begins_a_new_row_of_failures(folder, monkeypatch):
    """Each answer breaks off after 50 kB, more often than a row of failures may be long."""
    monkeypatch.setattr(requests, "ATTEMPTS", 3)

    def broken(asked, answer):
        return Answer(answer.status, answer.headers, answer.body, Cut("close", min(1.0, 50_000 / answer.nbytes)))

    with scripted(folder, broken) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 300_000)])
        data = b"".join(get(opened, start, start + 1_000) for start in range(10_000, 300_000, 1_000))
        assert data == CONTENT[10_000:]
        assert len(server.requests) > 5


def test_little_progress_between_failures_does_not_begin_a_new_row(folder):
    """Each answer breaks off after 5 kB, so that a row of failures receives more than a piece in all."""

    def broken(asked, answer):
        return Answer(answer.status, answer.headers, answer.body, Cut("close", min(1.0, 5_000 / answer.nbytes)))

    with scripted(folder, broken) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 300_000)])
        with pytest.raises(ReadError, match="8 requests in a row failed"):
            get(opened, 10_000, 300_000)
        assert len(server.requests) == 1 + requests.ATTEMPTS


def test_answers_without_progress_end_the_read(folder):
    def empty(asked, answer):
        return (
            Answer(answer.status, answer.headers, answer.body, Cut("close", 0.0))
            if "-999" not in asked.headers["range"]
            else answer
        )

    with scripted(folder, empty) as server:
        opened = file_at(server.url).open()
        with pytest.raises(ReadError, match=r"(?s)8 requests in a row failed.*ends at byte 10000 instead of 20000"):
            get(opened, 10_000, 20_000)


def test_silent_server_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(connections_module, "SILENT_SECONDS", 0.2)
    with serve(folder, faults=Faults({1: STALL})) as server:
        opened = file_at(server.url).open()
        assert get(opened, 10_000, 200_000) == CONTENT[10_000:200_000]
        assert len(server.requests) == 3


def test_slow_server_is_waited_for(folder):
    with serve(folder, latency=0.3) as server:
        opened = file_at(server.url).open()
        start = time.perf_counter()
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]
        assert time.perf_counter() - start > 0.25


def test_abort_ends_a_read_that_waits_for_bytes(folder):
    with serve(folder, faults=Faults({1: STALL})) as server:
        opened = file_at(server.url).open()
        threading.Timer(0.2, opened.abort).start()
        with pytest.raises(ReadError, match="stopped"):
            within(20, lambda: get(opened, 10_000, 200_000))


def test_abort_ends_a_read_that_waits_to_ask_again(folder, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr(requests, "_MOST_WAIT_SECONDS", 100.0)
    with serve(folder, faults=Faults({1: failing(503).from_then_on()})) as server:
        opened = file_at(server.url).open()
        threading.Timer(0.2, opened.abort).start()
        with pytest.raises(ReadError, match=r"stopped.*503"):
            within(20, lambda: get(opened, 10_000, 20_000))


def test_read_that_begins_after_an_abort_sends_no_request(folder):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.abort()
        with pytest.raises(ReadError, match="stopped"):
            get(opened, 10_000, 200_000)
        assert len(server.requests) == 1


def test_bytes_that_arrive_after_an_abort_are_refused(folder, monkeypatch):
    with serve(folder) as server:
        opened = file_at(server.url).open()
        opened.expect([(10_000, 200_000)])
        assert get(opened, 10_000, 20_000) == CONTENT[10_000:20_000]
        monkeypatch.setattr(Stream, "stop_now", lambda stream: stream._stopped.set())  # the socket stays as it is
        opened.abort()
        with pytest.raises(ReadError, match="stopped"):
            get(opened, 20_000, 200_000)


def test_error_of_one_header_ends_the_requests_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr(requests, "_MOST_WAIT_SECONDS", 100.0)
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with serve(tmp_path, faults=Faults({0: failing(503).from_then_on()}, ending="b.safetensors")) as server:
        with pytest.raises(CheckpointError, match=r"a\.safetensors[\s\S]*404"):
            within(20, lambda: open_checkpoint(server.url))


def test_what_the_file_needs_is_kept_as_long_as_it(folder):
    import weakref

    class Kept:
        pass

    kept = Kept()
    with serve(folder) as server:
        file = WebFile("u", lambda: Address(f"{server.url}/a", {}), Connections(Traffic()), FIRST, kept)
        reference = weakref.ref(kept)
        del kept
        gc.collect()
        assert reference() is not None
        del file
        gc.collect()
        assert reference() is None


def test_credentials_are_not_in_the_representation():
    secret = {"Authorization": "hidden"}
    file = WebFile("https://h/a", lambda: Address("https://h/a?hidden", secret), Connections(Traffic()), FIRST)
    assert repr(file) == "WebFile('https://h/a')"


def test_stream_ends_where_it_was_asked_to(folder):
    with serve(folder) as server:
        stream = Stream(file_at(server.url), 5, 15)
        data = bytearray(10)
        stream.skip_to(3)
        stream.read_into(memoryview(data)[:0])
        assert not server.requests
        stream.read_into(memoryview(data))
        stream.close()
        stream.close()
        assert data == CONTENT[5:15]
        assert stream.position == 15
