"""Tests of redirects: which are followed, and who sees credentials."""

from __future__ import annotations

import pytest

from automodel_conv.files.remote import connections as connections_module
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.requests import (
    Address,
    WebError,
    request_range,
)
from tests.files.remote.scripted import only, scripted
from tests.loopback_faults import (
    ELSEWHERE,
    LOOP,
    Faults,
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


def test_another_host_sees_no_credentials(folder, connections):
    headers = SECRETS | {"User-Agent": "mine"}
    with serve(folder, authorization="Bearer hidden", faults=Faults([ELSEWHERE])) as server:
        body = request_range(connections, Address(f"{server.url}/a?token=hidden", headers), 0, 10)
        assert body.answer.response.read() == CONTENT[:10]
        connections.finish(body.answer)
        first, second = server.requests
        assert (first.host, second.host) == ("127.0.0.1", "localhost")
        assert "hidden" in str(first.headers)
        assert "hidden" not in str(second.headers)
        assert second.headers["user-agent"] == "mine"
        assert second.range == "bytes=0-9"
    assert "hidden" not in str(body.address.headers)


def test_another_port_sees_no_credentials(folder, connections):
    with serve(folder) as other:
        redirect = lambda asked, answer: Answer(307, {"Location": f"{other.url}/a"})  # noqa: E731
        with scripted(folder, redirect) as server:
            url = f"{server.url}/a".replace("://", "://user:hidden@")
            assert read(connections, url, headers={"X-Api-Key": "hidden"})[0] == CONTENT
            assert server.requests[0].has_credentials
        assert "hidden" not in str(other.requests[0].headers)
        assert not other.requests[0].has_credentials


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_same_host_sees_the_credentials_again(folder, connections, status):
    def moved(asked, answer):
        return answer if "moved" in asked.query else Answer(status, {"Location": f"{asked.path}?moved=1"})

    with scripted(folder, moved) as server:
        assert read(connections, f"{server.url}/a", headers=SECRETS)[0] == CONTENT
        assert read(connections, f"{server.url}/a".replace("://", "://user:pass@"))[0] == CONTENT
        assert all(one.has_credentials for one in server.requests)
        assert len(server.requests) == 4


def test_location_with_characters_that_must_be_escaped_is_followed(folder, connections):
    (folder / "ü b#c").write_bytes(b"moved")
    location = "/%C3%BC b%23c".replace("%C3%BC", "ü".encode().decode("latin-1"))
    moved = only("/a", lambda asked, answer: Answer(302, {"Location": location}))
    with scripted(folder, moved) as server:
        assert read(connections, f"{server.url}/a", 0, 5)[0] == b"moved"


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (None, "without an address"),
        ("ftp://hidden/a", "not to the URL of a web server"),
        ("file:///etc/passwd", "not to the URL of a web server"),
        ("http://[hidden", "not to the URL of a web server"),
        ("http://a..b/", "not to the URL of a web server"),
        ("http://h:hidden/", "not to the URL of a web server"),
    ],
)
def test_redirects_to_nowhere_are_final(folder, connections, location, text):
    headers = {} if location is None else {"Location": location}
    with scripted(folder, lambda asked, answer: Answer(302, headers)) as server:
        with pytest.raises(WebError, match=f"302: a redirect.*{text}") as error:
            read(connections, f"{server.url}/a")
    assert "hidden" not in str(error.value)


def test_redirect_from_https_to_http_is_refused(folder, connections, monkeypatch):
    down = lambda asked, answer: Answer(302, {"Location": "http://user:hidden@127.0.0.1:1/a?hidden"})  # noqa: E731
    connections_module._tls.cache_clear()
    try:
        with scripted(folder, down, tls=True) as server:
            monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
            with pytest.raises(WebError, match=r"from https to http, to http://127.0.0.1:1/a$"):
                read(connections, f"{server.url}/a")
    finally:
        connections_module._tls.cache_clear()


def test_redirects_without_end_are_final(folder, connections):
    with serve(folder, faults=Faults([LOOP])) as server:
        with pytest.raises(WebError, match="more than 5 redirects"):
            read(connections, f"{server.url}/a")
        assert len(server.requests) == 6


def test_token_with_a_line_break_is_final_and_not_shown(folder, connections):
    with serve(folder) as server, pytest.raises(WebError, match="line break") as error:
        read(connections, f"{server.url}/a", headers={"Authorization": "Bearer hidden\n"})
    assert "hidden" not in str(error.value)
    assert error.value.__suppress_context__


def test_redirected_address_is_returned_for_later_requests(folder, connections):
    with serve(folder, faults=Faults([ELSEWHERE])) as server:
        body = request_range(connections, Address(f"{server.url}/a", {}), 0, 1)
        body.answer.response.read()
        connections.finish(body.answer)
        assert body.address.url.startswith(server.elsewhere)
        assert len(server.requests) == 2
