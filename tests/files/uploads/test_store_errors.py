"""Tests of errors of stores: their advice, and that they contain no credentials."""

from __future__ import annotations

import traceback

import pytest

from automodel_conv.errors import DestinationError, WriteError
from automodel_conv.files.remote.urls import secrets_of, without_secrets
from automodel_conv.files.uploads.store_errors import code_of, occupied_by_other, store_errors
from tests.stores import client_error

OPTIONS = {
    "key": "AKIA-1234",
    "secret": "very/secret",
    "endpoint_url": "http://127.0.0.1:1",
    "client_kwargs": {"aws_session_token": "session-token", "region_name": "us-east-1"},
    "anon": False,
}


def test_credentials_are_found_in_all_mappings_and_nothing_else():
    assert secrets_of(OPTIONS) == ("session-token", "very/secret", "AKIA-1234")
    assert secrets_of({"key": "k"}, "hf_token") == ("hf_token",)
    assert secrets_of(None, True) == ()


def test_users_queries_and_credentials_are_removed():
    text = "GET s3://user:pass@bucket/a?X-Amz-Signature=1 of AKIA-1234: very/secret"
    assert without_secrets(text, secrets_of(OPTIONS)) == "GET s3://bucket/a of ...: ..."


def test_error_of_a_library_is_a_write_error_without_a_trace_of_it():
    with pytest.raises(WriteError) as caught, store_errors("s3://bucket/a", secrets_of(OPTIONS)):
        raise RuntimeError("no very/secret\nat http://host/?token=abc")
    printed = "".join(traceback.format_exception(caught.value))
    assert "where:    s3://bucket/a\n" in printed
    assert "found:    RuntimeError: no ... at http://host/" in printed
    assert "very/secret" not in printed
    assert "abc" not in printed


def test_error_of_this_package_stays():
    with pytest.raises(DestinationError, match="index"), store_errors("s3://bucket", ()):
        raise occupied_by_other("s3://bucket", "the index")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("AccessDenied", "check the credentials"),
        ("InvalidAccessKeyId", "check the credentials"),
        ("ExpiredToken", "renew the credentials"),
        ("NoSuchBucket", "check the name of the bucket"),
        ("InternalError", "check the URL, the network"),
    ],
)
def test_advice_fits_the_code(code, advice):
    pytest.importorskip("s3fs")
    error = client_error(code, "refused by the store")
    assert code_of(error) == code
    text = rf"(?s)found: +{code}: refused by the store\n  do: +{advice}"
    with pytest.raises(WriteError, match=text), store_errors("u", ()):
        raise error


def test_error_without_an_answer_has_no_code():
    assert code_of(OSError("x")) == ""
