"""What a file is that stands in the place of a checkpoint's file: a pointer to it, or what a server sent instead."""

from __future__ import annotations

from typing import NamedTuple

SNIFFED_BYTES = 512


class Lookalike(NamedTuple):
    """What a file looks like, and what to do about it."""

    what: str
    do: str


_PAGE = "download the file itself; the address was that of a page, or wanted a login"
_WEIGHTS = "convert these weights to safetensors with the library that wrote them"
# By the first bytes. Sources: git-lfs 3.7, docs/spec.md; xet-core, pointer_file.rs.
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
    """What a file is that begins with ``start`` and is not what its name says; None if that cannot be told.

    The length that a safetensors file begins with may have the bytes of any of these; a JSON object follows it.
    """
    if start[8:9] == b"{" and start[7] == 0:
        return None
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            return what
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return Lookalike("a page of HTML or XML", _PAGE)
    try:
        said = text.decode("utf-8", "strict" if len(start) < SNIFFED_BYTES else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if not said or not said.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    kind = "JSON" if said[0] in "{[" else "text"
    line = " ".join(said.split())
    return Lookalike(f"{kind}: {line[:80]}{'...' if len(line) > 80 else ''}", _PAGE)
