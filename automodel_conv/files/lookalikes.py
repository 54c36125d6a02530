"""Recognize files that are mistaken for a checkpoint's file: pointers to it, other formats, or pages from a server."""

from __future__ import annotations

from typing import NamedTuple

SNIFFED_BYTES = 512


class Lookalike(NamedTuple):
    """A format that a file was recognized as."""

    what: str
    """Description of the format, with its article."""
    do: str
    """Advice on how to get the weights."""


_PAGE = "download the file itself: the address led to a web page, or required a login"
_WEIGHTS = "convert these weights to safetensors with the library that wrote them"
# Formats by their first bytes. Sources: git-lfs 3.7, docs/spec.md; xet-core, pointer_file.rs.
_BEGINNINGS = (
    (
        b"version https://git-lfs.github.com/spec/",
        Lookalike("a Git-LFS pointer", "fetch what it points to: run git lfs pull in the repository"),
    ),
    (
        b"# xet version",
        Lookalike("an Xet pointer", "fetch what it points to: run git xet materialize on it"),
    ),
    (b"PK\x03\x04", Lookalike("a zip archive, as torch.save writes it", _WEIGHTS)),
    (b"GGUF", Lookalike("a GGUF file", _WEIGHTS)),
    (b"\x80\x02", Lookalike("a pickle", _WEIGHTS)),
    (b"\x1f\x8b", Lookalike("a gzip archive", "unpack it")),
)


def lookalike(start: bytes) -> Lookalike | None:
    """Return the format of a file that begins with ``start``; None if it is unknown or may be safetensors.

    A safetensors file begins with a length, which may equal the first bytes of any of these formats. It is recognized
    by the JSON object that follows.
    """
    if start[8:9] == b"{" and start[7] == 0:
        return None
    for beginning, other in _BEGINNINGS:
        if start.startswith(beginning):
            return other
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return Lookalike("a page of HTML or XML", _PAGE)
    try:
        content = text.decode("utf-8", "strict" if len(start) < SNIFFED_BYTES else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if not content or not content.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    kind = "JSON" if content[0] in "{[" else "text"
    line = " ".join(content.split())
    return Lookalike(f"{kind}: {line[:80]}{'...' if len(line) > 80 else ''}", _PAGE)
