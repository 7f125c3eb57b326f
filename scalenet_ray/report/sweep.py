"""The page of a sweep: its front, what the values of each field came to, and all trials."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalenet_ray.evaluation.compare import pareto_front
from scalenet_ray.report.charts import MUTED, WARM, drawing, front_plot, label, quiet, themed, to_svg
from scalenet_ray.report.html import cards, page, section, table
from scalenet_ray.runs.documents import Interval, Metrics, PolicyMetrics, TrialRow

__all__ = ["Contender", "contenders_of", "render_sweep", "sweep_verdict"]

_COLUMNS = 3


@dataclass(frozen=True)
class Contender:
    """A policy that the sweep started from, or one that it found.

    Attributes:
        name: the policy's, in best.yaml and in the report.
        is_start: whether the sweep started from it.
        tuned: its trial's row on the split that was tuned on; None if it had none that saw all images.
        reported: its row of the report's metrics.json; None before the report.
        difference: its "AP_small" of the report's "differences": "difference", "low" and "high"; None without.
    """

    name: str
    is_start: bool
    tuned: TrialRow | None
    reported: PolicyMetrics | None = None
    difference: Interval | None = None


def contenders_of(
    starts: Mapping[str, TrialRow | None],
    best: Mapping[str, TrialRow],
    document: Metrics | None = None,
) -> list[Contender]:
    """The start beside the best.

    Args:
        starts: from `start_trials`.
        best: from `best_trials`.
        document: what the report's metrics.json holds; None before it.
    """
    reported = document["policies"] if document else {}
    differences = document.get("differences", {}) if document else {}
    rows = [*((name, True, row) for name, row in starts.items()), *((name, False, row) for name, row in best.items())]
    return [
        Contender(name, is_start, row, reported.get(name), differences.get(name, {}).get("AP_small"))
        for name, is_start, row in rows
    ]


def sweep_verdict(contenders: Sequence[Contender], ceiling: float | None, splits: tuple[str, str]) -> list[str]:
    """What a sweep came to, in sentences: whether anything beat the start, how sure that is, and at what price.

    Args:
        contenders: the start and the best.
        ceiling: the most passes that were asked for; None if the front was.
        splits: the one tuned on, and the one reported on.
    """
    starts = [one for one in contenders if one.is_start]
    best = [one for one in contenders if not one.is_start]
    tuned_on, reported_on = splits
    return [
        *_against_the_start(starts, best, ceiling, tuned_on),
        *(_how_sure(one, starts[0].name, reported_on) for one in best if one.difference is not None),
        *(
            f"{one.name}: {one.reported['detector_passes_per_image']:.2f} passes on {reported_on} exceed the ceiling "
            f"of {ceiling:g}, which held on {tuned_on} ({one.tuned['passes']:.2f})"
            for one in best
            if ceiling is not None
            and one.tuned is not None
            and one.reported is not None
            and one.reported["detector_passes_per_image"] > ceiling
        ),
    ]


def _against_the_start(
    starts: Sequence[Contender], best: Sequence[Contender], ceiling: float | None, split: str
) -> list[str]:
    """Whether anything found more small objects than the start, on the split that was tuned on."""
    said = [
        f"{one.name}, which the sweep started from, has no trial that saw all images of {split}: it lies outside the "
        "space, or was ended early"
        for one in starts
        if one.tuned is None
    ]
    tried = [(one.name, one.tuned) for one in starts if one.tuned is not None]
    limit = float("inf") if ceiling is None else ceiling
    said += [
        f"{name}, which the sweep started from, takes {row['passes']:.2f} passes on {split}, over the ceiling of "
        f"{ceiling:g}: what was found is cheaper"
        for name, row in tried
        if row["passes"] > limit
    ]
    affordable = [(name, row) for name, row in tried if row["passes"] <= limit]
    if not affordable:
        return said
    name, start = max(affordable, key=lambda one: one[1]["AP_small"])
    # Without a ceiling the start's own price is one.
    limit = start["passes"] if ceiling is None else ceiling
    found = [(one.name, one.tuned) for one in best if one.tuned is not None and one.tuned["passes"] <= limit]
    won, row = max(found, key=lambda one: one[1]["AP_small"], default=("", start))
    figures = f"AP_small {start['AP_small']:.1f} at {start['passes']:.2f} passes"
    if row["AP_small"] > start["AP_small"]:
        gain = row["AP_small"] - start["AP_small"]
        said.append(
            f"on {split} {won} finds AP_small {row['AP_small']:.1f} at {row['passes']:.2f} passes, {gain:+.1f} to "
            f"{name}, which the sweep started from ({figures})"
        )
    else:
        held = ", ".join(one.name for one in best)
        said.append(
            f"nothing beat the start on {split}: {name} has {figures}; best.yaml holds the best trial all the same, "
            f"{held}"
        )
    return said


def _how_sure(one: Contender, base: str, split: str) -> str:
    """What the paired bootstrap says of one policy on the split that is reported on."""
    found = one.difference
    assert found is not None
    ends = [found[end] for end in ("difference", "low", "high")]
    if any(end is None or end != end for end in ends):
        return f"{one.name}: AP_small cannot be compared with {base} on {split}"
    difference, low, high = ends
    kind = "no sure gain" if low <= 0 <= high else "a loss" if high < 0 else "a gain"
    return f"{kind} on {split}: {one.name} has AP_small {difference:+.1f} [{low:+.1f}, {high:+.1f}] to {base}"


def render_sweep(
    rows: Sequence[TrialRow],
    ceiling: float | None,
    contenders: Sequence[Contender] = (),
    splits: tuple[str, str] = ("", ""),
) -> str:
    """The page of a sweep.

    Args:
        rows: as `run_sweep` gives them.
        ceiling: the most passes that were asked for; None if the front was.
        contenders: the start and the best; () where nothing was found.
        splits: the one tuned on, and the one reported on.

    Returns:
        HTML, one file that fetches nothing.
    """
    complete = [row for row in rows if row["complete"]]
    best = [complete[i] for i in pareto_front([(row["passes"], row["AP_small"]) for row in complete])]
    affordable = [row for row in best if ceiling is None or row["passes"] <= ceiling]
    paths = list(dict.fromkeys(path for row in rows for path in row["values"]))
    sections = [
        section("facts", "At a glance", "", _facts(affordable)),
        section(
            "start",
            "The start beside the best",
            "Where the sweep started from, and what it found, on both splits. In brackets where 95&nbsp;% of the "
            "paired bootstrap's differences lie.",
            _beside(contenders, splits),
        ),
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
    said = "".join(
        f'<p class="{"lead" if i == 0 else "state"}">{html.escape(line[:1].upper() + line[1:])}.</p>'
        for i, line in enumerate(sweep_verdict(contenders, ceiling, splits) if contenders else [])
    )
    return page("What paid", f'{said}<p class="state">{state}</p>', sections)


def _beside(contenders: Sequence[Contender], splits: tuple[str, str]) -> str:
    if not contenders:
        return ""
    rows = []
    for one in contenders:
        tuned, reported, found = one.tuned or {}, one.reported or {}, one.difference
        difference = "\N{EN DASH}"
        if found is not None and not any(found[end] is None or found[end] != found[end] for end in ("low", "high")):
            difference = f"{found['difference']:+.1f} <small>[{found['low']:+.1f}, {found['high']:+.1f}]</small>"
        figures = (
            (tuned.get("AP_small"), 1),
            (tuned.get("passes"), 2),
            (reported.get("AP_small"), 1),
            (reported.get("detector_passes_per_image"), 2),
        )
        cells = ["\N{EN DASH}" if value is None or value != value else f"{value:.{n}f}" for value, n in figures]
        rows.append([html.escape(f"{one.name}{' (start)' if one.is_start else ''}"), *cells, difference])
    head = [f"{title}, {split}" for split in splits for title in ("AP small", "passes")]
    return table("The start beside the best", ["policy", *head, f"AP small to the start, {splits[1]}"], rows)


def _facts(best: Sequence[TrialRow]) -> str:
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


def _fields(complete: Sequence[TrialRow], best: Sequence[TrialRow], paths: Sequence[str]) -> str:
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


def _trials(rows: Sequence[TrialRow], paths: Sequence[str], best: Sequence[TrialRow]) -> str:
    if not rows:
        return ""

    def worth(row: TrialRow) -> tuple[bool, float]:
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
