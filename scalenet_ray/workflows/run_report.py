"""Results, metrics and the report of a finished run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.report.gallery import PictureTask, choose_pictures
from scalenet_ray.report.html import winner_of
from scalenet_ray.report.page import render_progress, render_report
from scalenet_ray.runs.batch import Progress
from scalenet_ray.runs.documents import (
    DetectionAnalysis,
    EvaluationAnalysis,
    FailureList,
    FailureRow,
    Metrics,
    PolicyMetrics,
    ReportDetails,
)
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import Session
from scalenet_ray.runs.summary import failure_counts, policy_cost, write_policy_results

PICTURES = 24
"""Default number of photographs in a report, which keeps it at a few megabytes."""

_SECONDS_BETWEEN_PAGES = 10
_MOST_POINTS = 200
_MOST_FAILURES = 200


class ProgressLog:
    """Progress of a run, passed on to `report`, recorded for the report, and shown in report.html meanwhile.

    A context manager around the work: if an error ends it, the page says so.
    """

    def __init__(self, report: Callable[[Progress], None], run: RunFolder) -> None:
        self._report, self._run = report, run
        self._points: defaultdict[str, list[list[float]]] = defaultdict(list)
        self._latest: dict[str, Progress] = {}
        self._written: float | None = None

    def __enter__(self) -> ProgressLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error in the block, write the page a last time."""
        if error is not None and self._written is not None:
            self._write_page(refresh=None)

    def __call__(self, progress: Progress) -> None:
        """Record one progress, and pass it on."""
        self._points[progress.policy].append([round(progress.elapsed, 2), progress.images])
        self._latest[progress.policy] = progress
        self._report(progress)
        now = time.monotonic()
        # A run that is refused before its first result leaves no files.
        if progress.images and (self._written is None or now - self._written >= _SECONDS_BETWEEN_PAGES):
            self._write_page(refresh=_SECONDS_BETWEEN_PAGES)
            self._written = now

    def _write_page(self, refresh: int | None) -> None:
        # The page alone is no reason to end a run.
        with suppress(OSError):
            text = render_progress(list(self._latest.values()), self._run.config(), refresh)
            self._run.write_text("report.html", text)

    @property
    def points(self) -> dict[str, list[list[float]]]:
        """Policy -> [seconds since its start, images done in this run], at most a few hundred points each."""
        return {policy: rows[:: max(1, len(rows) // _MOST_POINTS)] for policy, rows in self._points.items()}


def write_summary(
    session: Session,
    run: RunFolder,
    figures: Mapping[str, Mapping[str, Any]],
    total: int,
    *,
    name_files: bool = False,
) -> Metrics:
    """Write failures.parquet, the COCO results and metrics.json of a finished run; returns the content of metrics.json.

    results.json holds the first policy's results, results/NAME.json those of each; with `name_files` each result has
    its image's file and size. Speed and cost are added to the policies' `figures`.
    """
    policies = list(figures)
    failures = run.write_failures(policies)
    for i, policy in enumerate(policies):
        names = [f"results/{policy}.json", *(["results.json"] if i == 0 else [])]
        session.call(write_policy_results, run.uri, policy, names, name_files)
    failed = len(set(failures.column("image_id").to_pylist()))
    document: Metrics = {
        "images": {"total": total, "done": total - failed, "failed": failed},
        "failures": failure_counts(failures),
        "policies": {
            policy: cast(PolicyMetrics, {**figures[policy], **run.speed(policy), **policy_cost(run, policy)})
            for policy in policies
        },
    }
    run.write_json("metrics.json", document)
    return document


def write_report(
    session: Session,
    run: RunFolder,
    *,
    document: Metrics,
    analysis: EvaluationAnalysis | DetectionAnalysis,
    images: ImageRecords,
    categories: Mapping[int, str],
    make_pictures: PictureTask,
    progress: ProgressLog,
    pictures: int,
) -> None:
    """Write analysis.json and report.html with at most so many pictures, which are made outside the driver."""
    analysis["throughput"] = progress.points
    run.write_json("analysis.json", analysis)
    chosen = choose_pictures(analysis["images"], winner_of(document["policies"]), pictures)
    made = session.call(make_pictures, [(images.by_id(image_id), group) for image_id, group in chosen.items()])
    files = {row["id"]: images.by_id(row["id"]).file_name for row in analysis["images"]}
    details = {
        **analysis,
        "pictures": made,
        "files": files,
        "categories": dict(categories),
        "failures": _failures(run, document),
        "run": {**run.config(), "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"), "resumed": run.resumed},
    }
    run.write_text("report.html", render_report(document, cast(ReportDetails, details)))


def _failures(run: RunFolder, document: Metrics) -> FailureList:
    """Input of `failures_section`: one row for an image that fails under several policies for the same reason."""
    policies: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in run.failures().to_pylist():
        policies[row["file"], row["stage"], row["reason"]].append(row["policy"])
    rows: list[FailureRow] = [
        {"file": file, "stage": stage, "reason": reason, "policies": names}
        for (file, stage, reason), names in list(policies.items())[:_MOST_FAILURES]
    ]
    return {
        "total": document["images"]["failed"],
        "listed": len(policies),
        "reasons": document["failures"],
        "rows": rows,
    }


def on_cpu(networks: NetworkSpec) -> NetworkSpec:
    """Networks for the report's pictures: tasks have no GPU, and most CPUs emulate bfloat16 slowly."""
    return replace(networks, device="cpu", mixed_precision=False)
