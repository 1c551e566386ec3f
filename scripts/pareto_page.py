"""The Pareto curves of sweeps as a page of Markdown and a drawing in SVG, both made of its pareto.json alone."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import count, islice
from math import isnan
from textwrap import wrap

from headscope.names import short
from headscope.sae.pareto import DEFINITIONS, HEADINGS, MEASURES, Pareto, Point, said
from headscope.stats import Estimate

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
"""Of Okabe & Ito (2008), with grey in place of their yellow, which is too light for a line on white."""
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 2", "14 4", "9 3 2 3 2 3")  # told apart without colour too
_WIDTH, _HEIGHT = 380.0, 260.0  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 52.0, 42.0  # around what is drawn in it
_LINE, _LETTER, _SAMPLE = 18.0, 6.8, 36.0  # of the legend: height of a line, room for a letter, for a piece of a curve
_STYLE = "text { font: 12px sans-serif; fill: #222 } .small { font-size: 10px; fill: #555 }"

Scale = Callable[[float], float]
Stroke = tuple[str, str]
"""Colour and dashes of a line."""


def page(found: Pareto, picture: str) -> str:
    """The page: what was measured, the picture, the table, the definitions and the recipes.

    Args:
        found: a sweep, or several that were joined.
        picture: where the drawing is, as seen from the page.
    """
    first = found.points[0]
    headings = ("curve", *HEADINGS[1:])
    measured = [[name, *point.cells()[1:]] for name, points in found.curves().items() for point in points]
    rows = [headings, ["---"] * len(headings), *measured]
    latents = " or ".join(f"{d_sae:,}" for d_sae in sorted({point.d_sae for point in found.points}))
    described = [f"* `{name}`: {definition}" for name, definition in DEFINITIONS.items()]
    return "\n".join(
        [
            "# Pareto curves",
            "",
            f"{len(found.points)} SAEs of `{found.site}` of `{short(found.model)}`, trained by `headscope sweep`, "
            f"measured on {first.n_tokens:,} held-out tokens in {first.n_blocks:,} blocks of "
            f"`{found.corpus['name']}`. This page is written by `python scripts/pareto.py`.",
            "",
            f"![Pareto curves]({picture})",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"In brackets 95 % intervals, by resampling blocks; of `dead` Wilson's, n = {latents} latents. "
            f"Null: the mean activation alone, without any SAE, has a loss_recovered of "
            f"{first.loss_recovered_by_mean.value:.4f} [{first.loss_recovered_by_mean.low:.4f}, "
            f"{first.loss_recovered_by_mean.high:.4f}].",
            "",
            *described,
            "",
            *_recipes(found),
        ]
    )


def _recipes(found: Pareto) -> list[str]:
    """The section on recipes: what all have in common, and what each curve has of its own."""
    own = {name: options for name, options in found.own().items() if options}
    each = [f"* {name}: {_options(options)}" for name, options in own.items()]
    heading = ["## Recipe", "", f"Of all, but for `variant` and `target_l0`: {_options(found.common())}.", ""]
    return [*heading, *(["Of each curve:", "", *each, ""] if each else [])]


def _options(recipe: Mapping[str, object]) -> str:
    return ", ".join(f"`{option}` {said(value)}" for option, value in recipe.items())


def svg(found: Pareto) -> str:
    """Four panels, each a measure with its intervals against L0 on a logarithmic axis; one line a curve."""
    curves, width = found.curves(), 2 * _WIDTH
    lines = dict(zip(curves, islice(_strokes(), len(curves)), strict=True))
    legend, top = _legend(lines, width)
    height = 2 * _HEIGHT + top
    size = f'width="{width:g}" height="{height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" {size}>',
        f"<style>{_STYLE}</style>",
        f'<rect {size} fill="white"/>',
        *legend,
    ]
    for i, name in enumerate(MEASURES):
        panel = _panel(name, curves, lines)
        parts.append(f'<g transform="translate({i % 2 * _WIDTH:g} {top + i // 2 * _HEIGHT:g})">{panel}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _strokes() -> Iterator[Stroke]:
    """Lines of another colour and other dashes each, while there are so many; then other pairs of these."""
    for turn in count():
        for i, colour in enumerate(_COLOURS):
            yield colour, _DASHES[(i + turn) % len(_DASHES)]


def _legend(lines: Mapping[str, Stroke], width: float) -> tuple[list[str], float]:
    """A piece of each curve with its name, from left to right and in as many lines as that takes; and its height."""
    parts: list[str] = []
    room = width - _RIGHT - _LEFT
    x, y = 0.0, _LINE
    for name, (colour, dash) in lines.items():
        written = wrap(name, int((room - _SAMPLE) / _LETTER))
        taken = _SAMPLE + _LETTER * max(map(len, written))
        if x and x + taken > room:
            x, y = 0.0, y + _LINE
        parts.append(_polyline([(_LEFT + x, y), (_LEFT + x + 30, y)], colour, dash))
        for i, line in enumerate(written):
            parts.append(_text(_LEFT + x + _SAMPLE, y + 4 + i * _LINE, line))
        x, y = x + taken + 12, y + (len(written) - 1) * _LINE
    return parts, y + 16


def _panel(name: str, curves: dict[str, list[Point]], lines: Mapping[str, Stroke]) -> str:
    drawable = (p for curve in curves.values() for p in curve if p.l0.value > 0)  # the axis is logarithmic
    points = [p for p in drawable if not isnan(getattr(p, name).value)]
    parts = [_text(_LEFT, 20.0, name.replace("reconstruction_bias", "reconstruction bias"))]
    parts.append(_text(_LEFT, 36.0, MEASURES[name].split(";")[0], "small"))
    if not points:
        return "".join([*parts, _text(_LEFT, 100.0, "not defined")])
    ends = [end for p in points for end in _ends(getattr(p, name))]
    y_ticks = nice_ticks(min(ends), max(ends))
    to_x = _x_scale([p.l0.value for p in points])
    to_y = _linear(min([*ends, *y_ticks]), max([*ends, *y_ticks]), _HEIGHT - _BOTTOM, _TOP)
    for tick in y_ticks:
        parts.append(_polyline([(_LEFT, to_y(tick)), (_WIDTH - _RIGHT, to_y(tick))], "#ddd", ""))
        parts.append(_text(_LEFT - 6, to_y(tick) + 4, f"{tick:g}", "small", "end"))
    for tick in _powers(min(p.l0.value for p in points), max(p.l0.value for p in points)):
        parts.append(_text(to_x(tick), _HEIGHT - _BOTTOM + 16, f"{tick:g}", "small", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "L0", "small", "middle"))
    for curve_name, curve in curves.items():
        colour, dash = lines[curve_name]
        drawn = [(to_x(p.l0.value), getattr(p, name)) for p in curve if p in points]
        parts.append(_polyline([(x, to_y(e.value)) for x, e in drawn], colour, dash))
        for x, e in drawn:
            parts.append(_polyline([(x, to_y(_ends(e)[0])), (x, to_y(_ends(e)[1]))], colour, ""))
            parts.append(f'<circle cx="{x:.1f}" cy="{to_y(e.value):.1f}" r="3" fill="{colour}"/>')
    return "".join(parts)


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The interval, or the value twice where there is none."""
    low, high = (estimate.value if isnan(end) else end for end in (estimate.low, estimate.high))
    return low, high


def _x_scale(values: Sequence[float]) -> Scale:
    low, high = math.log2(min(values)), math.log2(max(values))
    scale = _linear(low, high, _LEFT + 12, _WIDTH - _RIGHT - 12)
    return lambda value: scale(math.log2(value))


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = high - low
    return lambda value: start + (end - start) * ((value - low) / span if span else 0.5)


def _powers(low: float, high: float) -> list[float]:
    """Powers of two from a number to another; the two themselves where there is none between."""
    found = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return found or sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _polyline(points: Sequence[tuple[float, float]], colour: str, dash: str) -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'
