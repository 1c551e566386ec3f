"""Figures of a report as inline SVG, built as elements, so that text in them cannot become markup.

Colours are Okabe and Ito's, distinguishable with any colour vision; order, legend and the table of numbers under a
figure convey the same without colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from headscope.report.numbers import said
from headscope.report.records import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
_WIDTH, _HEIGHT = 420, 215
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 8, 40
_TURNED = 64  # pixels below the axis for rotated labels
_MOST_LABELS = 7
_MOST_WORDS = 26
_MOST_SHORT, _SHORT = 12, 4


def svg(figure: Figure) -> Element:
    """Draw a figure."""
    frame = _Frame.of(figure)
    root = Element("svg", {"aria-label": figure.title}, viewBox=f"0 0 {_WIDTH} {frame.height}", role="img")
    _axes(root, figure, frame)
    {"bars": _bars, "stacked": _stacked, "grouped": _bars, "lines": _lines}[figure.drawn](root, figure, frame)
    return root


@dataclass(frozen=True)
class _Frame:
    """Coordinate system of a figure."""

    low: int | float
    high: int | float
    log: bool
    n: int
    height: int
    slanted: bool
    baseline: int | float

    @classmethod
    def of(cls, figure: Figure) -> "_Frame":
        values = _extent(figure)
        slanted = len(figure.labels) <= _MOST_WORDS and any(not _is_number(label) for label in figure.labels)
        if figure.log:
            positive = [v for v in values if v > 0] or [1.0]
            low = math.floor(math.log10(min(positive)))
            high = max(low + 1, math.ceil(math.log10(max(positive))))
            return cls(low - 0.3, high, True, len(figure.labels), _HEIGHT + 24 * slanted, slanted, low - 0.3)
        low, high = min(0.0, *values), max(0.0, *values)
        if low == high:
            high = 1.0
        room = 0.04 * (high - low)
        return cls(low - room * (low < 0), high + room, False, len(figure.labels), _HEIGHT + 24 * slanted, slanted, 0.0)

    @property
    def bottom(self) -> float:
        return float(self.height - (_TURNED if self.slanted else _BOTTOM))

    def y(self, value: int | float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - _TOP)

    @property
    def zero(self) -> float:
        """Vertical position of the base of bars."""
        return self.bottom if self.log else self.y(0)

    @property
    def step(self) -> float:
        return (_WIDTH - _LEFT - _RIGHT) / max(self.n, 1)

    def x(self, place: int | float) -> float:
        """Return the horizontal position of a place's centre."""
        return _LEFT + (place + 0.5) * self.step

    def ticks(self) -> list[int | float]:
        """Return round values for the vertical axis."""
        if self.log:
            return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1)]
        unit = 10.0 ** math.floor(math.log10(self.high - self.low))
        size = next(s for s in (unit / 5, unit / 2, unit, unit * 2) if (self.high - self.low) / s <= 6)
        first, last = math.ceil(self.low / size), math.floor(self.high / size)
        return [i * size for i in range(first, last + 1)]


def _extent(figure: Figure) -> list[int | float]:
    """Return the range of values on the axis."""
    series = [*figure.series.values(), *figure.low.values(), *figure.high.values()]
    values = [v for own in series for v in own if v is not None] or [0.0]
    if figure.drawn == "stacked":
        values += [sum(v or 0 for v in at) for at in zip(*figure.series.values(), strict=True)]
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------- axes
def _axes(root: Element, figure: Figure, frame: _Frame) -> None:
    for value in frame.ticks():
        y = f"{frame.y(value):.1f}"
        SubElement(root, "line", {"class": "grid"}, x1=str(_LEFT), x2=str(_WIDTH - _RIGHT), y1=y, y2=y)
        _text(root, said(float(f"{value:.6g}")), _LEFT - 5, frame.y(value) + 3.5, anchor="end")
    y = f"{frame.zero:.1f}"
    SubElement(root, "line", {"class": "axis"}, x1=str(_LEFT), x2=str(_WIDTH - _RIGHT), y1=y, y2=y)
    short = frame.n <= _MOST_SHORT and all(len(label) <= _SHORT for label in figure.labels)
    every = 1 if frame.slanted or short else max(1, math.ceil(frame.n / _MOST_LABELS))
    for place in range(0, frame.n, every):
        _label(root, figure.labels[place], frame, place)
    if figure.x:
        _text(root, figure.x, (_LEFT + _WIDTH) / 2, frame.height - 5, anchor="middle")
    if figure.y:
        name = _text(root, figure.y, 11, (frame.bottom + _TOP) / 2, anchor="middle")
        name.set("transform", f"rotate(-90 11 {(frame.bottom + _TOP) / 2:.1f})")


def _label(root: Element, label: str, frame: _Frame, place: int) -> None:
    x, y = frame.x(place), frame.bottom + 14
    if not frame.slanted or (len(label) <= _SHORT and frame.n <= _MOST_SHORT):
        _text(root, label, x, y, anchor="middle")
        return
    text = label if len(label) <= 13 else f"{label[:12]}…"
    _text(root, text, x + 3, y - 2, anchor="end").set("transform", f"rotate(-38 {x + 3:.1f} {y - 2:.1f})")


def _text(root: Element, text: str, x: int | float, y: int | float, *, anchor: str) -> Element:
    own = SubElement(root, "text", {"text-anchor": anchor}, x=f"{x:.1f}", y=f"{y:.1f}")
    own.text = text
    return own


# ---------------------------------------------------------------------------------------------------------------- marks
def _bars(root: Element, figure: Figure, frame: _Frame) -> None:
    """Draw one bar per label and series, side by side, with whiskers where there are intervals."""
    width = 0.84 * frame.step / max(len(figure.series), 1)
    for number, (name, values) in enumerate(figure.series.items()):
        for place, value in enumerate(values):
            if value is None:
                continue
            x = frame.x(place) - 0.42 * frame.step + number * width
            _bar(root, (x, width), (frame.zero, frame.y(value)), number, _hint(figure, place, name, value))
            _whisker(root, figure, frame, name, place, x + width / 2)


def _stacked(root: Element, figure: Figure, frame: _Frame) -> None:
    below = [0.0] * frame.n
    for number, (name, values) in enumerate(figure.series.items()):
        for place, value in enumerate(values):
            if not value:
                continue
            ends = frame.y(below[place]), frame.y(below[place] + value)
            x = frame.x(place) - 0.46 * frame.step
            _bar(root, (x, 0.92 * frame.step), ends, number, _hint(figure, place, name, value))
            below[place] += value


def _bar(
    root: Element,
    across: tuple[int | float, int | float],
    ends: tuple[int | float, int | float],
    number: int,
    hint: str,
) -> None:
    x, width = across
    own = SubElement(
        root,
        "rect",
        x=f"{x:.2f}",
        y=f"{min(ends):.2f}",
        width=f"{max(width, 0.5):.2f}",
        height=f"{max(abs(ends[0] - ends[1]), 0.3):.2f}",
        fill=COLOURS[number % len(COLOURS)],
    )
    SubElement(own, "title").text = hint


def _whisker(root: Element, figure: Figure, frame: _Frame, name: str, place: int, x: int | float) -> None:
    low, high = (ends.get(name, (None,) * frame.n)[place] for ends in (figure.low, figure.high))
    if low is not None and high is not None:
        at = f"{x:.2f}"
        SubElement(root, "line", {"class": "axis"}, x1=at, x2=at, y1=f"{frame.y(low):.1f}", y2=f"{frame.y(high):.1f}")


def _lines(root: Element, figure: Figure, frame: _Frame) -> None:
    for number, (name, values) in enumerate(figure.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if name in figure.low and name in figure.high:
            band = [*_points(figure.low[name], frame), *reversed(_points(figure.high[name], frame))]
            SubElement(root, "polygon", points=" ".join(band), fill=colour, opacity="0.2")
        shown = [v or None for v in values] if frame.log else list(values)
        for run in _runs(shown):
            points = _points(values, frame, run)
            dash = ("", "6 3", "2 3", "8 3 2 3")[number % 4]
            line = SubElement(root, "polyline", points=" ".join(points), stroke=colour, fill="none")
            line.set("stroke-width", "1.8")
            if dash:
                line.set("stroke-dasharray", dash)
        for place, value in enumerate(shown):
            if value is not None:
                at = frame.x(place), frame.y(value)
                dot = SubElement(root, "circle", cx=f"{at[0]:.1f}", cy=f"{at[1]:.1f}", r="1.6", fill=colour)
                SubElement(dot, "title").text = _hint(figure, place, name, value)


def _points(values: Sequence[int | float | None], frame: _Frame, places: Sequence[int] | None = None) -> list[str]:
    chosen = range(len(values)) if places is None else places
    return [f"{frame.x(i):.1f},{frame.y(value):.1f}" for i in chosen if (value := values[i]) is not None]


def _runs(values: Sequence[int | float | None]) -> list[list[int]]:
    """Split into runs of places without a gap between them."""
    runs: list[list[int]] = [[]]
    for place, value in enumerate(values):
        if value is not None:
            runs[-1].append(place)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _hint(figure: Figure, place: int, name: str, value: int | float) -> str:
    return f"{figure.labels[place]}  {name}: {said(value)}"
