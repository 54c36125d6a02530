"""Tests of one request: ranges, statuses, waits, and answers that do not have the bytes."""

from __future__ import annotations

import gzip
import ssl
import threading

import pytest

from automodel_conv.files.remote import requests
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.requests import (
    Address,
    PassingFault,
    Retries,
    Version,
    WebError,
    fetch_whole,
    fetch_with_retries,
    is_final,
    request_range,
    wait_seconds,
)
from tests.files.remote.scripted import scripted, with_headers
from tests.loopback_faults import (
    DENIED,
    EXPIRED,
    NO_ANSWER,
    OTHER_SIZE,
    SHIFTED,
    SHORT,
    WHOLE,
    Faults,
    busy,
    cut,
    failing,
)
from tests.loopback_messages import Answer
from tests.loopback_store import serve

CONTENT = bytes(range(256)) * 40
SECRETS = {"Authorization": "Bearer hidden", "Cookie": "hidden", "X-Api-Key": "hidden", "Private-Token": "hidden"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    (folder / "one").write_bytes(b"1")
    return folder


@pytest.fixture
def connections():
    return Connections(Traffic())


def read(connections, url, start=0, stop=10240, headers=None):
    """Return the bytes of a range, and the version."""
    body = request_range(connections, Address(url, headers or {}), start, stop)
    try:
        return body.answer.response.read(), body.version
    finally:
        connections.finish(body.answer)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 10240), (10239, 10240), (5, 105), (0, 1 << 40), (10239, 1 << 40)]
)
def test_range_has_exactly_its_bytes(folder, connections, start, stop):
    with serve(folder) as server:
        data, version = read(connections, f"{server.url}/a", start, stop)
        assert data == CONTENT[start:stop]
        assert version.nbytes == len(CONTENT)
        assert version.etag
        assert version.modified
        assert [one.range for one in server.requests] == [f"bytes={start}-{stop - 1}"]
        assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(("name", "start", "nbytes"), [("empty", 0, 0), ("one", 1, 1), ("a", 10240, 10240)])
def test_range_behind_the_end_is_empty(folder, connections, name, start, nbytes):
    with serve(folder) as server:
        data, version = read(connections, f"{server.url}/{name}", start, start + 8)
    assert (data, version.nbytes) == (b"", nbytes)


def test_file_of_one_byte_is_read(folder, connections):
    with serve(folder) as server:
        assert read(connections, f"{server.url}/one", 0, 64 << 10)[0] == b"1"


@pytest.mark.parametrize("headers", [{"ETag": None}, {"ETag": 'W/"weak"'}, {"ETag": None, "Last_Modified": None}])
def test_servers_without_or_with_weak_validators_are_read(folder, connections, headers):
    with scripted(folder, with_headers(**headers)) as server:
        data, version = read(connections, f"{server.url}/a")
    assert data == CONTENT
    assert version.etag == headers["ETag"]


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        (Version(1, "a", "m"), Version(1, "a", "m"), False),
        (Version(1, "a", "m"), Version(2, "a", "m"), True),
        (Version(1, "a", "m"), Version(1, "b", "m"), True),
        (Version(1, "a", "m"), Version(1, "a", "n"), False),
        (Version(1, "W/a", "m"), Version(1, "W/a", "n"), True),
        (Version(1, None, "m"), Version(1, "b", "m"), False),
        (Version(1, None, None), Version(1, "b", "m"), False),
        (Version(1, None, None), Version(2, None, None), True),
    ],
)
def test_versions_differ_if_a_value_that_both_have_does(one, other, differs):
    assert one.differs_from(other) == other.differs_from(one) == differs


def test_server_that_ignores_ranges_is_refused_before_it_sends_the_file(folder, connections):
    with (folder / "a").open("r+b") as file:
        file.truncate(200_000_000)
    with serve(folder, takes_ranges=False) as server:
        with pytest.raises(WebError, match=r"ignores ranges.*download the files") as error:
            read(connections, f"{server.url}/a")
        assert server.sent < 20_000_000
    assert is_final(error.value)
    assert connections.traffic.connections == 0


def test_compressed_answers_are_refused(folder, connections):
    def compressed(asked, answer):
        return Answer(answer.status, {**answer.headers, "Content-Encoding": "gzip"}, gzip.compress(CONTENT))

    with scripted(folder, compressed) as server:
        with pytest.raises(WebError, match="compresses"):
            read(connections, f"{server.url}/a")
        with pytest.raises(WebError, match="compresses"):
            fetch_whole(connections, Address(f"{server.url}/a", {}), 1 << 20)


@pytest.mark.parametrize(
    "stated",
    [
        None,
        "bytes 0-10239/*",
        "bytes */10240",
        "items 0-10239/10240",
        "bytes 1-10240/10241",
        "bytes 0-10238/10240",
        "bytes 0-10240/10241",
        "bytes 0-10239/" + "9" * 5000,
        "bytes a-b/c",
        "",
    ],
    ids=str,
)
def test_answer_that_states_another_range_is_not_used(folder, connections, stated):
    with scripted(folder, with_headers(Content_Range=stated)) as server, pytest.raises(PassingFault) as error:
        read(connections, f"{server.url}/a")
    assert "state the size" in str(error.value) or "instead of" in str(error.value)
    assert connections.traffic.connections <= 1


@pytest.mark.parametrize("fault", [SHIFTED, WHOLE], ids=lambda fault: fault.name)
def test_wrong_ranges_are_errors(folder, connections, fault):
    with serve(folder, faults=Faults([fault])) as server:
        with pytest.raises((WebError, PassingFault)):
            read(connections, f"{server.url}/a", 5, 10)
        assert read(connections, f"{server.url}/a", 5, 10)[0] == CONTENT[5:10]


def test_other_size_is_another_version(folder, connections):
    with serve(folder, faults=Faults([OTHER_SIZE])) as server:
        first = read(connections, f"{server.url}/a", 0, 8)[1]
        assert first.nbytes == len(CONTENT) + 1
        assert first.differs_from(read(connections, f"{server.url}/a", 0, 8)[1])


def test_size_that_needs_no_range_is_wrong_for_416(folder, connections):
    refused = lambda asked, answer: Answer(416, {"Content-Range": "bytes */10240"})  # noqa: E731
    with scripted(folder, refused) as server, pytest.raises(WebError, match="416"):
        read(connections, f"{server.url}/a", 0, 8)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_statuses_that_may_pass_are_passing_faults(folder, connections, status):
    with serve(folder, faults=Faults([failing(status)])) as server, pytest.raises(PassingFault, match=str(status)):
        read(connections, f"{server.url}/a")


@pytest.mark.parametrize("status", [204, 300, 304, 400, 401, 403, 404, 405, 410, 412, 451])
def test_other_statuses_are_final_and_known(folder, connections, status):
    with scripted(folder, lambda asked, answer: Answer(status)) as server:
        for request in (
            lambda: read(connections, f"{server.url}/a"),
            lambda: fetch_whole(connections, Address(f"{server.url}/a", {}), 100),
        ):
            with pytest.raises(WebError, match=str(status)) as error:
                request()
            assert error.value.status == status


def test_error_of_a_store_has_its_code_and_its_message_without_signatures(folder, connections):
    body = b"<Error><Code>AccessDenied</Code><Message>see https://u:p@h/a?sig=hidden now</Message><X>hidden</X></Error>"
    with scripted(folder, lambda asked, answer: Answer(403, {}, body)) as server:
        with pytest.raises(WebError, match=r"^403 Forbidden: AccessDenied: see https://h/a now$"):
            read(connections, f"{server.url}/a")


def test_long_and_broken_bodies_of_errors_are_cut_off(folder, connections):
    with scripted(folder, lambda asked, answer: Answer(500, {}, b"<Code>" + b"x" * 100_000)) as server:
        with pytest.raises(PassingFault, match=r"^500 Internal Server Error$"):
            read(connections, f"{server.url}/a")
    assert connections.traffic.connections == 0


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("0", 0, 0),
        ("1.5", 1.5, 1.5),
        ("-3", 0, 0),
        ("nan", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
        (None, 0, 0),
        ("1e999", 1e9, float("inf")),
        ("Wed, 01 Jan 2098 00:00:00 GMT", 1e9, 4e9),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999999999999 23:59:59 +0000", 0, 0),
    ],
    ids=str,
)
def test_time_to_wait_is_what_the_server_asks_for(folder, connections, value, least, most):
    with serve(folder, faults=Faults([busy(value)])) as server, pytest.raises(PassingFault) as error:
        read(connections, f"{server.url}/a")
    assert least <= error.value.wait_seconds <= most


def test_waits_double_at_random_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 1.0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (20, requests._MOST_WAIT_SECONDS)):
        waits = {wait_seconds(failures, OSError()) for _ in range(20)}
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(waits) > 1
    assert wait_seconds(1, PassingFault("", 7.0)) == 7.0
    assert wait_seconds(1, PassingFault("", float("inf"))) == requests._MOST_WAIT_SECONDS


def test_only_errors_that_another_request_would_meet_are_final():
    assert is_final(WebError("x"))
    assert is_final(ssl.SSLCertVerificationError("x"))
    assert not any(map(is_final, (PassingFault("x"), TimeoutError(), ConnectionResetError(), ssl.SSLEOFError())))


@pytest.mark.parametrize("name", ["empty", "one", "a"])
def test_small_file_is_fetched_whole(folder, connections, name):
    with serve(folder) as server:
        data = fetch_whole(connections, Address(f"{server.url}/{name}", {}), 1 << 20)
    assert data == (folder / name).read_bytes()
    assert connections.traffic.bytes_received == len(data)


@pytest.mark.parametrize("most", [0, 1, 100, len(CONTENT) - 1])
def test_large_file_is_fetched_up_to_the_limit_and_one_byte_more(folder, connections, most):
    with serve(folder) as server:
        assert fetch_whole(connections, Address(f"{server.url}/a", {}), most) == CONTENT[: most + 1]


def test_small_file_that_ends_early_is_a_passing_fault(folder, connections):
    with serve(folder, faults=Faults([SHORT])) as server, pytest.raises(PassingFault, match="5120 bytes instead of"):
        fetch_whole(connections, Address(f"{server.url}/a", {}), 1 << 20)


def test_length_that_is_no_number_is_not_used(folder, connections):
    def endless(asked, answer):
        return Answer(200, {"Content-Length": "9" * 5000, "Connection": "close"}, b"x", cut=cut("close", 1.0).cut)

    with scripted(folder, endless) as server:
        assert fetch_whole(connections, Address(f"{server.url}/a", {}), 100) == b"x"


def test_faults_that_pass_are_waited_for(folder, connections, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    faults = Faults([busy("0.01"), NO_ANSWER, SHORT, failing(503), cut("reset"), cut("close", 0.9), failing(500)])
    with serve(folder, faults=faults) as server:
        assert fetch_with_retries(connections, Address(f"{server.url}/a", {}), 1 << 20) == CONTENT
        assert len(server.requests) == 8
    assert connections.traffic.retries == 6  # a connection that was kept open may end without an answer


def test_eighth_failure_in_a_row_is_the_last(folder, connections, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    with serve(folder, faults=Faults([failing(503).from_then_on()])) as server:
        with pytest.raises(WebError, match=r"8 requests in a row failed; the last one: .*503"):
            fetch_with_retries(connections, Address(f"{server.url}/a", {}), 1 << 20)
        assert len(server.requests) == requests.ATTEMPTS


def test_server_that_never_answered_is_given_up_sooner(connections, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    with pytest.raises(WebError, match=r"3 requests in a row failed.*refused"):
        fetch_with_retries(connections, Address("http://127.0.0.1:1/a", {}), 1 << 20)


@pytest.mark.parametrize("fault", [DENIED, EXPIRED], ids=lambda fault: fault.name)
def test_refusals_are_not_repeated(folder, connections, fault):
    with serve(folder, faults=Faults([fault])) as server:
        with pytest.raises(WebError, match=r"403.*AccessDenied") as error:
            fetch_with_retries(connections, Address(f"{server.url}/a", {}), 1 << 20)
        assert len(server.requests) == 1
    assert error.value.status == 403


def test_retries_end_when_they_are_stopped(connections):
    stopped = threading.Event()
    retries = Retries(connections, stopped)
    threading.Timer(0.05, stopped.set).start()
    with pytest.raises(WebError, match=r"stopped after: .*x"):
        retries.wait(_Slow("x"))


class _Slow(OSError):
    wait_seconds = 20.0


def test_reset_begins_a_new_row_of_failures(connections, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.0)
    connections.has_answered = True
    retries = Retries(connections, threading.Event())
    for _ in range(3):
        for _ in range(requests.ATTEMPTS - 1):
            retries.wait(OSError())
        retries.reset()
    for _ in range(requests.ATTEMPTS - 1):
        retries.wait(OSError())
    with pytest.raises(WebError, match="in a row"):
        retries.wait(OSError())
