"""Tests of the store on the loopback: ranges, conditions, limits and each fault, by independent clients."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests import loopback_faults as faults
from tests.loopback_faults import Faults, busy
from tests.loopback_store import serve, serve_elsewhere

DATA = bytes(range(256)) * 4096
NAME = "weights file.safetensors"
TARGET = "/weights%20file.safetensors"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    (folder / "empty").write_bytes(b"")
    return folder


def ask(server, target=TARGET, method="GET", connection=None, **headers):
    """Return status, headers and body of one request; a name such as ``if_match`` is a header."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(connection or http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)) as connection:
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize(
    ("text", "first", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-99999", 5, 100000),
        ("bytes=1048000-9999999", 1048000, len(DATA)),
        ("bytes=1048575-", 1048575, len(DATA)),
        ("bytes=-7", len(DATA) - 7, len(DATA)),
    ],
)
def test_range_is_answered_with_its_bytes(folder, text, first, stop):
    with serve(folder) as server:
        status, headers, body = ask(server, range=text)
        assert (status, body) == (206, DATA[first:stop])
        assert headers["Content-Range"] == f"bytes {first}-{stop - 1}/{len(DATA)}"
        assert server.requests[0].range == text
        assert server.requests[0].sent == stop - first == server.sent


@pytest.mark.parametrize(("text", "status"), [("bytes=1048576-", 416), ("bytes=0-1,5-6", 416), ("bytes=9-5", 200)])
def test_range_that_cannot_be_answered(folder, text, status):
    with serve(folder) as server:
        assert ask(server, range=text)[0] == status
        assert ask(server, "/empty", range="bytes=0-")[0] == 416


def test_head_states_the_size_and_the_version(folder):
    with serve(folder) as server:
        status, headers, body = ask(server, method="HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", str(len(DATA)))
        assert headers["Accept-Ranges"] == "bytes"
        assert headers["ETag"]
        assert headers["Last-Modified"]


def test_conditions_hold_for_one_version(folder):
    with serve(folder) as server:
        etag = ask(server, method="HEAD")[1]["ETag"]
        assert ask(server, if_match=etag, range="bytes=0-3")[2] == DATA[:4]
        assert ask(server, if_range=etag, range="bytes=0-3")[0] == 206
        assert ask(server, if_none_match=etag)[0] == 304
        (folder / NAME).write_bytes(DATA[::-1])
        assert ask(server, if_match=etag, range="bytes=0-3")[0] == 412
        assert ask(server, if_range=etag, range="bytes=0-3")[2] == DATA[::-1]


def test_replaced_file_has_another_etag_at_the_same_time_and_size(folder):
    with serve(folder) as server:
        before, status = ask(server, method="HEAD")[1], (folder / NAME).stat()
        (folder / "new").write_bytes(DATA[::-1])
        os.utime(folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (folder / "new").replace(folder / NAME)
        after = ask(server, method="HEAD")[1]
        assert after["Last-Modified"] == before["Last-Modified"]
        assert after["ETag"] != before["ETag"]


def test_files_outside_the_folder_are_absent(folder):
    (folder.parent / "secret").write_bytes(b"secret")
    with serve(folder) as server:
        assert [ask(server, target)[0] for target in ("/../secret", "/%2e%2e/secret", "/", "/absent")] == [404] * 4


def test_one_connection_carries_many_requests(folder):
    with serve(folder) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        for start in range(0, 1000, 100):
            connection.request("GET", TARGET, headers={"Range": f"bytes={start}-{start + 99}"})
            assert connection.getresponse().read() == DATA[start : start + 100]
        assert (server.connections, server.open_connections, server.most_connections) == (1, 1, 1)
        connection.close()
        wait_for(lambda: server.open_connections == 0)
        assert {one.connection for one in server.requests} == {1}


def test_authorization_and_query_are_required(folder):
    with serve(folder, authorization="Bearer secret", query="signature=1") as server:
        assert ask(server, f"{TARGET}?signature=1")[0] == 401
        assert ask(server, f"{TARGET}?signature=1", authorization="Bearer wrong")[0] == 401
        assert ask(server, TARGET, authorization="Bearer secret")[0] == 403
        assert ask(server, f"{TARGET}?signature=1", authorization="Bearer secret")[2] == DATA


def test_server_without_ranges_sends_the_whole_file(folder):
    with serve(folder, takes_ranges=False, validators=False) as server:
        status, headers, body = ask(server, range="bytes=0-3")
        assert (status, body, headers["ETag"], headers["Accept-Ranges"]) == (200, DATA, None, None)


def test_latency_delays_each_answer(folder):
    with serve(folder, latency=0.1) as server:
        start = time.perf_counter()
        ask(server, range="bytes=0-3")
        assert time.perf_counter() - start >= 0.1


def test_bandwidth_is_shared_by_all_connections(folder):
    with serve(folder, gb_per_s=len(DATA) * 4 / 0.2 / 1e9) as server, ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        assert set(pool.map(lambda _: ask(server)[2], range(4))) == {DATA}
        assert time.perf_counter() - start >= 0.19


def test_connections_above_the_limit_are_refused(folder):
    with serve(folder, connections=1, retry_after="0.5") as server:
        first = http.client.HTTPConnection(urlsplit(server.url).netloc)
        first.connect()
        wait_for(lambda: server.open_connections == 1)
        status, headers, _ = ask(server)
        assert (status, headers["Retry-After"], headers["Connection"]) == (503, "0.5", "close")
        assert server.refused_connections == 1
        first.close()
        wait_for(lambda: server.open_connections == 0)
        assert ask(server)[2] == DATA


def test_tls_is_trusted_only_with_the_certificate(folder):
    with serve(folder, tls=True) as server:
        place = urlsplit(server.url).netloc
        context = ssl.create_default_context(cafile=str(server.certificate))
        connection = http.client.HTTPSConnection(place, context=context)
        assert ask(server, connection=connection, range="bytes=3-9999")[2] == DATA[3:10000]
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(server, connection=http.client.HTTPSConnection(place, context=ssl.create_default_context()))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_status_of_a_fault_is_answered_once(folder, status):
    with serve(folder, faults=Faults([None, busy("0.25", status)])) as server:
        answers = [ask(server) for _ in range(3)]
        assert [one[0] for one in answers] == [200, status, 200]
        assert answers[1][1]["Retry-After"] == "0.25"
        assert [one.fault for one in server.requests] == [None, f"busy {status}", None]


def test_connection_closes_before_the_answer(folder):
    with serve(folder, faults=Faults([faults.NO_ANSWER])) as server:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server)
        assert server.requests[0].status is None
        assert ask(server)[2] == DATA


def test_body_is_short(folder):
    with serve(folder, faults=Faults([faults.cut("close", 0.25)])) as server:
        with pytest.raises(http.client.IncompleteRead) as error:
            ask(server)
        assert error.value.partial == DATA[: len(DATA) // 4]
        assert server.requests[0].sent == len(DATA) // 4


def test_connection_is_reset_within_the_body(folder):
    with serve(folder, faults=Faults({0: faults.RESET})) as server:
        with pytest.raises(ConnectionResetError):
            ask(server)
        assert ask(server)[2] == DATA


def test_connection_closes_after_an_answer_that_keeps_it(folder):
    with serve(folder, faults=Faults([faults.HANG_UP])) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        connection.request("GET", TARGET)
        answer = connection.getresponse()
        assert (answer.read(), answer.headers["Connection"]) == (DATA, "keep-alive")
        wait_for(lambda: server.open_connections == 0)


@pytest.mark.parametrize("by", ["client", "server"])
def test_body_stalls_until_one_side_ends_it(folder, by):
    before = threading.active_count()
    with serve(folder, faults=Faults([faults.STALL])) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=0.2)
        connection.request("GET", TARGET)
        with pytest.raises(TimeoutError):
            connection.getresponse().read()
        assert server.open_connections == 1
        if by == "client":
            connection.close()
            wait_for(lambda: server.open_connections == 0)
    wait_for(lambda: threading.active_count() == before)


def test_range_and_size_are_stated_wrongly(folder):
    with serve(folder, faults=Faults([faults.SHIFTED, faults.OTHER_SIZE])) as server:
        answers = [ask(server, range="bytes=10-19") for _ in range(3)]
        stated = [headers["Content-Range"] for _, headers, _ in answers]
        size = len(DATA)
        assert stated == [f"bytes 11-20/{size}", f"bytes 10-19/{size + 1}", f"bytes 10-19/{size}"]


def test_whole_file_is_sent_instead_of_a_range(folder):
    with serve(folder, faults=Faults([faults.WHOLE.from_then_on()])) as server:
        for _ in range(2):
            status, _, body = ask(server, range="bytes=10-19")
            assert (status, body) == (200, DATA)


def test_file_changes_with_its_etag(folder):
    with serve(folder, faults=Faults({1: faults.CHANGED})) as server:
        answers = [ask(server, range="bytes=0-1") for _ in range(3)]
        assert [body for _, _, body in answers] == [b"\x00\x01", b"\xff\xfe", b"\xff\xfe"]
        etags = [headers["ETag"] for _, headers, _ in answers]
        assert etags[0] != etags[1] == etags[2]
        assert sorted(path.name for path in folder.iterdir()) == ["empty", NAME]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (faults.EXPIRED, 403, ["<Code>AccessDenied</Code>", "Request has expired"]),
        (faults.EXPIRED_TOKEN, 400, ["<Code>ExpiredToken</Code>"]),
        (faults.DENIED, 403, ["<Code>AccessDenied</Code>"]),
        (faults.UNAUTHORIZED, 401, ["<Code>Unauthorized</Code>"]),
    ],
)
def test_signature_expires_for_good(folder, fault, status, words, method):
    with serve(folder, faults=Faults({1: fault.from_then_on()})) as server:
        answers = [ask(server, method=method) for _ in range(3)]
        assert [one[0] for one in answers] == [200, status, status]
        assert all(word in answers[1][2].decode() for word in words if method == "GET")


def test_redirect_to_another_host_shows_what_it_sees(folder):
    urllib3 = pytest.importorskip("urllib3")
    with serve(folder, authorization="Bearer secret", faults=Faults([faults.ELSEWHERE])) as server:
        pool, headers = urllib3.PoolManager(retries=1), {"Authorization": "Bearer secret", "Range": "bytes=5-7"}
        assert pool.request("GET", server.url + TARGET, headers=headers).data == DATA[5:8]
        assert [one.host for one in server.requests] == ["127.0.0.1", "localhost"]
        assert server.saw_credentials("127.0.0.1")
        assert not server.saw_credentials("localhost")
        assert ask(server, f"{TARGET}?redirected=1", host="localhost", cookie="session=secret")[0] == 200
        assert server.saw_credentials("localhost")


def test_redirect_loops(folder):
    urllib3 = pytest.importorskip("urllib3")
    with serve(folder, faults=Faults([faults.LOOP])) as server:
        with pytest.raises(urllib3.exceptions.MaxRetryError, match="too many redirects"):
            urllib3.PoolManager(retries=urllib3.Retry(redirect=5)).request("GET", server.url + TARGET)
        assert [one.status for one in server.requests] == [302] * 6


def test_faults_count_only_requests_of_their_files(folder):
    schedule = Faults([busy()], ending="/empty")
    with serve(folder, faults=schedule) as server:
        assert [ask(server, target)[0] for target in (TARGET, "/empty", "/empty")] == [200, 429, 200]
        assert schedule.dealt == [(0, "busy 429")]


def test_random_faults_depend_only_on_seed_and_number():
    def deal(seed):
        schedule = Faults.random(seed, probability=0.5, stop=50)
        return [schedule._next(Plain) for _ in range(100)]

    assert deal(1) == deal(1)
    assert deal(1) != deal(2)
    assert 10 < sum(fault is not None for fault in deal(1)) < 40
    assert deal(1)[50:] == [None] * 50


class Plain:
    path, query, method = "/file", {}, "GET"


def test_urllib3_reads_through_random_faults(folder):
    urllib3 = pytest.importorskip("urllib3")
    pool = urllib3.PoolManager()
    retries = urllib3.Retry(10, status_forcelist=[429, 500, 502, 503, 504], backoff_factor=0)
    with serve(folder, faults=Faults.random(3, probability=0.3)) as server:
        for start in range(0, 50_000, 1000):
            for _ in range(10):  # a failure within the body is not retried by urllib3
                headers = {"Range": f"bytes={start}-{start + 999}"}
                try:
                    answer = pool.request("GET", server.url + TARGET, headers=headers, retries=retries)
                except urllib3.exceptions.HTTPError:
                    continue
                break
            assert answer.data == DATA[start : start + 1000]
        assert len({one.fault for one in server.requests}) > 5


def test_process_of_its_own_counts_and_ends(folder):
    with serve_elsewhere(folder, latency=0.001, connections=8, query="signature=1") as server:
        assert ask(server, f"{TARGET}?signature=1", range="bytes=7-9")[2] == DATA[7:10]
        assert ask(server, TARGET)[0] == 403
        counts = server.counts()
        assert (counts["requests"], counts["sent"], counts["connections"]) == (2, 3, 2)
        assert (counts["status_206"], counts["status_403"]) == (1, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition does not hold within 5 seconds")
