"""SVG drawings as text: rectangles, lines and words, in the colors of a theme, on a transparent background."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
ON_COLOR = "#101418"
"""Ink of words on a colored rectangle; the colors of all rectangles are light."""


class Theme(NamedTuple):
    """Colors that are readable on the pages of GitHub and of the documentation."""

    name: str
    ink: str
    muted: str
    lines: str
    panel: str
    """Fill of boxes with words."""
    bar: str
    highlight: str
    """Fill of the bar that stands out."""


THEMES = (
    Theme("light", "#1f2328", "#57606a", "#8c959f", "#eef1f4", "#b4bec9", "#3fb68b"),
    Theme("dark", "#e6edf3", "#a8b1bb", "#7d8590", "#2d333b", "#5b6672", "#2b8f6c"),
)


class Drawing:
    """One SVG drawing; x grows to the right, y downwards, in pixels."""

    def __init__(self, width: int, height: int, title: str, theme: Theme) -> None:
        self.theme = theme
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
        ]

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, outline: str = "none", radius: float = 0
    ) -> None:
        self._parts.append(
            f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}" rx="{_px(radius)}"'
            f' fill="{fill}" stroke="{outline}"/>'
        )

    def line(
        self, x: float, y: float, to_x: float, to_y: float, ink: str = "", width: float = 1, dashes: str = ""
    ) -> None:
        """Draw a line, in the theme's color of lines unless ``ink`` is given."""
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<line x1="{_px(x)}" y1="{_px(y)}" x2="{_px(to_x)}" y2="{_px(to_y)}"'
            f' stroke="{ink or self.theme.lines}" stroke-width="{_px(width)}"{dashed}/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Draw a horizontal or vertical line with a tip at its end."""
        self.line(x, y, to_x, to_y, width=1.5)
        sign = 1 if to_x + to_y > x + y else -1
        along, across = 6 * sign, 4
        tip = [(to_x, to_y)]
        for side in (across, -across):
            tip.append((to_x - along, to_y + side) if y == to_y else (to_x + side, to_y - along))
        points = " ".join(f"{_px(px)},{_px(py)}" for px, py in tip)
        self._parts.append(f'<polygon points="{points}" fill="{self.theme.lines}"/>')

    def words(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 12,
        ink: str = "",
        anchor: str = "start",
        bold: bool = False,
        upright: bool = False,
    ) -> None:
        """Write a line of words; ``y`` is its baseline, or with ``upright`` its center, and it runs upwards."""
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate(-90 {_px(x)} {_px(y)})" dominant-baseline="central"' if upright else ""
        self._parts.append(
            f'<text x="{_px(x)}" y="{_px(y)}" font-size="{size}" fill="{ink or self.theme.ink}"'
            f' text-anchor="{anchor}"{weight}{turn}>{escape(text)}</text>'
        )

    def text(self) -> str:
        """Return the SVG file."""
        return "\n".join([*self._parts, "</svg>\n"])


def _px(value: float) -> str:
    """Return a length with at most two decimals, the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
