"""Charts of the reports, as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from scalenet_ray.evaluation.compare import pareto_front
from scalenet_ray.runs.documents import ChangesRow, Curves, ErrorCost, Metrics, PolicyMetrics, TrialRow

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080")
"""Okabe and Ito's palette, distinguishable with colour blindness."""

SHAPES = ("o", "s", "^", "D", "v", "P", "X")
ACCENT, WARM = COLOURS[0], COLOURS[1]
_INK, MUTED, LINE = "#1c2024", "#6b7280", "#d4d8de"
_DASHES = ("-", "--", "-.", ":")
_MAX_LABEL = 24
_PASSES_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 50, 100)

_ON_PAGE = {_INK: "ink", MUTED: "muted", LINE: "line", **{colour: f"s{i}" for i, colour in enumerate(COLOURS)}}
"""Colour -> name of the page's CSS variable, so that figures follow its light and dark themes."""


def curves_chart(curves: Mapping[str, Mapping[str, Curves]]) -> str:
    """Plot precision against recall, one panel per size of objects: solid at IoU .5, dashed over IoU .5 to .95."""
    sizes = [size for size in ("small", "medium", "large") if any(size in by_size for by_size in curves.values())]
    if not sizes:
        return ""
    recall = np.linspace(0, 100, 101)
    with drawing(8.6, 3.4) as figure:
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for panel, size in zip(panels, sizes, strict=True):
            for i, (policy, by_size) in enumerate(curves.items()):
                colour, marker = COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]
                if size in by_size:
                    every = (4 * i % 20, 20)
                    panel.plot(
                        recall,
                        by_size[size]["iou50"],
                        color=colour,
                        linewidth=1.8,
                        marker=marker,
                        markevery=every,
                        markersize=4,
                        label=label(policy),
                    )
                    panel.plot(recall, by_size[size]["mean"], color=colour, linewidth=0.9, linestyle="--", alpha=0.85)
            panel.set_title(f"{size} objects", loc="left")
            panel.set_xlabel("recall (%)")
            panel.set_xlim(0, 100)
            panel.set_ylim(0, 102)
            quiet(panel, "both")
        panels[0].set_ylabel("precision (%)")
        names, labels = panels[0].get_legend_handles_labels()
        names += [
            Line2D([], [], color=MUTED, linewidth=1.8),
            Line2D([], [], color=MUTED, linewidth=0.9, linestyle="--"),
        ]
        figure.legend(
            names, [*labels, "IoU .5", "mean, IoU .5 to .95"], loc="outside lower center", ncols=5, frameon=False
        )
        return themed(to_svg(figure), "Precision against recall by size of objects")


def found_chart(rows: Sequence[ChangesRow], before: str, after: str, name: str) -> str:
    """Plot the share of objects found by two policies, one line per class or range of sizes."""
    if not rows:
        return ""
    with drawing(4.3, 0.55 + 0.29 * max(len(rows), 3)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            ends = [100 * row[key] / row["objects"] for key in ("before", "after")]
            axes.plot(ends, [y, y], color=LINE, linewidth=4, solid_capstyle="round", zorder=1)
            axes.plot(ends[0], y, "o", color=ACCENT, markersize=6, label=label(before) if y == 0 else None)
            axes.plot(ends[1], y, "D", color=WARM, markersize=5.5, label=label(after) if y == 0 else None)
            axes.text(
                1.03,
                y,
                f"+{row['gained']}  \N{MINUS SIGN}{row['lost']}  of {row['objects']}",
                transform=axes.get_yaxis_transform(),
                va="center",
                color=MUTED,
                fontsize=8,
            )
        axes.set_yticks(range(len(rows)), [label(row["name"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("found (%)")
        quiet(axes, "x")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        return themed(to_svg(figure), name)


def errors_chart(errors: Mapping[str, Mapping[str, ErrorCost]]) -> str:
    """Plot the cost of each kind of error for each policy, in AP at IoU .5."""
    kinds = list(next(iter(errors.values()), {}))
    if not kinds:
        return ""
    height = 0.8 / len(errors)
    with drawing(8.6, 1.1 + 0.16 * len(kinds) * max(len(errors), 2)) as figure:
        axes = figure.subplots()
        for i, (policy, costs) in enumerate(errors.items()):
            at = np.arange(len(kinds)) + (i - (len(errors) - 1) / 2) * height
            values = [max(costs[kind]["cost"], 0.0) for kind in kinds]
            axes.barh(at, values, height * 0.86, color=COLOURS[i % len(COLOURS)], label=label(policy))
            for y, kind, value in zip(at, kinds, values, strict=True):
                text = f"{costs[kind]['cost']:.1f} ({costs[kind]['count']:.0f})"
                beside = {"xytext": (4, 0), "textcoords": "offset points"}
                axes.annotate(text, (value, y), va="center", color=MUTED, fontsize=7.5, **beside)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_xlabel("AP at IoU .5 that mending it alone would bring (in brackets: how many)")
        quiet(axes, "x")
        figure.legend(loc="outside upper left", ncols=min(len(errors), 6), frameon=False)
        return themed(to_svg(figure), "What each kind of error costs")


def throughput_chart(throughput: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Plot the number of finished images over time, one line per policy."""
    lines = {policy: points for policy, points in throughput.items() if len(points) > 1}
    if not lines:
        return ""
    with drawing(4.3, 3.2) as figure:
        axes = figure.subplots()
        for i, (policy, points) in enumerate(throughput.items()):
            if policy in lines:
                seconds, images = zip(*points, strict=True)
                style = _DASHES[i // len(COLOURS) % len(_DASHES)]
                axes.plot(seconds, images, style, color=COLOURS[i % len(COLOURS)], linewidth=1.8, label=label(policy))
        axes.set_xlabel("seconds since the policy began")
        axes.set_ylabel("images done")
        axes.set_ylim(bottom=0)
        quiet(axes)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
        return themed(to_svg(figure), "Images finished over time")


def cost_chart(policies: Mapping[str, PolicyMetrics]) -> str:
    """Plot the megapixels per image by network and, if measured, the seconds by stage."""
    pixels = {
        policy: {
            "detector": row.get("detector_megapixels_per_image") or 0.0,
            "Scale Net": row.get("scalenet_megapixels_per_image") or 0.0,
        }
        for policy, row in policies.items()
    }
    seconds = {policy: dict(row["seconds_by_stage"]) for policy, row in policies.items() if row.get("seconds_by_stage")}
    panels = [("megapixels per image", pixels), *([("seconds by stage", seconds)] if seconds else [])]
    with drawing(4.3, (1.2 + 0.3 * max(len(policies), 2)) * len(panels) + 0.3) as figure:
        for axes, (title, rows) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            left = np.zeros(len(rows))
            for i, stage in enumerate(dict.fromkeys(stage for row in rows.values() for stage in row)):
                values = np.array([row.get(stage, 0.0) for row in rows.values()])
                axes.barh(range(len(rows)), values, 0.6, left=left, color=COLOURS[i % len(COLOURS)], label=stage)
                left += values
            axes.set_yticks(range(len(rows)), [label(name) for name in rows])
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel(title)
            quiet(axes, "x")
            # Above the axes: any place inside may cover a bar.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, borderaxespad=0)
        return themed(to_svg(figure), "Pixels and seconds by stage")


def policy_plot(document: Metrics) -> str:
    """Plot AP_small against detector passes per image (log scale), one point per policy; "" if none has both.

    If differences from a baseline were measured, bars show their 95 % intervals relative to the baseline's AP_small.
    """
    points = {
        name: (float(row["detector_passes_per_image"]), float(ap_small))
        for name, row in document["policies"].items()
        # No passes: all images failed.
        if (ap_small := row.get("AP_small")) is not None
        and not math.isnan(ap_small)
        and row["detector_passes_per_image"]
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
        axes.xaxis.set_major_locator(FixedLocator(_PASSES_TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("detector passes per image")
        compared = f"; bars: 95 % of the paired differences to {label(str(baseline))}" if baseline in points else ""
        axes.set_ylabel("AP of small objects (%)")
        figure.suptitle(f"Small objects found, for a price{compared}", fontsize=9)
        quiet(axes, "both")
        figure.legend(loc="outside right center", frameon=False)
        return to_svg(figure)


def front_plot(rows: Sequence[TrialRow], ceiling: float | None) -> str:
    """Plot AP_small against detector passes per image, one point per trial that saw all images; `ceiling` is a line."""
    points = [(row["passes"], row["AP_small"]) for row in rows if row["complete"]]
    on_front = [points[i] for i in pareto_front(points)]
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


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Create a figure of a size in inches, with the pages' style while the block runs.

    Text stays text and ids are reproducible: the same data gives the same file.
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
    """Remove the frame, and draw a light grid along "x", "y" or "both"."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom" and grid == "y")
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, linewidth=0.7)  # type: ignore[arg-type]


def label(text: str) -> str:
    """Shorten a name for a figure, and escape matplotlib's formula syntax."""
    return (text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}").replace("$", r"\$")


def to_svg(figure: Figure) -> str:
    """Render a figure as one <svg> element."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def themed(svg: str, name: str) -> str:
    """Adapt an <svg> element to a page: CSS variables as colours, the page's font, unique ids, an accessible name."""
    for colour, variable in _ON_PAGE.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    # Ids are made unique: clip paths of two figures of a page must not collide.
    key = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    width = re.search(r'width="([\d.]+)pt"', svg)
    style = f' style="max-width:{float(width[1]) * 1.5:.0f}px"' if width else ""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}"{style} ', 1)
