"""The errors of this package: one base, one class per kind of trouble.

Every message answers five questions, in this order and only where they apply: what went wrong, where (file, tensor,
rule), what was expected, what was found, what to do. ``message`` builds that text, so all errors read alike.

What to do may need an argument of the function that was called, and the code that finds the trouble does not know which
function that is. It writes the argument in braces, as in ``{strict=False} loads what fits``; ``doors.py`` keeps of the
advice what the caller can follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

# What moves a terminal's cursor, turns the direction of text or cannot be encoded: C0 but tab and line feed, C1,
# separators and directions of Unicode, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 2000
# An argument, maybe with its value, or the call of another function.
_IN_BRACES = re.compile(r"\{(\w[^{}]*)\}")

Words = Callable[[str], str | None]
"""How a door says what an advice has in braces; None if it has no such argument."""
Advice = str | tuple[str, ...]
"""One advice. A tuple holds several wordings of it: a door takes the first that it can say."""


class Message(str):
    """An error text that still knows its advice."""

    what: str
    do: tuple[Advice, ...]

    def __new__(cls, what: str, do: Sequence[Advice] = (), words: Words = str) -> Message:
        """The text for a door, with the advice that it can say, and no other; with all of it if no words are given."""
        kept = tuple(filter(None, (tuple(text for text in _either(each) if _said(text, words)) for each in do)))
        lines = [what]
        if kept:
            lines.append(f"  do:       {'; '.join(_said(each[0], words) or '' for each in kept)}")
        made = super().__new__(cls, "\n".join(lines))
        made.what, made.do = what, kept
        return made


def _either(advice: Advice) -> tuple[str, ...]:
    return (advice,) if isinstance(advice, str) else advice


def _said(text: str, words: Words) -> str | None:
    spelled = {found: words(found) for found in _IN_BRACES.findall(text)}
    if None in spelled.values():
        return None
    return _IN_BRACES.sub(lambda match: spelled[match[1]] or "", text)


class ConversionError(ValueError):
    """Base class of every error this package raises on purpose.

    Its text may go to a terminal or a log though names in it come from strangers: what cannot be printed is escaped,
    and long lines are cut.
    """

    def __init__(self, text: str = ""):
        self._message = text if isinstance(text, Message) else Message(text)
        super().__init__(_printable(text))

    def say(self, words: Words) -> None:
        """Keep the advice that a door can say, in its words."""
        self._become(Message(self._message.what, self._message.do, words))

    def add(self, text: str) -> None:
        """Add lines to what has been found."""
        self._become(Message(f"{self._message.what}\n{text}", self._message.do))

    def _become(self, text: Message) -> None:
        self._message = text
        self.args = (_printable(text), *self.args[1:])

    def reason(self) -> str:
        """The text for somebody who has called another function, with the advice that needs no argument."""
        return _printable(Message(self._message.what, self._message.do, lambda argument: None))


def _printable(text: str) -> str:
    lines = [f"{line[:_LONGEST_LINE]}..." if len(line) > _LONGEST_LINE else line for line in text.split("\n")]
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], "\n".join(lines))


class CheckpointError(ConversionError):
    """A checkpoint file or index is missing, malformed, truncated, or contradicts itself."""


class NameProblems(ConversionError):
    """Checkpoint names and model names do not fit together; carries *all* the problems found, not the first.

    Attributes:
        missing: targets that nothing in the checkpoint provides.
        unexpected: sources that no target takes.
        mismatched: ``(target, found shape, expected shape)``.
        duplicated: ``(target, sources)`` where more than one source claims the same target.
        incomplete: ``(target, missing sources)``: a merged target with some of its parts absent.
    """

    def __init__(
        self,
        text: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        duplicated: Iterable[tuple[str, tuple[str, ...]]] = (),
        incomplete: Iterable[tuple[str, tuple[str, ...]]] = (),
    ):
        super().__init__(text)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.duplicated = tuple(duplicated)
        self.incomplete = tuple(incomplete)


class CoverageError(ConversionError):
    """A plan would leave a destination element unwritten, or write it more than once."""


class UnsupportedError(ConversionError):
    """An operation, layout, dtype or file format that this package does not convert."""


class QuantizationError(ConversionError):
    """A quantized tensor lacks a part, or parts that do not fit each other, or what the config says of them."""


class UnknownTarget(ConversionError, KeyError):
    """A plan was asked about a target that it does not have."""

    __str__ = Exception.__str__  # KeyError's would quote the text


class ReadError(ConversionError):
    """Reading tensor data failed after a plan was made; names the targets already filled, if any."""


class WriteError(ConversionError):
    """Writing a checkpoint failed; no loader takes what lies in the directory for complete."""


class DestinationError(ConversionError):
    """A directory cannot become a checkpoint: it is one already, somebody else writes to it, or it holds other work."""


class RankError(ConversionError):
    """What several ranks do together failed on others of them, or one of them is gone."""


class VerificationError(ConversionError):
    """Two checkpoints that should hold the same tensors do not; names the first difference."""


def message(
    what: str,
    *,
    where: str | None = None,
    expected: object = None,
    found: object = None,
    do: Advice | Sequence[Advice] | None = None,
) -> Message:
    """One error text: what, where, expected, found, what to do.

    Args:
        do: one advice or several; ``{argument}`` or ``{argument=value}`` in it stands for an argument of the function
            that was called, and an advice is left out where that has no such argument, or has that value already.
    """
    lines = [what]
    if where is not None:
        lines.append(f"  where:    {where}")
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if found is not None:
        lines.append(f"  found:    {found}")
    return Message("\n".join(lines), [] if do is None else [do] if isinstance(do, str) else list(do))


def listing(items: Iterable[object], limit: int = 20) -> str:
    """The first ``limit`` items, one a line, and how many more there are."""
    lines = [f"    {item}" for item in items]
    shown, more = lines[:limit], len(lines) - limit
    if more > 0:
        shown.append(f"    ... and {more} more")
    return "\n".join(shown)


def kind_of(thing: object) -> str:
    """The kind of thing that a caller has given: a class, or an object of one."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
