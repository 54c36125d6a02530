"""What a page says about elements, against tensors whose elements all differ."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy

MOST = 1000
"""Elements of a target that are compared; smaller targets are compared whole."""

_ASK = """
([name, elements]) => {
  const plan = page.plan;
  const target = plan.targets.find((target) => target.name === name);
  return elements.map((element) => {
    const { text, source, element: from } = plan.explain(target, element);
    return [text, source === null ? null : plan.names[source], from];
  });
}
"""
_INDEX = re.compile(r"[\d +*]*")


def explanations(page: Any, name: str, elements: Sequence[int]) -> list[list[Any]]:
    """Return [text, source name or None, element of the source or None] for elements of a target."""
    return page.evaluate(_ASK, [name, list(elements)])


def assert_explained(
    page: Any,
    sources: Mapping[str, numpy.ndarray],
    targets: Mapping[str, numpy.ndarray],
    files: Mapping[str, str] | None = None,
) -> None:
    """Check what the page says about the elements of all targets.

    Args:
        sources: values of the sources, which all differ.
        targets: values of all targets, as loaded.
        files: names of the files of the sources; None: the plan has no files.
    """
    assert page.evaluate("page.plan.targets.map((target) => target.name).sort()") == sorted(targets)
    places = {value: (name, at) for name, values in sources.items() for at, value in enumerate(values.ravel().tolist())}
    assert len(places) == sum(values.size for values in sources.values())
    for name, values in targets.items():
        elements = range(values.size)
        if len(elements) > MOST:
            elements = sorted(random.Random(name).sample(elements, MOST))
        flat = values.ravel()
        for element, (text, source, at) in zip(elements, explanations(page, name, elements), strict=True):
            value = flat[element].item()
            before, arrow, after = text.rpartition(" → ")
            assert arrow, text
            assert read_index(after, name) == [int(i) for i in numpy.unravel_index(element, values.shape)], text
            if value in places:
                assert (source, at) == places[value], text
                index = [int(i) for i in numpy.unravel_index(at, sources[source].shape)]
                file = "" if files is None else f"{files[source]}: "
                assert before == f"{file}{source}{index if index else ''}"
            else:
                assert source is None, text
                assert numpy.float64(before.removeprefix("the constant ")) == value, text


def read_index(text: str, name: str) -> list[int]:
    """Return the index in a text such as ``name[17, 768 + 5, 1 + 2 * 7]``, or in a name alone."""
    if text == name:
        return []
    assert text.startswith(f"{name}["), text
    assert text.endswith("]"), text
    terms = text[len(name) + 1 : -1].split(", ")
    assert all(map(_INDEX.fullmatch, terms)), text
    return [sum(prod(map(int, factors.split("*"))) for factors in term.split("+")) for term in terms]


def distinct(shapes: Mapping[str, Sequence[int]]) -> dict[str, numpy.ndarray]:
    """Return float32 tensors of these shapes whose elements all differ."""
    tensors, start = {}, 1
    for name, shape in shapes.items():
        tensors[name] = numpy.arange(start, start + prod(shape), dtype=numpy.float32).reshape(shape)
        start += prod(shape)
    return tensors
