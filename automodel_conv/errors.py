"""The errors of this package: one base class, and one class for each kind of problem.

A message answers up to five questions, in this order: what went wrong, where (file, tensor, rule), what was expected,
what was found, and what to do. ``message`` builds that text, so all errors have the same form. When an error is
printed, a last line has the address of its class in the documentation.

Advice may name an argument of the function that the caller called, which the code that raises does not know. It writes
the argument in braces, as in ``{strict=False} loads what fits``, and ``doors.py`` keeps only advice that the caller can
follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

DOCUMENTATION = "https://automodel-conv.github.io/automodel_conv/"
"""Address of the documentation; pyproject.toml has it too."""
_ENTRIES = f"{DOCUMENTATION}errors/#"
# The last line of a printed error.
_HELP_LINE = re.compile(rf"\n? *help: +{re.escape(_ENTRIES)}\w*")

# Characters that move a terminal's cursor, change the direction of text or cannot be encoded: C0 except tab and line
# feed, C1, separators and directions of Unicode, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 2000
_NUMBER = re.compile(r"\d+")
_LIKE = 3  # listed items of those that differ only in their numbers
# An argument, maybe with its value, or the call of another function.
_IN_BRACES = re.compile(r"\{(\w[^{}]*)\}")

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")

Words = Callable[[str], str | None]
"""A function that spells the text in braces as the caller would write it, or returns None if it does not apply."""
Advice = str | tuple[str, ...]
"""One piece of advice. A tuple holds alternative wordings; the first that applies is used."""


class Parts(NamedTuple):
    """The parts of an error text that are not advice."""

    what: str
    """What went wrong; several lines if an error is reported with the one that caused it."""
    where: str | None = None
    """File, tensor or rule."""
    expected: str | None = None
    """The value or state that was expected."""
    found: str | None = None
    """The value or state that was found instead."""
    notes: tuple[str, ...] = ()
    """Texts that were added where the error passed."""


class Message(str):
    """An error text that keeps its advice, so that it can be spelled for the caller later."""

    what: str
    """The text without the advice."""
    do: tuple[Advice, ...]
    """The advice that applies, with its braces."""
    advice: tuple[str, ...]
    """The advice as it is spelled."""
    parts: Parts
    """The parts of ``what``."""

    def __new__(
        cls, what: str, do: Sequence[Advice] = (), words: Words = str, *, parts: Parts | None = None
    ) -> Message:
        """Build the text with the advice that applies.

        Args:
            what: the text without the advice. If it quotes printed errors, their last lines are left out.
            do: all advice.
            words: spells the text in braces. By default all advice applies as it is written.
            parts: the parts of ``what``. None: it has no parts.
        """
        what = _HELP_LINE.sub("", what)
        wordings = [tuple(text for text in _wordings(advice) if _spelled(text, words)) for advice in do]
        kept = tuple(filter(None, wordings))
        spelled = tuple(_spelled(first, words) or "" for first, *_ in kept)
        text = super().__new__(cls, "\n".join([what, *([f"  do:       {'; '.join(spelled)}"] if spelled else [])]))
        text.what, text.do, text.advice = what, kept, spelled
        text.parts = Parts(what) if parts is None else parts
        return text


def _wordings(advice: Advice) -> tuple[str, ...]:
    return (advice,) if isinstance(advice, str) else advice


def _spelled(text: str, words: Words) -> str | None:
    """Return advice with its braces spelled, or None if it does not apply."""
    spelled = {argument: words(argument) for argument in _IN_BRACES.findall(text)}
    if None in spelled.values():
        return None
    return _IN_BRACES.sub(lambda match: spelled[match[1]] or "", text)


class ConversionError(ValueError):
    """The base class of all errors that this package raises on purpose.

    Its text is safe to print in a terminal or a log, even if names of tensors come from untrusted files: characters
    that cannot be printed are escaped, and long lines are cut. ``str(error)`` ends with the address of its class in the
    documentation; ``error.args[0]`` is the text without that line.

    Example:
        >>> from automodel_conv import convert_state_dict
        >>> try:
        ...     convert_state_dict({})
        ... except ConversionError as error:
        ...     print(type(error).__name__, isinstance(error, ValueError))
        UnsupportedError True
    """

    def __init__(self, text: str = ""):
        self._message = text if isinstance(text, Message) else Message(text)
        super().__init__(printable(self._message))

    def __str__(self) -> str:
        # Not ``super().__str__()``: that of KeyError, a base of UnknownTarget, quotes the text.
        return f"{Exception.__str__(self)}\n  help:     {address_of(self)}"

    def say(self, words: Words) -> None:
        """Keep only the advice that the caller can follow, with arguments spelled by ``words``."""
        self._set_message(Message(self._message.what, self._message.do, words, parts=self._message.parts))

    def add(self, text: str) -> None:
        """Add lines before the advice."""
        parts = self._message.parts
        parts = parts._replace(notes=(*parts.notes, text))
        self._set_message(Message(f"{self._message.what}\n{text}", self._message.do, parts=parts))

    def _set_message(self, text: Message) -> None:
        self._message = text
        self.args = (printable(text), *self.args[1:])

    def reason(self) -> str:
        """Return the text for the caller of another function, with only the advice that names no argument."""
        return printable(Message(self._message.what, self._message.do, lambda argument: None))


def message_of(error: ConversionError) -> Message:
    """Return the text of an error with its parts, whole: lines are not cut, and no character is escaped."""
    return error._message


def class_name_of(error: ConversionError) -> str:
    """Return the name of the class of this module that an error is of; the documentation has an entry for each."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == __name__)


def address_of(error: ConversionError) -> str:
    """Return the address of the class of an error in the documentation."""
    return f"{_ENTRIES}{class_name_of(error).lower()}"


def printable(text: str) -> str:
    """Return text that is safe to print: lines are cut, and characters that cannot be printed are escaped."""
    lines = [f"{line[:_LONGEST_LINE]}..." if len(line) > _LONGEST_LINE else line for line in text.split("\n")]
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], "\n".join(lines))


class CheckpointError(ConversionError):
    """Raised if a checkpoint file or index is missing, malformed or truncated, or contradicts itself.

    Example:
        >>> from automodel_conv import open_checkpoint
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:  # doctest: +ELLIPSIS
        ...     open_checkpoint(directory)
        Traceback (most recent call last):
            ...
        automodel_conv.errors.CheckpointError: ...
    """


class NameProblems(ConversionError):
    """Raised if names or shapes of a checkpoint and a model do not fit; lists *all* problems, not only the first.

    Attributes:
        missing: names of targets that no tensor of the checkpoint provides.
        unexpected: names of sources that no target uses.
        mismatched: ``(target, shape in the checkpoint, shape in the model)`` for each target whose shapes differ.
        duplicated: ``(target, sources)`` for each target that more than one source claims.
        incomplete: ``(target, missing sources)`` for each merged target that lacks some of its parts.

    Example:
        >>> import torch
        >>> from automodel_conv import convert_state_dict
        >>> try:
        ...     convert_state_dict({"weight": torch.ones(2, 3), "gain": torch.ones(2)}, torch.nn.Linear(3, 2))
        ... except NameProblems as error:
        ...     print(error.missing, error.unexpected)
        ('bias',) ('gain',)
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
    """Raised if elements of a tensor would be left unwritten, or be written more than once.

    Example:
        The router has four experts, and the tensors have two:

        >>> import torch
        >>> from automodel_conv import get_checkpoint_conversion_mapping, save_checkpoint
        >>> from tempfile import TemporaryDirectory
        >>> layer = "model.layers.0.mlp"
        >>> tensors = {f"{layer}.gate.weight": torch.ones(4, 6), f"{layer}.experts.down_proj": torch.ones(2, 6, 2)}
        >>> with TemporaryDirectory() as directory:  # doctest: +ELLIPSIS
        ...     save_checkpoint(tensors, directory, rules=get_checkpoint_conversion_mapping("qwen3_moe"))
        Traceback (most recent call last):
            ...
        automodel_conv.errors.CoverageError: ...
    """


class UnsupportedError(ConversionError):
    """Raised for an operation, layout, dtype, device, model or file format that this package does not support.

    Example:
        >>> from automodel_conv import convert_state_dict
        >>> convert_state_dict({}, layout="numo")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        automodel_conv.errors.UnsupportedError: unknown layout 'numo'...
    """


class QuantizationError(ConversionError):
    """Raised if a quantized tensor lacks a part, or its parts do not fit each other or the config.

    Example:
        The codes have no scales:

        >>> import json
        >>> import torch
        >>> from automodel_conv import compile_plan
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        >>> with TemporaryDirectory() as directory:  # doctest: +ELLIPSIS
        ...     save_file({"a.weight": torch.ones(2, 3).to(torch.float8_e4m3fn)}, f"{directory}/model.safetensors")
        ...     _ = Path(directory, "config.json").write_text(json.dumps(config))
        ...     compile_plan(directory, rules=[])
        Traceback (most recent call last):
            ...
        automodel_conv.errors.QuantizationError: ...
    """


class UnknownTarget(ConversionError, KeyError):
    """Raised for a target name that a plan does not have."""


class ReadError(ConversionError):
    """Raised if tensor data cannot be read or mapped; names the targets that are complete already, if any.

    Example:
        >>> from automodel_conv.files.source import LocalFile, opened
        >>> with opened(LocalFile("/no/such/file.safetensors")) as file:  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
            ...
        automodel_conv.errors.ReadError: ...
    """


class WriteError(ConversionError):
    """Raised if a checkpoint cannot be written; no loader accepts the unfinished directory as a checkpoint.

    Example:
        >>> import torch
        >>> from automodel_conv import save_checkpoint
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile() as file:  # doctest: +ELLIPSIS
        ...     save_checkpoint({"a": torch.ones(2)}, f"{file.name}/directory", rules=[])
        Traceback (most recent call last):
            ...
        automodel_conv.errors.WriteError: ...
    """


class DestinationError(ConversionError):
    """Raised if a directory already holds a checkpoint or other unfinished work, or another process writes to it.

    A conversion also raises it if its source has changed.

    Example:
        >>> import torch
        >>> from automodel_conv import save_checkpoint
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:  # doctest: +ELLIPSIS
        ...     report = save_checkpoint({"a": torch.ones(2)}, directory, rules=[])
        ...     report = save_checkpoint({"a": torch.ones(2)}, directory, rules=[])
        Traceback (most recent call last):
            ...
        automodel_conv.errors.DestinationError: ...
    """


class RankError(ConversionError):
    """Raised if a load or save by several ranks failed on another rank, or a rank no longer responds.

    Every rank raises an error: its own, or a RankError that quotes the errors of other ranks.

    Example:
        One handler serves all ranks, whichever of them failed:

        >>> try:
        ...     raise RankError("loading failed on another rank")
        ... except ConversionError as error:
        ...     print(f"end the job: {error}")
        end the job: loading failed on another rank
          help:     https://automodel-conv.github.io/automodel_conv/errors/#rankerror
    """


class RefitError(RankError):
    """Raised on all ranks if a refit ends before all parameters of the engine are new.

    Attributes:
        new: names of the tensors of this rank's engine that have all elements of the trainer's new weights.
        old: names of those that still have all elements of their former weights.
        broken: names of those that may have some of both.

    Example:
        >>> error = RefitError("the refit was not finished", new=["a"], broken=["b"])
        >>> error.new, error.old, error.broken
        (('a',), (), ('b',))
    """

    def __init__(self, text: str, *, new: Iterable[str] = (), old: Iterable[str] = (), broken: Iterable[str] = ()):
        super().__init__(text)
        self.new, self.old, self.broken = tuple(new), tuple(old), tuple(broken)


class VerificationError(ConversionError):
    """Raised if tensors differ from the checkpoint that they should equal, or do not match their checksums.

    Example:
        >>> import torch
        >>> from automodel_conv import save_checkpoint, verify_checkpoint
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as first, TemporaryDirectory() as second:  # doctest: +ELLIPSIS
        ...     report = save_checkpoint({"a": torch.ones(2)}, first, rules=[])
        ...     report = save_checkpoint({"a": torch.zeros(2)}, second, rules=[])
        ...     verify_checkpoint(first, second)
        Traceback (most recent call last):
            ...
        automodel_conv.errors.VerificationError: ...
    """


def message(
    what: str,
    *,
    where: str | None = None,
    expected: object = None,
    found: object = None,
    do: Advice | Sequence[Advice] | None = None,
) -> Message:
    """Build an error text: what, where, expected, found, what to do.

    Args:
        what: what went wrong.
        where: file, tensor or rule.
        expected: the value or state that was expected.
        found: the value or state that was found instead.
        do: one or several pieces of advice. ``{argument}`` or ``{argument=value}`` in it is an argument of the function
            that was called. The advice is left out if the function has no such argument, or if the argument has that
            value already.
    """
    labelled = {"where": where, "expected": expected, "found": found}
    texts = {label: str(part) for label, part in labelled.items() if part is not None}
    lines = [what, *(_labelled(label, text) for label, text in texts.items())]
    parts = Parts(what, texts.get("where"), texts.get("expected"), texts.get("found"))
    advice = [] if do is None else [do] if isinstance(do, str) else list(do)
    return Message("\n".join(lines), advice, parts=parts)


def _labelled(label: str, text: str) -> str:
    """Return a text after its label, or below it if the text begins with a new line."""
    return f"  {label}:{text}" if text.startswith("\n") else f"  {f'{label}:':9} {text}"


def in_context(context: str, error: ConversionError) -> Message:
    """Return the text of an error below lines that describe where it happened; its advice stays last."""
    inner = error._message.parts
    parts = inner._replace(what=f"{context}\n{inner.what}")
    return Message(f"{context}\n{error._message.what}", error._message.do, parts=parts)


def listing(items: Iterable[object], limit: int = 20) -> str:
    """Return at most ``limit`` items, one below the other and indented, and the number of further ones.

    If there are more, only three are listed of items that differ in nothing but their numbers, so that names of
    thousands of experts do not hide another name.
    """
    lines = ["    " + str(item).replace("\n", "\n    ") for item in items]
    entries = [(line, 1) for line in lines] if len(lines) <= limit else _by_numbers(lines)
    shown = [line for line, _ in entries[:limit]]
    more = sum(count for _, count in entries[limit:])
    if more:
        shown.append(f"    ... and {more} more")
    return "\n".join(shown)


def _by_numbers(lines: Iterable[str]) -> list[tuple[str, int]]:
    """Return lines to show, each with the number of lines that it stands for, three of those with other numbers."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(_NUMBER.sub("0", line), []).append(line)
    entries = []
    for group in groups.values():
        entries += [(line, 1) for line in group[:_LIKE]]
        if len(group) > _LIKE:
            entries.append((f"    ... and {len(group) - _LIKE} more like these", len(group) - _LIKE))
    return entries


def kind_of(thing: object) -> str:
    """Return a phrase for the kind of an argument: "the class Linear" or "a dict"."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def size_text(nbytes: int) -> str:
    """Return a size in the unit that fits, such as "5.3 MB" for 5,300,000 bytes."""
    return _in_units(nbytes, 1)


def rate_text(gb_per_s: float) -> str:
    """Return a speed in the unit that fits, such as "52.30 MB/s" for 0.0523 GB/s.

    Args:
        gb_per_s: the speed in 10^9 bytes per second.
    """
    return f"{_in_units(round(gb_per_s * 1e9), 2)}/s"


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _in_units(nbytes: int, digits: int) -> str:
    """Return a number of bytes in units of powers of 1000, with this number of digits after the point."""
    if nbytes < 1000:
        return count_of(nbytes, "byte")
    power = min(next(power for power in range(1, 99) if nbytes < 1000 ** (power + 1)), len(_UNITS))
    return f"{nbytes / 1000**power:,.{digits}f} {_UNITS[power - 1]}"
