"""Plots as SVG, made of text: two kinds, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 40, 52
_LEGEND_WIDTH = 140
_CHARACTER_WIDTH, _LINE_HEIGHT = 7, 14
_COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#b9770e", "#34495e", "#d35480", "#117a8b")


class Point(msgspec.Struct, frozen=True):
    """A point with a name, and an interval above and below it."""

    name: str
    x: float
    y: float
    low: float
    high: float


class Line(msgspec.Struct, frozen=True):
    """Values that belong together, by what they are over."""

    name: str
    points: dict[float, float]


class Axis(msgspec.Struct, frozen=True):
    """One axis: what it shows, and from where to where."""

    label: str
    low: float
    high: float
    marked: tuple[float, ...] = ()
    """What is marked on a logarithmic axis; the others mark round values."""

    def share(self, value: float) -> float:
        """Where ``value`` is, from 0 to 1."""
        if self.marked:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within it, some five of them."""
        if self.marked:
            return list(self.marked)
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(number * step, 10) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_over(label: str, values: Sequence[float]) -> Axis:
    """An axis with zero and all of ``values`` on it, and some room."""
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.06 * (high - low or 1.0)
    return Axis(label, low - room if low < 0 else 0.0, high + room)


def scatter(title: str, points: Sequence[Point], x: str, y: str) -> str:
    """Named points with intervals, as an SVG document."""
    across = axis_over(x, [point.x for point in points])
    up = axis_over(y, [value for point in points for value in (point.low, point.high, point.y)])
    marks, labels = [], _Labels()
    for index, point in enumerate(points):
        colour = _COLOURS[index % len(_COLOURS)]
        at, low, high = _x(across, point.x), _y(up, point.low), _y(up, point.high)
        bars = f"M{at:.1f} {low:.1f}V{high:.1f}M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} {high:.1f}h8"
        marks += [
            f'<path d="{bars}" stroke="{colour}" fill="none"/>',
            f'<circle cx="{at:.1f}" cy="{_y(up, point.y):.1f}" r="4" fill="{colour}"/>',
            labels.beside(at, _y(up, point.y), point.name, colour),
        ]
    return _document(title, across, up, marks)


class _Labels:
    """Names beside points, moved up until they are clear of each other."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float]] = []

    def beside(self, x: float, y: float, name: str, colour: str) -> str:
        width = _CHARACTER_WIDTH * len(name)
        left, bottom = (x + 8 if x < _WIDTH * 0.8 else x - 8 - width), y - 6
        while any(
            left < right and start < left + width and abs(bottom - at) < _LINE_HEIGHT
            for start, right, at in self._taken
        ):
            bottom -= _LINE_HEIGHT
        self._taken.append((left, left + width, bottom))
        return f'<text x="{left:.1f}" y="{bottom:.1f}" fill="{colour}">{escape(name)}</text>'


def lines(title: str, series: Sequence[Line], x: str, y: str, *, line_at: float) -> str:
    """Lines over a logarithmic axis, as an SVG document; names in the order of the values on the left.

    Args:
        line_at: the value up the plot that is told apart.
    """
    over = sorted({value for each in series for value in each.points})
    low, room = over[0] / 1.2, 1 - _LEGEND_WIDTH / (_WIDTH - _LEFT - _RIGHT)
    across = Axis(x, low, low * (over[-1] * 1.2 / low) ** (1 / room), tuple(over))
    up = axis_over(y, [line_at, *(value for each in series for value in each.points.values())])
    marks = [f'<path d="M{_LEFT} {_y(up, line_at):.1f}H{_WIDTH - _RIGHT}" stroke="#888"/>']
    named = sorted(series, key=lambda each: -each.points[min(each.points)])
    for index, each in enumerate(named):
        colour, dashes = _COLOURS[index % len(_COLOURS)], index // len(_COLOURS) * 5
        places = [f"{_x(across, at):.1f} {_y(up, value):.1f}" for at, value in sorted(each.points.items())]
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        left, row = _WIDTH - _RIGHT - _LEGEND_WIDTH, _TOP + 12 + _LINE_HEIGHT * index
        marks += [
            f'<path d="M{"L".join(places)}" {stroke} fill="none"/>',
            f'<path d="M{left} {row - 4}h22" {stroke}/>',
            f'<text x="{left + 28}" y="{row}" fill="{colour}">{escape(each.name)}</text>',
        ]
    return _document(title, across, up, marks)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _document(title: str, across: Axis, up: Axis, marks: Sequence[str]) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    frame = [f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>']
    for value in up.ticks():
        height = _y(up, value)
        frame.append(f'<path d="M{_LEFT} {height:.1f}H{right}" stroke="{"#888" if value == 0 else "#ddd"}"/>')
        frame.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in across.ticks():
        at = _x(across, value)
        frame.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#888"/>')
        frame.append(f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{value:.4g}</text>')
    middle = (_TOP + bottom) / 2
    frame += [
        f'<path d="M{_LEFT} {bottom}H{right}" stroke="#888"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(across.label)}</text>',
        f'<g transform="rotate(-90 16 {middle})">',
        f'<text x="16" y="{middle}" text-anchor="middle">{escape(up.label)}</text></g>',
    ]
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *frame,
        *marks,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
