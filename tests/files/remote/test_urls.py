"""Tests of URLs: what is one, how it is taken apart and escaped, and texts without credentials."""

from __future__ import annotations

import os

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.files.remote.connections import WebError
from automodel_conv.files.remote.urls import (
    is_url,
    joined,
    local_path,
    protocol_of,
    quoted,
    refuse_url,
    split_web_url,
    text_of,
    without_secrets,
)


@pytest.mark.parametrize("path", ["http://h", "S3://bucket/a", "hf://org/name", "gs://b", "x+y.z-1://", "memory:///a"])
def test_protocol_and_two_slashes_make_a_url(path):
    assert is_url(path)
    assert protocol_of(path) == path.partition(":")[0].lower()


@pytest.mark.parametrize("path", ["org/name", "/a/b", "C:\\a", "http:/h", "a b://c", "://a", "3a://b", "", "./s3://x"])
def test_other_paths_are_no_urls(path):
    assert not is_url(path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@h/a", "https://h/a"),
        ("https://token@h/a?x=1", "https://h/a"),
        ("https://h/a?X-Amz-Signature=s and more", "https://h/a and more"),
        ("two: https://u:p@h/a?q http://v:w@i/b?r", "two: https://h/a http://i/b"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("why? because", "why? because"),
        ("nothing", "nothing"),
    ],
)
def test_texts_are_shown_without_user_password_and_query(text, shown):
    assert without_secrets(text) == shown


def test_text_of_an_error_is_its_cause_in_one_line_without_credentials():
    cause = OSError("first\n second https://u:hidden@h/a?hidden")
    error = ValueError("outer")
    error.__cause__ = cause
    assert text_of(error) == "OSError: first second https://h/a"
    assert text_of(ValueError()) == "ValueError"


def test_text_of_an_error_of_this_package_has_no_class_name():
    assert text_of(WebError("404 Not Found", 404)) == "404 Not Found"
    assert text_of(WebError("")) == "WebError"


def test_paths_on_this_machine_are_absolute_and_urls_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert local_path("a") == str(tmp_path / "a")
    assert local_path("~") == os.path.expanduser("~")
    with pytest.raises(UnsupportedError, match=r"(?s)where: +https://h/a\n.*upload") as error:
        local_path("https://u:hidden@h/a?hidden")
    assert "hidden" not in str(error.value)
    refuse_url("a/b", [])


@pytest.mark.parametrize(
    ("url", "path", "query"),
    [
        ("http://h/a b", "/a%20b", ""),
        ("http://h/a%20b", "/a%20b", ""),
        ("http://h/ü/日", "/%C3%BC/%E6%97%A5", ""),
        ("http://h/a+b&c=d;e,f~(g)*'!$@:", "/a+b&c=d;e,f~(g)*'!$@:", ""),
        ('http://h/a"<>b', "/a%22%3C%3Eb", ""),
        ("http://h/a?x=1&y=%2F+a/b?c", "/a", "x=1&y=%2F+a/b?c"),
        ("http://h/a?x=a b&y=ü", "/a", "x=a%20b&y=%C3%BC"),
        ("http://h", "", ""),
    ],
)
def test_characters_that_a_request_cannot_have_are_escaped_once(url, path, query):
    parts = split_web_url(url)
    assert (parts.path, parts.query) == (path, query)
    assert split_web_url(parts.geturl()) == parts
    parts.path.encode("ascii")


@pytest.mark.parametrize("url", ["http://[::1]:8000/a", "https://u:p@[fe80::1]/a", "http://münchen.example:80/"])
def test_hosts_of_all_kinds_are_valid(url):
    assert split_web_url(url).hostname in ("::1", "fe80::1", "münchen.example")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/a",
        "s3://h/a",
        "http:///a",
        "http://h:0/a",
        "http://h:99999/a",
        "http://user:hidden/5@h/a",
        "http://[::1/a",
        "http://a..b/a",
        f"http://{'a' * 64}.com/a",
        "/a",
        "",
    ],
)
def test_url_without_a_valid_host_and_port_is_refused_without_a_part_of_it(url):
    with pytest.raises(ValueError, match="with a host and a port") as error:
        split_web_url(url)
    assert "hidden" not in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "path"),
    [("a b", "a%20b"), ("a%20b", "a%2520b"), ("a#b?c", "a%23b%3Fc"), ("d/ü", "d/%C3%BC"), ("a+b@c", "a+b%40c")],
)
def test_name_of_a_file_is_escaped_whatever_it_has(name, path):
    assert quoted(name) == path
    assert split_web_url(f"http://h/{path}").path == f"/{path}"


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/x", "http://h:1/x"),
        ("x", "http://h:1/a/x"),
        ("?q=1", "http://h:1/a/b?q=1"),
        ("//i/x", "http://i/x"),
        ("https://i/x%20y?z=%2F#f", "https://i/x%20y?z=%2F#f"),
        ("http://[::1]:2/x", "http://[::1]:2/x"),
        ("/p q", "http://h:1/p%20q"),
        ("/ü".encode().decode("latin-1"), "http://h:1/%C3%BC"),
        ("/ü", "http://h:1/%FC"),
    ],
)
def test_location_is_joined_to_the_url_that_was_asked(location, url):
    assert joined("http://h:1/a/b?c", location) == url


def test_location_that_is_no_url_is_a_value_error():
    with pytest.raises(ValueError, match="IPv6"):
        joined("http://h/a", "http://[bad")
