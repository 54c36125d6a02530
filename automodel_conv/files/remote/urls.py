"""URLs of checkpoints: which paths are URLs, and texts about them without credentials."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from automodel_conv.errors import Advice, UnsupportedError, message
from automodel_conv.files.paths import text_of_path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRETS = re.compile(r"(?<=://)[^\s/]*@|\?\S+")
_SECRET_NAME = re.compile("key|secret|token|password|credential|auth", re.IGNORECASE)
_SHORTEST_SECRET = 4
"""Shorter ones are parts of ordinary words."""
# Characters that a path, or a query, has as they are. Source: RFC 3986, section 3.3; "%" begins those that are escaped.
_PLAIN = "/%:@!$&'()*+,;=~"


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(path) is not None


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in small letters."""
    return url.partition("://")[0].lower()


def refuse_url(path: str | os.PathLike[str], do: Sequence[Advice]) -> None:
    """Raise UnsupportedError, with advice, if a path is a URL."""
    path = text_of_path(path)
    if is_url(path):
        text = "a URL, where only a path on this machine is supported"
        raise UnsupportedError(message(text, where=without_secrets(path), do=do))


def local_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute form of the path of a directory that would be written.

    Raises:
        UnsupportedError: the path is a URL.
    """
    refuse_url(path, ["write to a local directory, then upload it"])
    return os.path.abspath(os.path.expanduser(text_of_path(path)))


def without_secrets(text: str, secrets: Collection[str] = ()) -> str:
    """Return a text without these secrets, and without users, passwords and queries of URLs; a query may sign."""
    for secret in secrets:
        text = text.replace(secret, "...")
    return _SECRETS.sub("", text)


def secrets_of(options: Mapping[str, Any] | None, token: object = None) -> tuple[str, ...]:
    """Return the credentials among the options of a store, the longest first.

    Args:
        options: options of fsspec's file system; options in mappings of its libraries are found too.
        token: token of the Hub, or whether to use the stored one.
    """
    found = [token] if isinstance(token, str) else []
    for name, value in (options or {}).items():
        if isinstance(value, Mapping):
            found += secrets_of(value)
        elif isinstance(value, str) and _SECRET_NAME.search(str(name)):
            found.append(value)
    return tuple(sorted((one for one in found if len(one) >= _SHORTEST_SECRET), key=len, reverse=True))


def text_of(error: BaseException, secrets: Collection[str] = ()) -> str:
    """Return the text of an error, or of its cause, in one line without credentials.

    The name of its class comes first, unless it is a class of this package.
    """
    error = error.__cause__ or error
    text, name = " ".join(str(error).split()), type(error).__name__
    is_own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return without_secrets(text if is_own and text else f"{name}: {text}" if text else name, secrets)


def split_web_url(url: str) -> SplitResult:
    """Return the parts of an ``http`` or ``https`` URL; characters that a request cannot have are escaped.

    Raises:
        ValueError: the URL has no valid host, or its port is not a number.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:  # its text may have a part of a password
        is_valid = False
    if not is_valid:
        text = "not http:// or https:// with a host and a port; / ? # @ in a password are written as %2F %3F %23 %40"
        raise ValueError(text)
    return parts._replace(path=quote(parts.path, _PLAIN), query=quote(parts.query, _PLAIN + "?"))


def quoted(name: str) -> str:
    """Return the relative path of a file as the path of a URL has it."""
    return quote(name, "/!$&'()*+,;=~")


def joined(url: str, location: str) -> str:
    """Return the URL of a ``Location`` header, whose bytes are given as latin-1.

    Raises:
        ValueError: it is no URL.
    """
    return urljoin(url, quote(location, _PLAIN + "?#[]", encoding="latin-1"))
