"""Errors as ``--json`` prints them."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import msgspec

from automodel_conv.cli.results.loads import Claims, Mismatch
from automodel_conv.errors import (
    DOCUMENTATION,
    ConversionError,
    Message,
    NameProblems,
    address_of,
    class_name_of,
    message_of,
)


class Names(msgspec.Struct, frozen=True):
    """All names that do not fit: the attributes of a ``NameProblems``."""

    missing: tuple[str, ...]
    """Names of targets that no tensor of the checkpoint provides."""
    unexpected: tuple[str, ...]
    """Names of sources that no target uses."""
    mismatched: tuple[Mismatch, ...]
    """Targets whose shapes differ."""
    duplicated: tuple[Claims, ...]
    """Targets that more than one source claims."""
    incomplete: tuple[Claims, ...]
    """Merged targets that lack some of their parts, with the missing sources."""


class Failure(msgspec.Struct, frozen=True):
    """Why a command failed."""

    type: str
    """Class of the error, such as `CheckpointError`; `UsageError` for wrong arguments, `Interrupted` after Ctrl-C."""
    what: str
    """What went wrong."""
    where: str | None
    """File, tensor or rule."""
    expected: str | None
    """The value or state that was expected."""
    found: str | None
    """The value or state that was found instead."""
    notes: tuple[str, ...]
    """Further facts, such as the tensors that were complete already."""
    do: tuple[str, ...]
    """What to do; each text is a way of its own."""
    names: Names | None
    """All names that do not fit, if `type` is `NameProblems`; else null."""
    help: str
    """Address of the documentation."""
    text: str
    """The text that is printed to stderr."""


def failure_of(error: ConversionError) -> Failure:
    """Return an error of this package as JSON shows it."""
    message = message_of(error)
    return Failure(
        type=class_name_of(error),
        **_parts(message),
        do=message.advice,
        names=_names(error) if isinstance(error, NameProblems) else None,
        help=address_of(error),
        text=str(error),
    )


def usage_failure(message: Message, text: str) -> Failure:
    """Return an error in the arguments of a command, with its whole text."""
    return _of_message("UsageError", message, text)


def interruption() -> Failure:
    """Return the end of a command by Ctrl-C."""
    text = "interrupted"
    return _of_message("Interrupted", Message(text), text)


def _of_message(kind: str, message: Message, text: str) -> Failure:
    address = f"{DOCUMENTATION}cli-json/#exit-codes"
    return Failure(kind, **_parts(message), do=message.advice, names=None, help=address, text=text)


def _parts(message: Message) -> dict[str, Any]:
    """Return the parts of a text, those of several lines without the indent that they have in it."""
    parts = message.parts
    found = None if parts.found is None else _without_indent(parts.found)
    return parts._replace(found=found, notes=tuple(map(_without_indent, parts.notes)))._asdict()


def _without_indent(text: str) -> str:
    return dedent(text.lstrip("\n"))


def _names(error: NameProblems) -> Names:
    return Names(
        missing=error.missing,
        unexpected=error.unexpected,
        mismatched=tuple(Mismatch(*mismatch) for mismatch in error.mismatched),
        duplicated=tuple(Claims(*claims) for claims in error.duplicated),
        incomplete=tuple(Claims(*claims) for claims in error.incomplete),
    )
