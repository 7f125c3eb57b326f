"""report.html of a sweep: Pareto front, AP by the values of each field, all trials."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalenet_ray.evaluation.compare import pareto_front
from scalenet_ray.report.charts import MUTED, WARM, drawing, front_plot, label, quiet, themed, to_svg
from scalenet_ray.report.html import (
    cards,
    figure_cell,
    interval_cell,
    is_known,
    origin_line,
    origin_section,
    page,
    section,
    table,
)
from scalenet_ray.runs.documents import Interval, Metrics, PolicyMetrics, TrialMetrics, TrialRow

_COLUMNS = 3


@dataclass(frozen=True)
class Contender:
    """A starting policy of a sweep, or one of its best: metrics on the tuning split, and on the reporting split.

    `difference` is that of AP_small on the reporting split from the starting policy. None is what was not measured.
    """

    name: str
    is_start: bool
    tuned: TrialMetrics
    reported: PolicyMetrics | None = None
    difference: Interval | None = None


def contenders_of(
    starts: Mapping[str, TrialMetrics],
    best: Mapping[str, TrialMetrics],
    document: Metrics | None = None,
) -> list[Contender]:
    """Return the starting policies followed by the best, with their metrics on all images of the tuning split.

    `document` is metrics.json on the reporting split; None before that evaluation.
    """
    reported = document["policies"] if document else {}
    differences = document.get("differences", {}) if document else {}
    rows = [*((name, True, row) for name, row in starts.items()), *((name, False, row) for name, row in best.items())]
    return [
        Contender(name, is_start, row, reported.get(name), differences.get(name, {}).get("AP_small"))
        for name, is_start, row in rows
    ]


def sweep_verdict(contenders: Sequence[Contender], ceiling: float | None, splits: tuple[str, str]) -> list[str]:
    """Summarise a sweep in sentences: gain over the start, its significance, and cost.

    `ceiling` limits the passes per image, unless it is None; `splits` are the tuning and the reporting split.
    """
    starts = [contender for contender in contenders if contender.is_start]
    best = [contender for contender in contenders if not contender.is_start]
    tuned_on, reported_on = splits
    sentences = _start_sentences(starts, best, ceiling, tuned_on)
    sentences += [
        _significance(contender.name, contender.difference, starts[0].name, reported_on)
        for contender in best
        if contender.difference is not None
    ]
    for contender in best:
        if ceiling is None or contender.reported is None:
            continue
        passes = contender.reported["detector_passes_per_image"]
        if passes > ceiling:
            start = starts[0].reported
            beside = "" if start is None else f"; {starts[0].name} takes {start['detector_passes_per_image']:.2f} there"
            sentences.append(
                f"{contender.name}: {passes:.2f} passes on {reported_on} exceed the ceiling of {ceiling:g}, which held "
                f"on {tuned_on} ({contender.tuned['passes']:.2f}){beside}"
            )
    return sentences


def _start_sentences(
    starts: Sequence[Contender], best: Sequence[Contender], ceiling: float | None, split: str
) -> list[str]:
    """Compare the best with the start on the tuning split."""
    tried = [(contender.name, contender.tuned) for contender in starts]
    limit = float("inf") if ceiling is None else ceiling
    sentences = [
        f"{name}, which the sweep started from, takes {row['passes']:.2f} passes on {split}, over the ceiling of "
        f"{ceiling:g}: what was found is cheaper"
        for name, row in tried
        if row["passes"] > limit
    ]
    affordable = [(name, row) for name, row in tried if row["passes"] <= limit]
    if not affordable:
        return sentences
    name, start = max(affordable, key=lambda pair: pair[1]["AP_small"])
    # Without a ceiling, the start's own passes are the limit.
    limit = start["passes"] if ceiling is None else ceiling
    found = [(contender.name, contender.tuned) for contender in best if contender.tuned["passes"] <= limit]
    won, row = max(found, key=lambda pair: pair[1]["AP_small"], default=("", start))
    figures = f"AP_small {start['AP_small']:.1f} at {start['passes']:.2f} passes"
    if row["AP_small"] > start["AP_small"]:
        gain = row["AP_small"] - start["AP_small"]
        sentences.append(
            f"on {split} {won} finds AP_small {row['AP_small']:.1f} at {row['passes']:.2f} passes, {gain:+.1f} to "
            f"{name}, which the sweep started from ({figures})"
        )
    else:
        held = ", ".join(contender.name for contender in best)
        sentences.append(
            f"nothing beat the start on {split}: {name} has {figures}; best.yaml holds the best trial all the same, "
            f"{held}"
        )
    return sentences


def _significance(name: str, interval: Interval, base: str, split: str) -> str:
    """Describe the interval of a policy's difference on the reporting split."""
    if not all(is_known(interval[end]) for end in ("difference", "low", "high")):
        return f"{name}: AP_small cannot be compared with {base} on {split}"
    difference, low, high = interval["difference"], interval["low"], interval["high"]
    kind = "no sure gain" if low <= 0 <= high else "a loss" if high < 0 else "a gain"
    return f"{kind} on {split}: {name} has AP_small {difference:+.1f} [{low:+.1f}, {high:+.1f}] to {base}"


def render_sweep(
    rows: Sequence[TrialRow],
    ceiling: float | None,
    contenders: Sequence[Contender] = (),
    splits: tuple[str, str] = ("", ""),
    run: Mapping[str, Any] | None = None,
) -> str:
    """Render the report of a sweep by the trials of `run_sweep`, the ceiling of passes per image, and config.yaml.

    `splits` are the tuning and the reporting split of the contenders.
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
        origin_section(run),
    ]
    state = f"{len(complete)} of {len(rows)} trials saw all images; {sum(bool(row['error']) for row in rows)} failed."
    if ceiling is not None:
        state += f" The ceiling is {ceiling:g} detector passes an image."
    said = "".join(
        f'<p class="{"lead" if i == 0 else "state"}">{html.escape(line[:1].upper() + line[1:])}.</p>'
        for i, line in enumerate(sweep_verdict(contenders, ceiling, splits) if contenders else [])
    )
    return page("What paid", f'{said}<p class="state">{state}</p>{origin_line(run)}', sections)


def _beside(contenders: Sequence[Contender], splits: tuple[str, str]) -> str:
    if not contenders:
        return ""
    rows = []
    for contender in contenders:
        reported = contender.reported or {}
        figures = (
            (contender.tuned["AP_small"], 1),
            (contender.tuned["passes"], 2),
            (reported.get("AP_small"), 1),
            (reported.get("detector_passes_per_image"), 2),
        )
        cells = [figure_cell(value, digits) for value, digits in figures]
        name = html.escape(f"{contender.name}{' (start)' if contender.is_start else ''}")
        rows.append([name, *cells, interval_cell(contender.difference)])
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
            for trials, marker, colour in ((complete, "o", MUTED), (best, "D", WARM)):
                points = [(row["values"][path], row["AP_small"]) for row in trials if path in row["values"]]
                if not all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points):
                    points = [(label(str(value)), ap_small) for value, ap_small in points]
                if points:
                    panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, alpha=0.85)
            panel.set_title(label(path), loc="left", fontsize=8)
            quiet(panel, "both")
        figure.supylabel("AP of small objects (%)", fontsize=8)
        return f"<figure>{themed(to_svg(figure), 'What each field came to')}</figure>"


def _trials(rows: Sequence[TrialRow], paths: Sequence[str], best: Sequence[TrialRow]) -> str:
    if not rows:
        return ""

    def rank(row: TrialRow) -> tuple[bool, float]:
        """Order complete trials before others, then by AP_small."""
        return (row["complete"], row["AP_small"] if row["AP_small"] == row["AP_small"] else -1.0)

    ordered = sorted(rows, key=rank, reverse=True)
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
    fields = (path.rpartition(".")[2].replace("_", " ") for path in paths)
    return table("Trials", ["trial", "AP small", "passes", "AP", "state", *fields], cells)


def _number(value: Any) -> str:
    if value is None or value != value:
        return "\N{EN DASH}"
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value))
