"""Tests of connections: kept open, closed by either side, forked, over TLS, through proxies; and of their counts."""

from __future__ import annotations

import os
import socket
import threading
from http.client import HTTPException

import pytest

from automodel_conv.files.remote import connections as module
from automodel_conv.files.remote.connections import Connections, Traffic, WebError, basic
from automodel_conv.files.remote.urls import split_web_url
from tests.files.remote.random_faults import assert_no_more_sockets, open_sockets
from tests.files.remote.scripted import proxy, scripted
from tests.loopback_faults import HANG_UP, NO_ANSWER, Faults
from tests.loopback_messages import Answer
from tests.loopback_store import serve

CONTENT = bytes(range(256)) * 100
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a").write_bytes(CONTENT)
    return folder


@pytest.fixture
def connections():
    return Connections(Traffic())


def get(connections: Connections, url: str, headers: dict[str, str] | None = None) -> bytes:
    answer = connections.send("GET", split_web_url(url), headers or {})
    try:
        return answer.response.read()
    finally:
        connections.finish(answer)


def test_traffic_counts_what_is_added():
    traffic = Traffic()
    traffic.add(requests=2, connections=3)
    traffic.add(retries=1, bytes_received=10, connections=-2)
    assert (traffic.requests, traffic.retries, traffic.bytes_received) == (2, 1, 10)
    assert (traffic.connections, traffic.most_connections) == (1, 3)


def test_connection_is_used_again_after_its_whole_body(folder, connections):
    with serve(folder) as server:
        for _ in range(3):
            assert get(connections, f"{server.url}/a") == CONTENT
        assert server.connections == 1
    traffic = connections.traffic
    assert (traffic.requests, traffic.connections, traffic.most_connections) == (3, 1, 1)


def test_connection_with_bytes_left_is_closed(folder, connections):
    with serve(folder) as server:
        answer = connections.send("GET", split_web_url(f"{server.url}/a"), {})
        answer.response.read(10)
        connections.finish(answer)
        assert connections.traffic.connections == 0
        assert get(connections, f"{server.url}/a") == CONTENT
        assert server.connections == 2


def test_connection_that_the_server_wants_to_close_is_closed(folder, connections):
    closing = lambda asked, answer: Answer(200, {"Connection": "close"}, b"x")  # noqa: E731
    with scripted(folder, closing) as server:
        assert get(connections, f"{server.url}/a") == b"x"
        assert connections.traffic.connections == 0


def test_idle_connection_that_the_server_has_closed_is_replaced_without_a_retry(folder, connections):
    with serve(folder, faults=Faults([HANG_UP, HANG_UP])) as server:
        for _ in range(3):
            assert get(connections, f"{server.url}/a") == CONTENT
        assert server.connections == 3
    assert connections.traffic.retries == 0
    assert connections.traffic.connections == 1


def test_new_connection_without_an_answer_is_an_error(folder, connections):
    with serve(folder, faults=Faults([NO_ANSWER])) as server, pytest.raises((ConnectionError, HTTPException)):
        get(connections, f"{server.url}/a")
    assert connections.traffic.connections == 0


def test_has_answered_tells_whether_any_server_was_reached(folder, connections):
    with pytest.raises(ConnectionError):
        get(connections, "http://127.0.0.1:1/a")
    assert not connections.has_answered
    with serve(folder) as server:
        get(connections, f"{server.url}/absent")
    assert connections.has_answered


def test_sockets_are_closed_with_the_connections(folder):
    before = open_sockets()
    with serve(folder) as server:
        connections = Connections(Traffic())
        get(connections, f"{server.url}/a")
    del connections
    assert_no_more_sockets(before)


def test_threads_use_connections_of_their_own_at_the_same_time(folder, connections):
    meet = threading.Barrier(4, timeout=30)
    results = []

    def read() -> None:
        answer = connections.send("GET", split_web_url(f"{server.url}/a"), {})
        meet.wait()
        results.append(answer.response.read())
        connections.finish(answer)

    with serve(folder) as server:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        get(connections, f"{server.url}/a")
        assert server.connections == 4
    assert results == [CONTENT] * 4
    assert connections.traffic.most_connections == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_has_connections_of_its_own(folder, connections):
    with serve(folder) as server:
        get(connections, f"{server.url}/a")
        child = os.fork()
        if not child:
            own = get(connections, f"{server.url}/a") == CONTENT
            os._exit(0 if own else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert get(connections, f"{server.url}/a") == CONTENT
        assert [one.connection for one in server.requests] == [1, 2, 1]


def test_host_name_and_port_are_those_of_the_url(folder, connections):
    with serve(folder) as server:
        get(connections, f"{server.elsewhere}/a")
        assert server.requests[0].headers["host"] == server.elsewhere.removeprefix("http://")


def test_server_with_a_numeric_address_of_version_six_is_read(folder, connections):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    heads = []

    def answer() -> None:
        client, _ = listener.accept()
        heads.append(client.recv(1 << 16).decode())
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        client.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    assert get(connections, f"http://[::1]:{port}/a") == b"hi"
    thread.join(10)
    listener.close()
    assert f"Host: [::1]:{port}\r\n" in heads[0]


@pytest.mark.parametrize("value", ["Bearer hidden\n", "Bearer hidden\r\nX: y", "Bearer hidden€"])
def test_header_that_cannot_be_sent_is_a_value_error_before_anything_is_sent(folder, connections, value):
    with serve(folder) as server:
        with pytest.raises(ValueError, match=r"Invalid header value|codec"):
            get(connections, f"{server.url}/a", {"Authorization": value})
        assert not server.requests
    assert connections.traffic.connections == 0


def test_certificate_is_verified(folder, connections, monkeypatch):
    module._tls.cache_clear()
    try:
        with serve(folder, tls=True) as server:
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                get(connections, f"{server.url}/a")
            assert not server.requests
            monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
            module._tls.cache_clear()
            for url in (server.url, server.elsewhere):
                assert get(connections, f"{url}/a") == CONTENT
            other = server.url.replace("127.0.0.1", "127.0.0.2")  # the certificate is not for this address
            with pytest.raises(OSError, match=r"CERTIFICATE_VERIFY_FAILED|refused"):
                get(connections, f"{other}/a")
    finally:
        module._tls.cache_clear()


def test_proxy_of_the_environment_is_asked_for_whole_urls(folder, connections, monkeypatch):
    with proxy() as between, serve(folder) as server:
        monkeypatch.setenv("http_proxy", between.url.replace("://", "://us%40er:pass@"))
        assert get(connections, f"{server.url}/a?q=1".replace("://", "://own:own@"), {"X-Own": "1"}) == CONTENT
        assert between.heads[0].startswith(f"GET {server.url}/a?q=1 HTTP/1.1\r\n")
        assert f"Proxy-Authorization: {basic('us%40er', 'pass')}\r\n" in between.heads[0]
        assert f"Host: {server.url.removeprefix('http://')}\r\n" in between.heads[0]
        assert "own:own" not in between.heads[0]


def test_proxy_leads_to_a_server_with_tls_without_its_headers(folder, connections, monkeypatch):
    module._tls.cache_clear()
    try:
        with proxy() as between, serve(folder, tls=True) as server:
            monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
            monkeypatch.setenv("https_proxy", between.url.replace("://", "://user:pass@"))
            assert get(connections, f"{server.url}/a", {"Authorization": "Bearer hidden"}) == CONTENT
            assert between.heads[0].startswith(f"CONNECT {server.url.removeprefix('https://')} HTTP/1.")
            assert f"Proxy-Authorization: {basic('user', 'pass')}\r\n" in between.heads[0]
            assert "hidden" not in between.heads[0]
            assert "proxy-authorization" not in server.requests[0].headers
            assert get(connections, f"{server.url}/a") == CONTENT
            assert len(between.heads) == 1  # through the same tunnel
    finally:
        module._tls.cache_clear()


def test_refusal_of_a_proxy_is_an_error_without_its_password(folder, connections, monkeypatch):
    with proxy(refuses="407 Proxy Authentication Required") as between, serve(folder, tls=True) as server:
        monkeypatch.setenv("https_proxy", between.url.replace("://", "://user:hidden@"))
        with pytest.raises(OSError, match="407") as error:
            get(connections, f"{server.url}/a")
        assert "hidden" not in str(error.value)
    assert connections.traffic.connections == 0


def test_hosts_in_no_proxy_are_asked_themselves(folder, connections, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(folder) as server:
        assert get(connections, f"{server.url}/a") == CONTENT
        with pytest.raises(ConnectionError):
            get(connections, f"{server.elsewhere}/a")


@pytest.mark.parametrize(
    "address",
    ["socks5://127.0.0.1:1", "https://u:hidden@127.0.0.1:1", "http://u:hidden/x@h:1", "http://[::1", "http://"],
)
def test_proxy_of_another_kind_is_one_error_without_its_password(folder, connections, monkeypatch, address):
    monkeypatch.setenv("http_proxy", address)
    with serve(folder) as server, pytest.raises(WebError, match="proxy in the environment") as error:
        get(connections, f"{server.url}/a")
    assert "hidden" not in str(error.value)


def test_user_and_password_are_those_that_a_url_escapes():
    assert basic("user", "p%40ss") == "Basic dXNlcjpwQHNz"
    assert basic("ü", "") == "Basic w7w6"


def test_time_limits_are_set_on_the_socket(folder, connections):
    with serve(folder) as server:
        answer = connections.send("GET", split_web_url(f"{server.url}/a"), {})
        assert answer.socket is not None
        assert answer.socket.gettimeout() == module.SILENT_SECONDS
        answer.response.read()
        connections.finish(answer)


def test_silent_server_is_an_error_after_the_time_limit(folder, connections, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.05)
    with serve(folder, latency=0.5) as server, pytest.raises(TimeoutError):
        get(connections, f"{server.url}/a")
    assert connections.traffic.connections == 0
