"""The end of a batch run for those who look: analysis.json and report.html."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scalenet_ray.core.coco import ImageRecord
from scalenet_ray.engine.batch import Progress
from scalenet_ray.engine.pictures import PictureTask, choose_pictures
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.session import Session
from scalenet_ray.report.page import render_report
from scalenet_ray.report.policies import winner_of

__all__ = ["PICTURES", "ProgressLog", "write_report"]

PICTURES = 24
"""Photographs in a report, so that it stays a few megabytes."""

_MOST_POINTS = 200
_MOST_FAILURES = 200


class ProgressLog:
    """Passes progress on, and remembers it for the page.

    Args:
        report: takes each progress.
    """

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._points: defaultdict[str, list[list[float]]] = defaultdict(list)

    def __call__(self, progress: Progress) -> None:
        """Take in one progress."""
        self._points[progress.policy].append([round(progress.elapsed, 2), progress.images])
        self._report(progress)

    @property
    def points(self) -> dict[str, list[list[float]]]:
        """Policy -> [seconds since it began, images done in this run], a few hundred of them at most."""
        return {policy: rows[:: max(1, len(rows) // _MOST_POINTS)] for policy, rows in self._points.items()}


def write_report(
    session: Session,
    run: RunFolder,
    document: Mapping[str, Any],
    analysis: Mapping[str, Any],
    records: Sequence[ImageRecord],
    categories: Mapping[int, str],
    make_pictures: PictureTask,
    log: ProgressLog,
    count: int,
) -> None:
    """Write analysis.json and report.html.

    Args:
        session: the engine; it makes the pictures.
        run: the run folder.
        document: what metrics.json holds.
        analysis: from `analyse_run` or `analyse_detections`.
        records: all images of the run.
        categories: id -> name.
        make_pictures: how the pictures are made.
        log: the run's progress.
        count: the most pictures.
    """
    analysis = {**analysis, "throughput": log.points}
    run.write_json("analysis.json", analysis)
    by_id = {record.image_id: record for record in records}
    chosen = choose_pictures(analysis["images"], winner_of(document["policies"]) or "", count)
    pictures = session.call(make_pictures, [(by_id[image_id], group) for image_id, group in chosen.items()])
    files = {row["id"]: by_id[row["id"]].file_name for row in analysis["images"]}
    details = {
        **analysis,
        "pictures": pictures,
        "files": files,
        "categories": dict(categories),
        "failures": _failures(run, document),
        "run": {**run.config(), "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"), "resumed": run.resumed},
    }
    run.write_text("report.html", render_report(document, details))


def _failures(run: RunFolder, document: Mapping[str, Any]) -> dict[str, Any]:
    """What `failures_section` shows: an image that several policies gave up for one reason is one row."""
    policies: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in run.failures().to_pylist():
        policies[row["file"], row["stage"], row["reason"]].append(row["policy"])
    counts = Counter((stage, reason) for _, stage, reason in policies)
    reasons = [{"stage": stage, "reason": why, "count": count} for (stage, why), count in counts.most_common()]
    rows = [
        {"file": file, "stage": stage, "reason": reason, "policies": names}
        for (file, stage, reason), names in list(policies.items())[:_MOST_FAILURES]
    ]
    return {
        "total": document["images"]["failed"],
        "listed": len(policies),
        "reasons": (document.get("failures") or reasons)[:_MOST_FAILURES],
        "rows": rows,
    }
