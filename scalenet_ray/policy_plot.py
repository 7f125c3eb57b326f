"""The picture of a comparison: small objects found, for a price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from scalenet_ray.svg import COLOURS, MUTED, SHAPES, drawing, label, quiet, to_svg

__all__ = ["policy_plot"]

_PASSES = (0.5, 1, 2, 3, 5, 10, 20, 50, 100)


def policy_plot(document: Mapping[str, Any]) -> str:
    """AP_small against detector passes per image (log), a point a policy.

    Where policies were compared with one of them, a bar goes over the middle 95 % of the paired bootstrap's
    differences, laid off from that one's AP_small.

    Args:
        document: what metrics.json holds.

    Returns:
        An SVG element, the same for the same figures; "" where no policy has an AP_small and a price.
    """
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    points = {
        name: (float(row["detector_passes_per_image"]), float(row["AP_small"]))
        for name, row in policies.items()
        # Where all images failed nothing was paid.
        if row.get("AP_small") is not None and not math.isnan(row["AP_small"]) and row["detector_passes_per_image"]
    }
    if not points:
        return ""
    with drawing(8.6, 4.2) as figure:
        axes = figure.subplots()
        baseline = document.get("compared_with")
        for i, (name, (passes, ap)) in enumerate(points.items()):
            colour, shape = COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]
            axes.plot(passes, ap, shape, color=colour, markersize=8, label=f"{label(name)}  {ap:.1f} at {passes:.2f}")
            interval = document.get("differences", {}).get(name, {}).get("AP_small")
            if baseline in points and interval is not None:
                ends = [points[baseline][1] + interval[end] for end in ("low", "high")]
                axes.plot([passes] * 2, ends, color=colour, linewidth=1.2, alpha=0.7, gid=f"interval {name}")
        if baseline in points:
            axes.axhline(points[baseline][1], color=MUTED, linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_PASSES))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("detector passes per image")
        compared = f"; bars: 95 % of the paired differences to {label(str(baseline))}" if baseline in points else ""
        axes.set_ylabel("AP of small objects (%)")
        figure.suptitle(f"Small objects found, for a price{compared}", fontsize=9)
        quiet(axes, "both")
        figure.legend(loc="outside right center", frameon=False)
        return to_svg(figure)
