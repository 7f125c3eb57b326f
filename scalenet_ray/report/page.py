"""report.html of a batch run."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scalenet_ray.evaluation.compare import closer_look_in_words
from scalenet_ray.report.charts import (
    cost_chart,
    curves_chart,
    errors_chart,
    found_chart,
    policy_plot,
    themed,
    throughput_chart,
)
from scalenet_ray.report.html import (
    cards,
    failures_section,
    figure_cell,
    is_known,
    origin_line,
    origin_section,
    page,
    policy_rows,
    reads_truth,
    section,
    table,
    winner_of,
)
from scalenet_ray.runs.batch import Progress
from scalenet_ray.runs.documents import Changes, Metrics, ReportDetails

_MAX_CHANGED_CLASSES = 16
_POLICIES = "Every way to zoom, on the same images with the same frozen detector."
_BEST = " The marked one finds most small objects without reading the ground truth."
_ERRORS = (
    "Each box that is wrong is wrong in one way. The bars say what AP at IoU .5 would gain if that alone were mended "
    "(TIDE's definitions); the counts are of boxes that score {score} or more."
)
_SMALL = (
    "The small objects, under 32 x 32 pixels, are what zooming is for. Where policies were compared, bars show where "
    "95&nbsp;% of the paired bootstrap's differences lie."
)
_KEYS = (
    "The photograph, what was seen in it and where it looked again, and the boxes. <kbd>Enter</kbd> opens one, "
    "<kbd>\N{LEFTWARDS ARROW}</kbd> <kbd>\N{RIGHTWARDS ARROW}</kbd> turn the pages, <kbd>Esc</kbd> closes."
)


def render_report(document: Metrics, details: ReportDetails) -> str:
    """Render the report of a run by its metrics.json and the other inputs: HTML, self-contained in one file."""
    policies = document["policies"]
    measured = any(is_known(row.get("AP_small")) for row in policies.values())
    winner = winner_of(policies)
    marked = measured and not reads_truth(policies[winner])
    base = details.get("compared_with")
    changes = details.get("changes", {}).get(winner)
    head, rows = policy_rows(document)
    plot = policy_plot(document)
    plot_title = "AP of small objects against detector passes"
    sections = [
        section("facts", "At a glance", "", _facts(document, winner, base, changes, details)),
        failures_section(details.get("failures")),
        _found(details),
        section(
            "policies",
            "Policies",
            _POLICIES + (_BEST if marked else "") if measured else "What each policy did.",
            table("Policies", head, rows, list(policies).index(winner) if marked else None),
        ),
        section(
            "price",
            "Small objects found, for a price",
            _SMALL,
            _figure(themed(plot, plot_title)) if plot else "",
        ),
        _changes(changes, base, winner),
        section(
            "curves",
            "Precision and recall",
            "How many of the boxes are right, the further down the list one goes.",
            _figure(curves_chart(details.get("curves", {}))),
        ),
        section(
            "errors",
            "What goes wrong",
            _ERRORS.format(score=details["shown_score"]),
            _figure(errors_chart(details.get("errors", {}))),
        ),
        section(
            "cost",
            "Time and pixels",
            "What the networks computed for an image, and how the run went.",
            _pair(cost_chart(policies), throughput_chart(details.get("throughput", {}))),
        ),
        origin_section(details.get("run")),
        _gallery(details),
    ]
    lead = _lead(document, winner, base, details)
    return page("What a closer look found", lead, sections, _data(details, base, winner))


def render_progress(latest: Sequence[Progress], run: Mapping[str, Any], refresh: int | None) -> str:
    """Render report.html of a run at work by the last progress of each policy and its config.yaml.

    `refresh` is in seconds; None for a run that has stopped.
    """
    bars = "".join(
        f'<p class="words">{html.escape(str(progress))}<progress value="{progress.done}" max="{progress.total}" '
        f'aria-label="{html.escape(progress.policy)}"></progress></p>'
        for progress in latest
    )
    state = "This page follows the run." if refresh else "The run has stopped; --resume goes on with it."
    lead = f'<p class="state">{state} As of {time.strftime("%Y-%m-%d %H:%M:%S %z")}.</p>{origin_line(run)}'
    sections = [section("progress", "Images", "", bars), origin_section(run)]
    return page("At work" if refresh else "Stopped", lead, sections, refresh=refresh)


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def _pair(*svgs: str) -> str:
    return f'<div class="pair">{"".join(map(_figure, svgs))}</div>'


def _lead(document: Metrics, winner: str, base: str | None, details: ReportDetails) -> str:
    """The paragraphs below the title, as HTML."""
    images = document["images"]
    parts = []
    if "found" in details:
        parts.append(f'<p class="lead">{_found_sentence(details, document, winner)}</p>')
    if base and base != winner:
        before, after = document["policies"][base], document["policies"][winner]
        ap_small = after.get("AP_small")
        if is_known(ap_small):
            reading = ", reading the ground truth," if reads_truth(after) else ""
            sentence = (
                f"<b>{html.escape(winner)}</b>{reading} takes AP of small objects from "
                f"{before.get('AP_small') or 0:.1f} to <b>{ap_small:.1f}</b>, for "
                f"{after['detector_passes_per_image']:.2f} detector passes an image in place of "
                f"{before['detector_passes_per_image']:.2f}."
            )
            parts.append(f'<p class="lead">{sentence}</p>')
    reason = " (failures.parquet names each with its reason)" if images["failed"] else ""
    state = f"{images['done']} of {images['total']} images done, {images['failed']} failed{reason}."
    parts.append(f'<p class="state{" bad" if images["failed"] else ""}">{state}</p>')
    return "".join([*parts, origin_line(details.get("run"))])


def _found_sentence(details: ReportDetails, document: Metrics, policy: str) -> str:
    """The boxes found without ground truth, and the difference from the whole images' passes, as HTML."""
    assert "found" in details
    found, done = details["found"], document["images"]["done"]
    boxes = (
        f"<b>{found['boxes']}</b> boxes that score {details['shown_score']:g} or more, in {found['images']} of {done} "
        "images."
    )
    if not found["compared"]:
        why = f"{html.escape(policy)} made no pass over the whole image alone, or an older version worked on it"
        return f"{boxes} Nothing says which are new: {why}."
    among = "That is " if found["compared"] == done else f"In the {found['compared']} images with such a pass, "
    return f"{boxes} {among}<b>{closer_look_in_words(found)}</b>, with the same detector, thresholds and NMS."


def _found(details: ReportDetails) -> str:
    """The section of the boxes found without ground truth, by class."""
    found = details.get("found")
    if not found or not found["by_class"]:
        return ""
    names = details.get("categories", {})
    known = bool(found["compared"])
    rows = [
        [
            html.escape(names.get(row["label"], f"category {row['label']}")),
            str(row["boxes"]),
            str(row["images"]),
            *([str(row[key]) for key in ("before", "new", "lost")] if known else []),
            # A class that the policy lost altogether has no boxes.
            "\N{EN DASH}" if row["median_side"] is None else f"{row['median_side']:.0f}",
        ]
        for row in found["by_class"]
    ]
    compared = ["whole image alone", "new", "lost"] if known else []
    head = ["class", "boxes", "images", *compared, "median side, px"]
    meant = (
        " New is what overlaps no box of its class by half that the pass over the whole image finds alone; lost is "
        "what only that pass finds."
        if known
        else ""
    )
    words = f"Boxes that score {details['shown_score']:g} or more, the most frequent class first.{meant}"
    most = [
        [f'<span title="{html.escape(file)}">{html.escape(file.rpartition("/")[2])}</span>', str(row["boxes"])]
        for row in found["most"]
        for file in [row.get("file", str(row["id"]))]
    ]
    images = table("Images with most boxes", ["image", "boxes"], most)
    return section("found", "What was found", words, table("Boxes by class", head, rows), images)


def _facts(document: Metrics, winner: str, base: str | None, changes: Changes | None, details: ReportDetails) -> str:
    """The large figures at the top."""
    row = document["policies"][winner]
    facts = []
    intervals = document.get("differences", {}).get(winner, {})
    for metric, title in (
        ("AP_small", "AP of small objects"),
        ("AP", "AP of all objects"),
        ("AP_large", "AP of large objects"),
    ):
        value = row.get(metric)
        if is_known(value):
            interval = intervals.get(metric)
            remark = (
                f"{interval['difference']:+.1f} to {base}  [{interval['low']:+.1f}, {interval['high']:+.1f}]"
                if interval
                else ""
            )
            facts.append((f"{value:.1f}", title, remark))
    if changes:
        objects, before, after = (
            sum(counts[key] for counts in changes["by_class"]) for key in ("objects", "before", "after")
        )
        remark = f"{before} without a closer look" if base != winner else ""
        facts.append((f"{after} of {objects}", "small objects found", remark))
    found = details.get("found")
    if found:
        done = document["images"]["done"]
        facts.append((str(found["boxes"]), "boxes found", f"score {details['shown_score']:g} or more"))
        facts.append((f"{found['images']} of {done}", "images have one", ""))
        new = str(found["new"]) if found["compared"] else "\N{EN DASH}"
        against = f"{found['before']} in the whole image alone, {found['lost']} lost" if found["compared"] else ""
        facts.append((new, "new by looking closer", against))
    facts.append((f"{row['detector_passes_per_image']:.2f}", "detector passes an image", f"policy {winner}"))
    if "images_per_second" in row:
        speed = row["images_per_second"]
        measured = is_known(speed)
        facts.append((figure_cell(speed, 1), "images a second", "" if measured else "too short to tell"))
    return cards(facts)


def _changes(changes: Changes | None, base: str | None, winner: str) -> str:
    """The section of the objects that the winner gained and lost."""
    if not changes or not base or base == winner:
        return ""
    classes = changes["by_class"]
    left = len(classes) - _MAX_CHANGED_CLASSES
    more = f" Of {len(classes)} classes the {_MAX_CHANGED_CLASSES} that gained most." if left > 0 else ""
    words = (
        f"Found by {html.escape(base)} and by {html.escape(winner)}: first by the side of the object in pixels, then "
        f"the small objects by class. Behind each line: gained, lost, and how many there are.{more}"
    )
    by_side = found_chart(changes["by_side"], base, winner, "Objects found by size")
    by_class = found_chart(classes[:_MAX_CHANGED_CLASSES], base, winner, "Small objects found by class")
    return section("changes", "Where objects were gained and lost", words, _pair(by_side, by_class))


def _gallery(details: ReportDetails) -> str:
    if not details["images"]:
        return ""
    return section(
        "pictures", "Pictures", _KEYS, '<div id="gallery"><noscript>The pictures need JavaScript.</noscript></div>'
    )


def _data(details: ReportDetails, base: str | None, winner: str) -> dict[str, Any] | None:
    """The gallery's data, read by report.js."""
    if not details["images"]:
        return None
    names = list(details["images"][0]["by"])
    return {
        "policies": names,
        "base": base,
        "chosen": winner if winner in names else names[0],
        "score": details["shown_score"],
        "truth": "changes" in details,
        "compared": "found" not in details or bool(details["found"]["compared"]),
        "categories": details.get("categories", {}),
        "files": details.get("files", {}),
        "images": details["images"],
        "pictures": details.get("pictures", []),
    }
