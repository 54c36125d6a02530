"""Find the rules that depend on the numbers in a name, and the names that may be affected."""

from __future__ import annotations

import re
from typing import Any

from automodel_conv.upstream.registry import CORE_MODULE

ANY_NAME = re.compile("")
_LOOKAROUND = re.compile(r"\(\?<?[=!][^()]*\d[^()]*\)")
# Digits after a letter belong to a word (``w1``). Digits on their own may match a numeric component of a name.
_TOKENS = re.compile(r"\(\?P<\w+>|\\.|\[\^?\]?[^\]]*\]|\{[^}]*\}|\d+|[A-Za-z_]\w*|.", re.DOTALL)

# An escape that can be a digit, or a reference to a group that can contain one.
_ESCAPED_NUMBER = re.compile(r"\\[xuUN0-9]")
# A wider look-around matches less if it is negative, and a repeated group of wide numbers can take exponential time.
_NOT_WIDENED = re.compile(r"\(\?<?[=!][^)]*(?:\d|\\d)|\)[*+{]")
# A quantifier, with the mark that makes it lazy or possessive.
_QUANTIFIER = re.compile(r"(?:[+*?]|\{[^}]*\})[+?]?")


def digit_pattern(rule: Any) -> re.Pattern[str] | None:
    """Return a pattern for the names whose numbers may matter to a rule.

    The pattern is the rule's own, with each number in it widened to any number and without look-arounds that contain a
    number. It matches at least the names that the rule matches. A rule of an unknown class may depend on anything.

    Returns:
        The pattern, or None if the rule treats all numbers of one length the same.
    """
    compiled = getattr(rule, "compiled_sources", None)
    if compiled is None or type(rule).rename_source_key.__module__ != CORE_MODULE:
        return ANY_NAME
    scope = getattr(rule, "scope_prefix", None) or ""
    if any(part.isdecimal() for part in scope.split(".")):
        return ANY_NAME
    if _ESCAPED_NUMBER.search(compiled.pattern):
        return ANY_NAME
    _, sees_numbers = _widened(compiled.pattern)
    if not sees_numbers:
        renames_plainly = type(rule).__name__ in ("WeightRenaming", "WeightConverter", "PrefixChange")
        return None if renames_plainly else _unanchored(compiled.pattern)
    pattern = _LOOKAROUND.sub("", compiled.pattern)
    if _NOT_WIDENED.search(pattern):
        return ANY_NAME
    widened, _ = _widened(pattern)
    return _unanchored(widened)


def _widened(pattern: str) -> tuple[str, bool]:
    """Return the pattern with every number replaced by a pattern for any number, and whether it contained one."""
    tokens = _TOKENS.findall(pattern)
    parts: list[str] = []
    sees_numbers = False
    position = 0
    while position < len(tokens):
        token, following = tokens[position], tokens[position + 1] if position + 1 < len(tokens) else ""
        position += 1
        if token == r"\d" and following in ("+", "*"):  # the rule treats all numbers the same
            parts.append(token)
            continue
        if token.isdecimal() or token == r"\d":
            widened = r"\d"
        elif token[0] == "[" and any(c.isdecimal() for c in token):
            widened = rf"(?:(?!\d){token}|\d)"
        else:
            parts.append(token)
            continue
        sees_numbers = True
        quantifier = _QUANTIFIER.match("".join(tokens[position : position + 2]))
        # A quantifier applies only to the last digit, so the other digits of a longer number stay required.
        is_one = len(token) == 1 or not token.isdecimal()
        is_optional = is_one and quantifier is not None and quantifier[0].startswith(("*", "?", "{0", "{,"))
        parts.append(widened + ("*" if is_optional else "+"))
        if quantifier is not None:
            position += len(_TOKENS.findall(quantifier[0]))
    return "".join(parts), sees_numbers


def _unanchored(pattern: str) -> re.Pattern[str]:
    """Return the pattern without ``^``, because a scoped rule matches after its prefix."""
    return re.compile(re.sub(r"(^|[|(>])\^", r"\1", pattern))
