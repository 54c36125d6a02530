"""Tests of the bodies of requests: lengths, chunks, signed chunks, and bodies that wait to be asked for."""

from __future__ import annotations

import io

import pytest

from tests.loopback_bodies import PART, Body

SIGNED = {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"}
CHUNKS = b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
SIGNED_CHUNKS = (
    b"5;chunk-signature=ab\r\nhello\r\n1;chunk-signature=cd\r\n!\r\n0;chunk-signature=ef\r\nx-amz-crc:1\r\n\r\n"
)


def outer(content):
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)


@pytest.mark.parametrize(
    ("headers", "sent", "content"),
    [
        ({}, b"", b""),
        ({"content-length": "0"}, b"", b""),
        ({"content-length": "6"}, b"hello!", b"hello!"),
        ({"content-length": str(3 * PART + 1)}, b"x" * (3 * PART + 1), b"x" * (3 * PART + 1)),
        ({"transfer-encoding": "chunked"}, CHUNKS, b"hello!"),
        ({"content-length": str(len(SIGNED_CHUNKS)), **SIGNED}, SIGNED_CHUNKS, b"hello!"),
        ({"transfer-encoding": "chunked", **SIGNED}, outer(SIGNED_CHUNKS), b"hello!"),
    ],
    ids=["none", "empty", "length", "parts", "chunks", "signed", "signed in chunks"],
)
def test_body_ends_where_its_framing_says(headers, sent, content, tmp_path):
    for save in (False, True):
        reader, paced = io.BytesIO(sent + b"GET /next"), []
        body = Body(reader, headers, lambda: pytest.fail("nobody waits"), paced.append)
        if save:
            assert body.save(tmp_path / "body") == len(content)
        assert ((tmp_path / "body").read_bytes() if save else body.read()) == content
        assert body.received == sum(paced) == len(content)
        assert body.drain()
        assert reader.read() == b"GET /next"


def test_short_body_is_an_error():
    body = Body(io.BytesIO(b"hello"), {"content-length": "6"}, lambda: None, lambda nbytes: None)
    with pytest.raises(ConnectionError):
        body.read()


def test_body_that_waits_is_asked_for_once():
    asked = []
    headers = {"content-length": "5", "expect": "100-continue"}
    body = Body(io.BytesIO(b"hello"), headers, lambda: asked.append(1), lambda nbytes: None)
    assert not body.drain()
    assert not asked
    assert body.read() == b"hello"
    assert body.drain()
    assert asked == [1]
