"""Line charts for curves over the share of a gallery that has been re-encoded.

The colours are the Okabe-Ito palette, which colour-blind readers can tell apart; every line also has its own marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PALETTE = {
    "red": "#D55E00", "blue": "#0072B2", "green": "#009E73", "purple": "#CC79A7", "grey": "#6b7280",
    "orange": "#E69F00", "sky": "#56B4E9", "black": "#000000",
}  # fmt: skip
INK, SOFT, GRID = "#000000", PALETTE["grey"], "#e5e7eb"  # of a chart on paper; ``themed`` gives a page's own


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` of equal length; ``low``/``high`` draw a band; ``dashed`` for reference levels;
    ``step`` for values that hold until the next ``x``."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "blue"
    marker: str = "o"
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    step: bool = False
    width: float = 2.0


def line_chart(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    size: tuple[float, float] = (7.2, 4.0),
    ylim: tuple[float, float | None] | None = None,
    ident: str = "chart",
    legend_below: bool = False,
    background: str | None = None,
) -> str:
    """A chart as SVG text.

    ``levels``: label -> horizontal reference line. ``ident`` makes the ids inside unique in a page. ``legend_below``
    the axes it covers no line. ``background``: a colour; without one what is behind the chart is seen.
    """
    # An Agg canvas without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, value in (levels or {}).items():
        axes.axhline(value, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            label, xy=(1.0, value), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=SOFT, annotation_clip=False,
        )  # fmt: skip
    for one in series:
        color = PALETTE.get(one.color, one.color)
        axes.plot(
            one.x, one.y, label=one.label, color=color, marker=one.marker, markersize=4.5, linewidth=one.width,
            linestyle="--" if one.dashed else "-", drawstyle="steps-post" if one.step else "default",
        )  # fmt: skip
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if ylim:
        axes.set_ylim(*ylim)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(series) > 1:
        if legend_below:
            figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=min(3, len(series)))
        else:
            axes.legend(frameon=False, fontsize=9, loc="best")
    return _svg(figure, ident, background)


def themed(svg: str) -> str:
    """The chart for a page that is light or dark: ink, soft lines and grid are its variables ``--ink``, ``--soft`` and
    ``--line``."""
    for color, name in ((INK, "ink"), (SOFT, "soft"), (GRID, "line")):
        svg = svg.replace(color, f"var(--{name}, {color})")
    return svg


@dataclass(frozen=True)
class Point:
    """One named point of a ``point_chart``."""

    label: str
    x: float
    y: float
    color: str = "blue"


def point_chart(
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    size: tuple[float, float] = (7.2, 4.6),
    ident: str = "points",
) -> str:
    """Named points as SVG text; labels of near neighbours are moved apart, upwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    low, high = (f(p.y for p in points) for f in (min, max)) if points else (0.0, 1.0)
    line = (high - low or 1.0) / 22  # the height of a label in units of y
    taken: list[tuple[float, float]] = []
    width = (max((p.x for p in points), default=1.0) - min((p.x for p in points), default=0.0)) or 1.0
    for point in sorted(points, key=lambda p: p.y):
        color, y = PALETTE.get(point.color, point.color), point.y
        axes.plot([point.x], [point.y], "o", color=color, markersize=6)
        while any(abs(y - other) < line and abs(point.x - x) < width / 4 for x, other in taken):
            y += line / 4
        taken.append((point.x, y))
        axes.annotate(
            point.label, xy=(point.x, point.y), xytext=(point.x + width / 60, y), fontsize=8.5, color=color,
            va="center",
            arrowprops=None if y == point.y else {"arrowstyle": "-", "color": color, "alpha": 0.35, "linewidth": 0.8},
        )  # fmt: skip
    axes.margins(x=0.22, y=0.08)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure, ident)


def _svg(figure: Any, ident: str, background: str | None = None) -> str:
    """SVG text that can be put into a page: same bytes for the same data, ids prefixed, no XML header."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": ident, "svg.fonttype": "none", "font.family": "sans-serif"}):
        if background is not None:
            figure.set_facecolor(background)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=background is None)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{ident}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
