"""The picture of a timeline as SVG, with its legend and sentences, and the page around it; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

from automodel_conv.errors import printable, size_text
from automodel_conv.execution.timeline import PHASES, Span, Timeline, merged_in_cells
from automodel_conv.execution.timeline_words import KINDS, seconds_text, sentences, span_text
from automodel_conv.pictures.page import document, table

MOST_RECTANGLES = 2000
"""Maximum number of rectangles in a picture."""

# Sizes in units of the picture, which are pixels at a width of ``_WIDTH``.
_WIDTH, _LEFT, _RIGHT = 1200, 130, 20
_LANE, _BAR, _WAIT = 22, 16, 6
_AXIS, _GAP = 24, 12
# A letter of a label is narrower.
_LETTER = 8
_TICKS = 8


def timeline_page(timeline: Timeline, title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return the page that shows a timeline.

    Args:
        timeline: the timeline.
        title: title of the page.
        rows: rows of a table below the picture: label and value.
    """
    texts = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences(timeline))
    parts = [
        f"<h1>{escape(printable(title))}</h1>",
        f'<div class="picture">{picture(timeline)}</div>',
        _legend(timeline),
        texts,
    ]
    if rows:
        parts.append(table(rows))
    return document(title, ["timeline.css"], "\n".join(parts))


def picture(timeline: Timeline) -> str:
    """Return a picture of a timeline as SVG: the phases of the whole load, and below them a lane for each thread.

    The lanes of threads have an axis of their own, from their first span to their last one, because a load may plan
    much longer than it reads. Lines between the axes show which part of the load it is.
    """
    phases = [lane for lane in timeline.lanes if lane == PHASES]
    threads = [lane for lane in timeline.lanes if lane != PHASES]
    parts, whole, bottom = [], _Panel(phases, 0.0, timeline.seconds, 0), 0
    if phases:
        parts, bottom = _drawn(whole, timeline.spans), whole.bottom
    if threads:
        spans = [span for span in timeline.spans if span.lane != PHASES]
        begin, end = min(span.begin for span in spans), max(span.end for span in spans)
        part = _Panel(threads, begin, end, bottom + _GAP if phases else 0)
        parts += [_zoom(whole, part)] if phases else []
        parts += _drawn(part, spans)
        bottom = part.bottom
    label = escape(" ".join(sentences(timeline)))
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {bottom}" role="img" aria-label="{label}">\n{body}\n</svg>'


class _Panel(NamedTuple):
    """Lanes below each other that share an axis of time."""

    lanes: Sequence[str]
    begin: float
    end: float
    """Seconds at which the axis begins and ends."""
    top: int
    """Distance from the top of the picture."""

    @property
    def scale(self) -> float:
        """Units of the picture for each second."""
        return (_WIDTH - _LEFT - _RIGHT) / max(self.end - self.begin, 1e-9)

    @property
    def axis(self) -> int:
        """Distance of the axis from the top of the picture."""
        return self.top + _LANE * len(self.lanes)

    @property
    def bottom(self) -> int:
        """Distance of the end of the panel, below the numbers of its axis, from the top of the picture."""
        return self.axis + _AXIS

    def x(self, at: float) -> float:
        """Return the place of a time in seconds."""
        return _LEFT + (at - self.begin) * self.scale


def _drawn(panel: _Panel, spans: Sequence[Span]) -> list[str]:
    """Return the elements of a panel: its axis, the names of its lanes, and a bar for each span in them."""
    parts = []
    for at in _ticks(panel.begin, panel.end):
        x = f"{panel.x(at):.2f}"
        parts.append(f'<path class="axis" d="M{x} {panel.top}V{panel.axis + 4}"/>')
        parts.append(f'<text class="seconds" x="{x}" y="{panel.axis + 18}">{at:.10g} s</text>')
    tops = {lane: panel.top + number * _LANE for number, lane in enumerate(panel.lanes)}
    parts += [f'<text class="name" x="{_LEFT - 8}" y="{top + 15}">{escape(lane)}</text>' for lane, top in tops.items()]
    for span in _merged([span for span in spans if span.lane in tops], 1 / panel.scale, panel.end - panel.begin):
        height = _WAIT if KINDS[span.kind].is_wait else _BAR
        x, width = panel.x(span.begin), max(span.seconds * panel.scale, 0.1)
        parts.append(
            f'<rect x="{x:.2f}" y="{tops[span.lane] + (_LANE - height) / 2:g}" width="{width:.2f}"'
            f' height="{height}" fill="var(--{span.kind})"><title>{escape(span_text(span))}</title></rect>'
        )
        label = KINDS[span.kind].label
        if span.lane == PHASES and width > _LETTER * len(label):
            place = f'x="{x + width / 2:.2f}" y="{tops[span.lane] + 15}"'
            parts.append(f'<text class="phase" {place}>{escape(label)}</text>')
    return parts


def _zoom(whole: _Panel, part: _Panel) -> str:
    """Return lines from the ends of a part of a panel to those of the panel below that shows this part."""
    ends = ((whole.x(part.begin), _LEFT), (whole.x(part.end), _WIDTH - _RIGHT))
    lines = "".join(f"M{above:.2f} {whole.axis}L{below} {part.top}" for above, below in ends)
    return f'<path class="zoom" d="{lines}"/>'


def _merged(spans: Sequence[Span], pixel: float, seconds: float) -> list[Span]:
    """Return spans of which those narrower than a pixel are merged by kind, at most ``MOST_RECTANGLES``.

    Args:
        spans: the spans, lane by lane.
        pixel: seconds of a pixel.
        seconds: seconds of the axis.
    """
    merged = merged_in_cells(spans, pixel)
    while len(merged) > MOST_RECTANGLES and pixel < seconds:
        pixel *= 2
        merged = merged_in_cells(merged, pixel)
    return merged


def _legend(timeline: Timeline) -> str:
    """Return the kinds of spans in the picture, with their seconds and bytes in all lanes together."""
    present = {span.kind for span in timeline.spans}
    items = []
    for name in (name for name in KINDS if name in present):
        kind, nbytes = KINDS[name], timeline.bytes_of(name)
        amount = seconds_text(timeline.seconds_of(name)) + (f", {size_text(nbytes)}" if nbytes else "")
        css = ' class="wait"' if kind.is_wait else ""
        mark = f'<i style="background: var(--{name})"{css}></i>'
        items.append(f"<li>{mark}{escape(kind.label)} <span>{amount}</span></li>")
    note = "A thin bar is a wait. Times are those of all threads together. "
    note += "Dashed lines show which part of the load the threads are drawn for."
    if timeline.merged_seconds:
        note += f" Spans of a thread within {seconds_text(timeline.merged_seconds)} are merged by kind."
    return f'<ul class="legend">{"".join(items)}</ul>\n<p class="note">{note}</p>'


def _ticks(begin: float, end: float) -> Iterator[float]:
    """Yield the places of ticks on an axis: multiples of 1, 2 or 5 times a power of ten."""
    rough = max(end - begin, 1e-9) / _TICKS
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    number = ceil(begin / step)
    while number * step <= end:
        yield round(number * step, 12)
        number += 1
