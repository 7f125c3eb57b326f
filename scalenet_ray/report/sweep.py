"""The page of a sweep: its front, what the values of each field came to, and all trials."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from scalenet_ray.core.front import front
from scalenet_ray.front_plot import front_plot
from scalenet_ray.report.shell import cards, page, section, table
from scalenet_ray.svg import MUTED, WARM, drawing, label, quiet, themed, to_svg

__all__ = ["render_sweep"]

_COLUMNS = 3


def render_sweep(rows: Sequence[Mapping[str, Any]], ceiling: float | None) -> str:
    """The page of a sweep.

    Args:
        rows: as `run_sweep` gives them.
        ceiling: the most passes that were asked for; None if the front was.

    Returns:
        HTML, one file that fetches nothing.
    """
    complete = [row for row in rows if row["complete"]]
    best = [complete[i] for i in front([(row["passes"], row["AP_small"]) for row in complete])]
    affordable = [row for row in best if ceiling is None or row["passes"] <= ceiling]
    paths = list(dict.fromkeys(path for row in rows for path in row["values"]))
    sections = [
        section("facts", "At a glance", "", _facts(affordable)),
        section(
            "front",
            "The front",
            "A point for each trial that saw all images. Nothing beats those on the front in both.",
            f"<figure>{themed(front_plot(rows, ceiling), 'The front of the trials')}</figure>" if complete else "",
        ),
        section(
            "fields",
            "What each field came to",
            "AP of small objects against the value tried; diamonds are on the front.",
            _fields(complete, best, paths),
        ),
        section("trials", "Trials", "The best first.", _trials(rows, paths, best)),
    ]
    state = f"{len(complete)} of {len(rows)} trials saw all images; {sum(bool(row['error']) for row in rows)} failed."
    return page("What paid", f'<p class="state">{state}</p>', sections)


def _facts(best: Sequence[Mapping[str, Any]]) -> str:
    if not best:
        return ""
    row = max(best, key=lambda row: row["AP_small"])
    return cards(
        [
            (f"{row['AP_small']:.1f}", "AP of small objects", f"trial {row['trial']}"),
            (f"{row['AP']:.1f}", "AP of all objects", ""),
            (f"{row['passes']:.2f}", "detector passes an image", ""),
        ]
    )


def _fields(complete: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> str:
    varied = [path for path in paths if len({str(row["values"].get(path)) for row in complete}) > 1]
    if not varied:
        return ""
    lines = -(-len(varied) // _COLUMNS)
    with drawing(8.6, 2.3 * lines) as figure:
        panels = figure.subplots(lines, _COLUMNS, sharey=True, squeeze=False).ravel()
        for panel in panels[len(varied) :]:
            panel.set_axis_off()
        for panel, path in zip(panels, varied, strict=False):
            for some, marker, colour in ((complete, "o", MUTED), (best, "D", WARM)):
                points = [(row["values"][path], row["AP_small"]) for row in some if path in row["values"]]
                if not all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points):
                    points = [(label(str(value)), worth) for value, worth in points]
                if points:
                    panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, alpha=0.85)
            panel.set_title(label(path), loc="left", fontsize=8)
            quiet(panel, "both")
        figure.supylabel("AP of small objects (%)", fontsize=8)
        return f"<figure>{themed(to_svg(figure), 'What each field came to')}</figure>"


def _trials(rows: Sequence[Mapping[str, Any]], paths: Sequence[str], best: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""

    def worth(row: Mapping[str, Any]) -> tuple[bool, float]:
        """Trials that saw all images come first, then those that found most."""
        return (row["complete"], row["AP_small"] if row["AP_small"] == row["AP_small"] else -1.0)

    ordered = sorted(rows, key=worth, reverse=True)
    names = [row["trial"] for row in best]
    cells = [
        [
            html.escape(f"{row['trial']}{' (front)' if row['trial'] in names else ''}"),
            *(_number(row[key]) for key in ("AP_small", "passes", "AP")),
            html.escape(row["error"] or ("saw all images" if row["complete"] else "ended early")),
            *(_number(row["values"].get(path)) for path in paths),
        ]
        for row in ordered
    ]
    return table("Trials", ["trial", "AP small", "passes", "AP", "state", *paths], cells)


def _number(value: Any) -> str:
    if value is None or value != value:
        return "\N{EN DASH}"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
