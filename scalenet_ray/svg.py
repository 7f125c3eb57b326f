"""Figures as SVG elements that a page can hold."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["drawing", "to_svg"]


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, until `to_svg` has it.

    Text stays text, and ids do not change from run to run: the same figures give the same file.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scalenet_ray", "font.size": 9}):
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """The figure as one <svg> element."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]
