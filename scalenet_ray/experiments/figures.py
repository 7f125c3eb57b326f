"""The pictures of an experiment on canvases: how a net responds to scale, and the steps of one recursion (Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from scalenet_ray.report.charts import ACCENT, MUTED, drawing, quiet, to_svg

__all__ = [
    "response_plot",
    "steps_plot",
]


def response_plot(outcome: Mapping[str, Any]) -> str:
    """Predicted against true scale, both logarithmic.

    Args:
        outcome: "true" and "predicted", lists of scales.

    Returns:
        An SVG element.
    """
    with drawing(4.4, 3.6) as figure:
        axes = figure.subplots()
        ends = [min(outcome["true"]), max(outcome["true"])]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle="--", label="right")
        axes.plot(outcome["true"], outcome["predicted"], "o-", color=ACCENT, markersize=4, label="Scale Net")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("true scale (1: the unit side)")
        axes.set_ylabel("predicted scale, mean of the object's pixels")
        quiet(axes, "both")
        axes.legend(frameon=False)
        return to_svg(figure)


def steps_plot(outcome: Mapping[str, Any]) -> str:
    """The canvases of one picture's recursion at one magnification, and below each what Scale Net saw in it.

    Args:
        outcome: "canvases", [side, side] grey levels each, and "maps", [side, side] scales each, one for each canvas
            that was looked at.

    Returns:
        An SVG element.
    """
    canvases = [np.array(canvas) for canvas in outcome["canvases"]]
    maps = [np.array(one) for one in outcome["maps"]]
    most = max(float(one.max()) for one in maps)
    with drawing(1.8 * len(canvases) + 0.8, 3.8) as figure:
        rows = figure.subplots(2, len(canvases), squeeze=False)
        largest = max(len(canvas) for canvas in canvases)
        shown = None
        for i, canvas in enumerate(canvases):
            half = len(canvas) / 2
            above, below = rows[0, i], rows[1, i]
            above.imshow(canvas, cmap="gray", vmin=0, vmax=255, extent=(-half, half, half, -half))
            above.set_title(f"{len(canvas)} px")
            if i < len(maps):
                shown = below.imshow(maps[i], cmap="viridis", vmin=0, vmax=most, extent=(-half, half, half, -half))
                on_object = maps[i][maps[i] > 0]
                below.set_title(f"scale {on_object.mean():.2f}" if on_object.size else "no object")
            for axes in (above, below):
                axes.set_xlim(-largest / 2, largest / 2)
                axes.set_ylim(largest / 2, -largest / 2)
                axes.set_axis_off()
        if shown is not None:
            figure.colorbar(shown, ax=rows[1, :].tolist(), shrink=0.8)
        return to_svg(figure)
