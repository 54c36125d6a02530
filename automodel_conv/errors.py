"""The errors of this package: one base, one class per kind of trouble.

Every message answers five questions, in this order and only where they apply: what went wrong, where (file, tensor,
rule), what was expected, what was found, what to do. ``message`` builds that text, so all errors read alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What moves a terminal's cursor, turns the direction of text or cannot be encoded: C0 but tab and line feed, C1,
# separators and directions of Unicode, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 2000
# What Python and torch say, in errors that have no class of their own.
_EXHAUSTED = re.compile("can't start new thread|DefaultCPUAllocator|std::bad_alloc")


class ConversionError(ValueError):
    """Base class of every error this package raises on purpose.

    Its text may go to a terminal or a log though names in it come from strangers: what cannot be printed is escaped,
    and long lines are cut.
    """

    def __init__(self, text: str = ""):
        lines = [f"{line[:_LONGEST_LINE]}..." if len(line) > _LONGEST_LINE else line for line in text.split("\n")]
        super().__init__(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], "\n".join(lines)))


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
    do: str | None = None,
) -> str:
    """One error text: what, where, expected, found, what to do."""
    lines = [what]
    if where is not None:
        lines.append(f"  where:    {where}")
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if found is not None:
        lines.append(f"  found:    {found}")
    if do is not None:
        lines.append(f"  do:       {do}")
    return "\n".join(lines)


@contextmanager
def resources_told(doing: str) -> Iterator[None]:
    """Memory and threads that the system does not give are a ConversionError; a decorator too.

    What a device lacks, and pinned memory, stays torch's own error, which callers know how to meet.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _EXHAUSTED.search(str(error)):
            raise
        found = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        do = "free memory, raise the limits of this process (ulimit -a), or pass less for threads= and scratch_bytes="
        text = message(f"{doing} needs more memory or threads than the system gives", do=do, found=found)
        raise ConversionError(text) from error


def listing(items: Iterable[object], limit: int = 20) -> str:
    """The first ``limit`` items, one a line, and how many more there are."""
    lines = [f"    {item}" for item in items]
    shown, more = lines[:limit], len(lines) - limit
    if more > 0:
        shown.append(f"    ... and {more} more")
    return "\n".join(shown)
