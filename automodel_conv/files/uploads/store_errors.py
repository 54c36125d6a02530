"""Raise errors of the libraries that talk to stores, without credentials in their texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from automodel_conv.errors import ConversionError, DestinationError, WriteError, message
from automodel_conv.files.remote.urls import without_secrets


def code_of(error: BaseException) -> str:
    """Return the code by which S3 names an error, as in "NoSuchUpload"; empty if there is none."""
    response = getattr(error.__cause__ or error, "response", None)
    details = response.get("Error", {}) if isinstance(response, dict) else {}
    return str(details.get("Code", ""))


@contextmanager
def store_errors(where: str, secrets: Collection[str], what: str = "cannot write to a store") -> Iterator[None]:
    """Raise errors of the libraries in a block as a WriteError.

    Args:
        where: URL without credentials.
        secrets: credentials that must not be in the text.
        what: what went wrong.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # each library has errors of its own
        found = without_secrets(text_of(error), secrets)
        # The text of the library's error may contain credentials, so no traceback must show it.
        raise WriteError(message(what, where=where, found=found, do=_advice(error))) from None


def text_of(error: BaseException) -> str:
    """Return the text of an error in one line, after the code or the class by which it is known."""
    code = code_of(error)
    text = (code and getattr(error, "strerror", None)) or str(error)
    return f"{code or type(error).__name__}: {' '.join(text.split())}"


def _advice(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if code_of(error) in ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed"):
        return "renew the credentials, then repeat the call"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "check the credentials, and that they may write, list and abort uploads"
    if type(error).__name__ == "RevisionNotFoundError":
        return "create the branch first: hf repo branch create ORG/NAME BRANCH"
    if isinstance(error, FileNotFoundError):
        return "check the name of the bucket, which must exist"
    return "check the URL, the network and the access rights, then repeat the call"


def occupied_by_other(where: str, name: str) -> DestinationError:
    """Return the error for a file that another process has written in the meantime."""
    return DestinationError(
        message(
            "another process writes to this place",
            where=where,
            found=f"{name}, which this call has not written",
            do="choose another destination, or remove its files first",
        )
    )
