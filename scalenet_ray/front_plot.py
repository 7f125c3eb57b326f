"""The picture of a sweep: every trial's small objects found, for a price, and the front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scalenet_ray.core.front import front
from scalenet_ray.svg import ACCENT, COLOURS, MUTED, drawing, quiet, to_svg

__all__ = ["front_plot"]


def front_plot(rows: Sequence[Mapping[str, Any]], ceiling: float | None) -> str:
    """AP_small against detector passes per image, a point for each trial that saw all images.

    Args:
        rows: as `run_sweep` gives them.
        ceiling: the most passes that were asked for, drawn as a line; None if the front was.

    Returns:
        An SVG element, the same for the same figures.
    """
    points = [(row["passes"], row["AP_small"]) for row in rows if row["complete"]]
    on_front = [points[i] for i in front(points)]
    with drawing(7.2, 4.2) as figure:
        axes = figure.subplots()
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=MUTED, markersize=4, alpha=0.7, label="trials")
            axes.step(*zip(*on_front, strict=True), where="post", color=ACCENT, linewidth=1.5)
            axes.plot(*zip(*on_front, strict=True), "o", color=ACCENT, markersize=6, label="front")
        if ceiling is not None:
            axes.axvline(ceiling, color=COLOURS[3], linewidth=1, linestyle="--", label=f"ceiling {ceiling:g}")
        axes.set_xlabel("detector passes per image")
        axes.set_ylabel("AP of small objects (%)")
        figure.suptitle(f"{len(points)} of {len(rows)} trials saw all images", fontsize=9)
        quiet(axes, "both")
        if points or ceiling is not None:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return to_svg(figure)
