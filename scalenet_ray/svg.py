"""Figures as SVG elements that a page can hold."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["ACCENT", "COLOURS", "LINE", "MUTED", "SHAPES", "WARM", "drawing", "label", "quiet", "themed", "to_svg"]

# Okabe and Ito's palette: apart for colour-blind readers too; shapes tell apart what its colours do not.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
ACCENT, WARM = COLOURS[0], COLOURS[1]
_INK, MUTED, LINE = "#1c2024", "#6b7280", "#d4d8de"
_LONGEST_LABEL = 24
_ON_PAGE = {_INK: "ink", MUTED: "muted", LINE: "line", **{colour: f"s{i}" for i, colour in enumerate(COLOURS)}}
"""Colour -> the page's own name of it, so that a figure follows the page into the dark."""


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, until `to_svg` has it.

    Text stays text, and ids do not change from run to run: the same figures give the same file.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "scalenet_ray",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "axes.titlesize": 10,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": LINE,
    }
    with mpl.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def quiet(axes: Axes, grid: str = "y") -> None:
    """Leave the frame away, and draw a light grid along "x", "y" or "both"."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom" and grid == "y")
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, linewidth=0.7)  # type: ignore[arg-type]


def label(text: str) -> str:
    """A name of any kind as a figure can hold it: short, and not read as a formula."""
    return (text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}").replace(
        "$", r"\$"
    )


def to_svg(figure: Figure) -> str:
    """The figure as one <svg> element."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def themed(svg: str, name: str) -> str:
    """A figure for a page: colours and letters become the page's, ids its own, and screen readers are told its name."""
    for colour, variable in _ON_PAGE.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    # Two figures of a page must not clip by each other's paths.
    key = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    width = re.search(r'width="([\d.]+)pt"', svg)
    style = f' style="max-width:{float(width[1]) * 1.5:.0f}px"' if width else ""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}"{style} ', 1)
