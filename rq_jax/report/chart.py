"""Line charts as SVG text: small, without a script, drawn in milliseconds."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 26  # room around the lines
MAX_POINTS = 300  # of a line
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      label: in the legend.
      x, y: points; a `y` that is not finite leaves a gap.
      group: lines of one group have one color.
      dash: which of the patterns of dashes; 0 is a solid line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    group: str = ""
    dash: int = 0


def chart(title: str, lines: Sequence[Line]) -> str:
    """An SVG element with a legend below.

    The y axis spans the middle 98 % of the values, so that the first steps of a run do not flatten the rest.

    Args:
      title: of the panel.
      lines: at least one; labels and title may hold any character.
    """
    lines = [line._replace(x=x, y=y) for line in lines for x, y in [thin(line.x, line.y)]]
    finite = sorted(value for line in lines for value in line.y if math.isfinite(value))
    ticks_y = nice_ticks(*_middle(finite)) if finite else [0.0, 1.0]
    steps = [step for line in lines for step in line.x] or [0.0, 1.0]
    low, high = min(steps), max(steps)
    ticks_x = [tick for tick in nice_ticks(low, high) if low <= tick <= high]
    place_x = _scale(low, high, _LEFT, WIDTH - _RIGHT)
    place_y = _scale(ticks_y[0], ticks_y[-1], HEIGHT - _BOTTOM, _TOP)
    groups = dict.fromkeys(line.group or line.label for line in lines)
    colors = {group: _COLORS[i % len(_COLORS)] for i, group in enumerate(groups)}
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in ticks_y:
        y = place_y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks_x:
        parts.append(f'<text x="{place_x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    legend = []
    for line in lines:
        dash = _DASHES[line.dash % len(_DASHES)]
        stroke = f'class="line" stroke="{colors[line.group or line.label]}" stroke-dasharray="{dash}"'
        label = html.escape(line.label)
        parts.append(f'<path {stroke} d="{_path(line, place_x, place_y)}"><title>{label}</title></path>')
        legend.append(f'<span><svg viewBox="0 0 22 4"><path {stroke} d="M0 2H22"/></svg>{label}</span>')
    return "".join([*parts, '</svg><div class="legend">', *legend, "</div>"])


def _path(line: Line, place_x, place_y) -> str:
    """Of the points that are finite; a point above or below the axes is drawn at their edge."""
    words, is_drawing = [], False
    for step, value in zip(line.x, line.y, strict=True):
        if is_finite := math.isfinite(value):
            y = min(max(place_y(value), _TOP), HEIGHT - _BOTTOM)
            words.append(f"{'L' if is_drawing else 'M'}{place_x(step):.1f} {y:.1f}")
        is_drawing = is_finite
    if len(words) == 1:
        words.append("h0.1")  # one point shows as a dot
    return "".join(words)


def _scale(low: float, high: float, start: float, end: float):
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the middle 98 % of sorted values."""
    cut = len(values) // 100
    return values[cut], values[-1 - cut]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, apart by 1, 2 or 5 times a power of ten, whose ends enclose [low, high]."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points: of each stretch of steps the lowest and the highest, in order."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    num_stretches = MAX_POINTS // 2
    chosen = []
    for i in range(num_stretches):
        stretch = range(i * len(x) // num_stretches, (i + 1) * len(x) // num_stretches)
        finite = [j for j in stretch if math.isfinite(y[j])] or [stretch[0]]
        chosen += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[j] for j in chosen], [y[j] for j in chosen]
