"""Charts as inline SVG and HTML: colours come from the page's classes, so that light, dark and print are the page's affair.

A mark's ``data-tip`` is what the page shows where a pointer is on it; the same figures stand in a table beside every chart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .html import Html, join, number, tag

STEPS = 9  # classes h0 to h8, low to high
SERIES = 8  # classes c0 to c7


class Scale:
    """A value's place, 0 to 1, between the lowest and the highest of them; by logarithms where they span more than four times."""

    def __init__(self, values: Sequence[float], log: bool | None = None):
        positive = [value for value in values if value > 0 and math.isfinite(value)]
        self.low, self.high = (min(positive), max(positive)) if positive else (1.0, 1.0)
        self.log = self.high > 4 * self.low if log is None else log
        if not self.log:
            self.low = min([self.low, *(value for value in values if math.isfinite(value))])

    def __call__(self, value: float) -> float:
        if self.log:
            if value <= self.low or self.high == self.low:
                return 0.0
            return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) if self.high > self.low else 0.0

    def step(self, value: float) -> int:
        return min(int(self(value) * STEPS), STEPS - 1)

    def at(self, place: float) -> float:
        """The value at a place."""
        return self.low * (self.high / self.low) ** place if self.log else self.low + (self.high - self.low) * place

    def widened(self, by: float) -> Scale:
        """With room on both sides."""
        wider = Scale([], self.log)
        room = (self.high / self.low) ** by if self.log else (self.high - self.low) * by
        wider.low, wider.high = (self.low / room, self.high * room) if self.log else (self.low - room, self.high + room)
        if wider.low == wider.high:
            wider.low, wider.high = (wider.low / 2, wider.high * 2) if self.log else (wider.low - 0.5, wider.high + 0.5)
        return wider

    def ticks(self) -> list[float]:
        """Round values between the ends, four to about nine of them."""
        if not self.log:
            span = self.high - self.low or 1.0
            power = 10.0 ** math.floor(math.log10(span / 4))
            step = next(power * each for each in (1, 2, 5, 10) if span / (power * each) <= 6)
            first = math.ceil(self.low / step)
            return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        each = (1,) if math.log10(self.high / self.low) > 3 else (1, 2, 5)
        found = [part * 10.0**power for power in decades for part in each]
        return [tick for tick in found if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]


def figure(chart: Html, caption: str, *beside: Html) -> Html:
    """A chart with what it says. Wider ones scroll in a frame of their own."""
    frame = tag("div", chart, class_="frame", tabindex="0", role="group", aria_label=caption)
    return tag("figure", frame, *beside, tag("figcaption", caption))


def heatmap(
    rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], tuple[float, str, str]], label: str, scale: Scale
) -> Html:
    """A cell for each (row, column) there is: its value, what it says, and the tip."""
    left = 12 + round(6.7 * max(map(len, rows), default=0))
    width = min(max((940 - left) // max(len(columns), 1), 15), 64)
    height, top = 26, 22
    full = left + width * len(columns) + 2
    parts = []
    every = max(1, math.ceil(7.2 * max(map(len, columns), default=1) / width))
    for i, column in enumerate(columns):
        if i % every == 0:
            parts.append(tag("text", column, x=left + width * i + width / 2, y=14, text_anchor="middle", class_="axis"))
    for j, row in enumerate(rows):
        y = top + height * j
        parts.append(tag("text", row, x=left - 8, y=y + height / 2 + 4, text_anchor="end", class_="axis name"))
        for i, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            value, said, tip = cells[row, column]
            x, shade = left + width * i, scale.step(value)
            parts.append(
                tag("rect", x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=3, class_=f"cell h{shade}", data_tip=tip)
            )
            if width >= 44:
                middle = dict(x=x + width / 2, y=y + height / 2 + 4, text_anchor="middle")
                parts.append(tag("text", said, **middle, class_=f"in t{shade}"))
    return _svg(full, top + height * len(rows) + 2, label, parts)


def legend_of(scale: Scale, said) -> Html:
    """What the colours of a heat map stand for."""
    steps = [tag("i", class_=f"h{i}") for i in range(STEPS)]
    ends = [tag("span", said(scale.at(place))) for place in (0, 0.5, 1)]
    return tag("div", tag("div", *steps, class_="ramp"), tag("div", *ends, class_="ends"), class_="scale", aria_hidden="true")


def legend(names: dict[int, str]) -> Html:
    """The names of the series by their numbers; a pointer on one dims the others."""
    items = [tag("button", tag("i", class_=f"c{i % SERIES}"), name, type="button", data_series=i) for i, name in names.items()]
    return tag("div", *items, class_="legend")


def scatter(
    points: Sequence[tuple[float, float, int, str]], x_label: str, y_label: str, label: str, size: tuple[int, int] = (520, 380)
) -> Html:
    """Points (x, y, series, tip) above zero, shares, on equal axes, with the line where y is x."""
    both = [value for x, y, *_ in points for value in (x, y)]
    scale = Scale(both).widened(0.05)
    (width, height), (left, bottom) = size, (58, 44)

    def across(value: float) -> float:
        return round(left + scale(value) * (width - left - 10), 1)

    def up(value: float) -> float:
        return round(height - bottom - scale(value) * (height - bottom - 10), 1)

    parts = []
    for tick in scale.ticks():
        parts.append(tag("line", x1=left, x2=width - 10, y1=up(tick), y2=up(tick), class_="grid"))
        parts.append(tag("line", x1=across(tick), x2=across(tick), y1=10, y2=height - bottom, class_="grid"))
        parts.append(tag("text", _percent(tick), x=left - 7, y=up(tick) + 4, text_anchor="end", class_="axis"))
        parts.append(tag("text", _percent(tick), x=across(tick), y=height - bottom + 16, text_anchor="middle", class_="axis"))
    parts.append(tag("line", x1=left, y1=height - bottom, x2=width - 10, y2=10, class_="same"))
    parts.append(tag("text", x_label, x=(left + width) / 2, y=height - 8, text_anchor="middle", class_="axis title"))
    turned = f"rotate(-90 13 {(height - bottom) / 2})"
    parts.append(tag("text", y_label, x=13, y=(height - bottom) / 2, text_anchor="middle", transform=turned, class_="axis title"))
    for x, y, series, tip in points:
        mark = dict(cx=across(x), cy=up(y), r=4.5, class_=f"dot c{series % SERIES}")
        parts.append(tag("circle", **mark, data_series=series, data_tip=tip))
    return _svg(width, height, label, parts, "fit")


def lines(
    series: Sequence[tuple[Sequence[float], int, str]], levels: Sequence[str], highest: float, label: str, title: str
) -> Html:
    """One panel of curves of shares over the levels, each (values, shade, tip); all panels of a figure have ``highest`` alike."""
    (width, height), (left, right, top, bottom) = (300, 210), (44, 12, 26, 26)
    scale = Scale([0, highest or 1.0], log=False)
    scale.low = 0.0

    def across(i: int) -> float:
        return round(left + i / max(len(levels) - 1, 1) * (width - left - right), 1)

    def up(value: float) -> float:
        return round(height - bottom - scale(value) * (height - bottom - top), 1)

    parts = [tag("text", title, x=left, y=14, class_="axis panel")]
    for tick in scale.ticks():
        parts.append(tag("line", x1=left, x2=width - right, y1=up(tick), y2=up(tick), class_="grid"))
        parts.append(tag("text", _percent(tick), x=left - 6, y=up(tick) + 4, text_anchor="end", class_="axis"))
    every = max(1, math.ceil(len(levels) / 6))
    for i, level in enumerate(levels):
        if i % every == 0 or len(levels) <= 6:
            parts.append(tag("text", level, x=across(i), y=height - 8, text_anchor="middle", class_="axis"))
    for values, shade, tip in series:
        path = " ".join(f"{'L' if i else 'M'}{across(i)} {up(value)}" for i, value in enumerate(values))
        both = tag("path", d=path, class_="wide"), tag("path", d=path, class_=f"curve s{shade}")
        parts.append(tag("g", *both, class_="line", data_tip=tip))
    return _svg(width, height, label, parts, "fit")


def bars(rows: Sequence[tuple[str, Sequence[tuple[float, str, str]], str]], most: float | None = None) -> Html:
    """A line for each (label, parts, text): parts (value, class, tip) one after the other on a track as long as ``most``."""
    most = most or max((sum(value for value, *_ in parts) for _, parts, _ in rows), default=0) or 1
    found = []
    for label, parts, text in rows:
        filled = [tag("i", class_=kind, style=f"width:{100 * value / most:.3f}%", data_tip=tip) for value, kind, tip in parts]
        found.append(join((tag("dt", label), tag("dd", tag("div", *filled, class_="track"), tag("b", text)))))
    return tag("dl", *found, class_="bars")


def ranges(rows: Sequence[tuple[str, float, float, float, str, str]], mark: tuple[float, str] | None = None) -> Html:
    """A line for each (label, low, value, high, text, tip): the interval, and the value as a dot in it. mark: a value that all are
    to be compared with, and its tip."""
    scale = Scale([value for _, low, at, high, *_ in rows for value in (low, at, high)] + ([mark[0]] if mark else []))
    scale, found = scale.widened(0.04), []
    for label, low, value, high, text, tip in rows:
        begin, at, end = (100 * scale(each) for each in (low, value, high))
        parts = [tag("i", class_="span", style=f"left:{begin:.2f}%;width:{end - begin:.2f}%")]
        parts.append(tag("i", class_="point", style=f"left:{at:.2f}%"))
        if mark:
            parts.append(tag("i", class_="mark", style=f"left:{100 * scale(mark[0]):.2f}%", data_tip=mark[1]))
        found.append(join((tag("dt", label), tag("dd", tag("div", *parts, class_="track open", data_tip=tip), tag("b", text)))))
    return tag("dl", *found, class_="bars")


def _percent(value: float) -> str:
    return f"{number(100 * value)}%"


def _svg(width: float, height: float, label: str, parts: list[Html], kind: str = "") -> Html:
    box = dict(viewBox=f"0 0 {width} {height}", width=width, height=height)
    return tag("svg", *parts, **box, role="img", aria_label=label, class_=kind or None)
