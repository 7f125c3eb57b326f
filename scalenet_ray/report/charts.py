"""The figures of an evaluation's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scalenet_ray.svg import ACCENT, COLOURS, LINE, MUTED, SHAPES, WARM, drawing, label, quiet, themed, to_svg

__all__ = ["cost_chart", "curves_chart", "errors_chart", "found_chart", "throughput_chart"]

_DASHES = ("-", "--", "-.", ":")


def curves_chart(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """Precision against recall, a panel for each size of objects: solid at IoU .5, thin over IoU .5 to .95."""
    sizes = [size for size in ("small", "medium", "large") if any(size in one for one in curves.values())]
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


def found_chart(rows: Sequence[Mapping[str, Any]], before: str, after: str, name: str) -> str:
    """The share of objects found before and after, a line for each class or range of sizes."""
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


def errors_chart(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What each kind of error costs each policy, in AP at IoU .5."""
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
                text = f"{costs[kind]['cost']:.1f}   ({costs[kind]['count']:.0f})"
                axes.text(value, y, f"  {text}", va="center", color=MUTED, fontsize=7.5)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_xlabel("AP at IoU .5 that mending it alone would bring (in brackets: how many)")
        quiet(axes, "x")
        figure.legend(loc="outside upper left", ncols=min(len(errors), 6), frameon=False)
        return themed(to_svg(figure), "What each kind of error costs")


def throughput_chart(throughput: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Images finished over time, a line for each policy."""
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


def cost_chart(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the pixels and, if they were measured, the seconds of an image go."""
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
            # Above the bars: inside, the best place may still lie on one.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, borderaxespad=0)
        return themed(to_svg(figure), "Pixels and seconds by stage")
