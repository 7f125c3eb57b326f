"""Batch jobs over images: detect or evaluate policies, write results and the report."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data import storage
from scalenet_ray.data.coco import (
    ImageRecord,
    Listing,
    annotations_uri,
    images_and_categories,
    oracle_from,
    unknown_categories,
)
from scalenet_ray.engine.session import Session
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.report.charts import policy_plot
from scalenet_ray.report.gallery import PictureTask, choose_pictures
from scalenet_ray.report.page import render_report
from scalenet_ray.report.tables import winner_of
from scalenet_ray.runs.analysis import INTERVALS_UP_TO, analyse_run
from scalenet_ray.runs.batch import Progress, image_opener, run_policy
from scalenet_ray.runs.documents import (
    DetectionAnalysis,
    EvaluationAnalysis,
    FailureCount,
    FailureList,
    FailureRow,
    Metrics,
    PolicyMetrics,
    ReportDetails,
)
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.inputs import annotation_digests, check_ground_truth
from scalenet_ray.runs.summary import evaluate_policy, failure_counts, policy_cost, write_policy_results

__all__ = [
    "PICTURES",
    "CocoSplit",
    "ProgressLog",
    "check_networks",
    "check_split",
    "evaluate_policies",
    "open_split",
    "tell_remarks",
    "write_report",
    "write_summary",
]

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
    document: Metrics,
    analysis: EvaluationAnalysis | DetectionAnalysis,
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
    analysis["throughput"] = log.points
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
    run.write_text("report.html", render_report(document, cast(ReportDetails, details)))


def _failures(run: RunFolder, document: Metrics) -> FailureList:
    """What `failures_section` shows: an image that several policies gave up for one reason is one row."""
    policies: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in run.failures().to_pylist():
        policies[row["file"], row["stage"], row["reason"]].append(row["policy"])
    counts = Counter((stage, reason) for _, stage, reason in policies)
    reasons: list[FailureCount] = [
        {"stage": stage, "reason": reason, "count": count} for (stage, reason), count in counts.most_common()
    ]
    rows: list[FailureRow] = [
        {"file": file, "stage": stage, "reason": reason, "policies": names}
        for (file, stage, reason), names in list(policies.items())[:_MOST_FAILURES]
    ]
    return {
        "total": document["images"]["failed"],
        "listed": len(policies),
        "reasons": (document.get("failures") or reasons)[:_MOST_FAILURES],
        "rows": rows,
    }


def write_summary(session: Session, run: RunFolder, figures: Mapping[str, Mapping[str, Any]], total: int) -> Metrics:
    """Gather a run's end into its folder: failures.parquet, COCO results, metrics.json.

    results.json is of the first policy; results/NAME.json of each.

    Args:
        session: the engine.
        run: the run folder, all policies worked through.
        figures: policy -> what was measured; its speed and its cost are added here.
        total: images of the run.

    Returns:
        What metrics.json holds.
    """
    policies = list(figures)
    failures = run.write_failures(policies)
    for i, policy in enumerate(policies):
        names = [f"results/{policy}.json", *(["results.json"] if i == 0 else [])]
        session.call(write_policy_results, run.uri, policy, names)
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


@dataclass(frozen=True)
class CocoSplit:
    """A split with its objects.

    Attributes:
        folder: address of the images.
        annotations: address of the instances file.
        images: the images that count.
        categories: id -> name.
        unused_categories: ids of those that no annotation is of.
        remarks: what is taken otherwise than it is written, a line each.
        max_pixels: larger images are refused before they are decoded.
    """

    folder: str
    annotations: str
    images: Sequence[ImageRecord]
    categories: dict[int, str]
    unused_categories: frozenset[int]
    remarks: tuple[str, ...]
    max_pixels: int


def open_split(session: Session, data: str, split: str, *, limit: int | None, max_megapixels: float) -> CocoSplit:
    """A split of a data set.

    Args:
        session: the engine; the annotations are read away from the driver.
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: its name.
        limit: only the first so many images.
        max_megapixels: larger images are refused before they are decoded.
    """
    annotations = annotations_uri(data, split)
    found: Listing = session.call(images_and_categories, annotations)
    return CocoSplit(
        storage.join(data, split),
        annotations,
        found.images[:limit],
        found.categories,
        found.unused_categories,
        found.remarks,
        round(max_megapixels * 1e6),
    )


def tell_remarks(split: CocoSplit, detector_categories: Mapping[int, str], say: Callable[[str], None]) -> None:
    """Say what of a split is taken otherwise than it is written, before a run begins."""
    remarks = list(split.remarks)
    if unknown := unknown_categories(detector_categories, split.categories, split.unused_categories):
        names = f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        remarks.append(f"categories that no annotation is of and the detector does not know: {names}; left out")
    for remark in remarks:
        say(f"{split.annotations}: {remark}")


def check_split(session: Session, run: RunFolder, split: CocoSplit) -> None:
    """Refuse to go on with a run whose images, categories or objects are other ones by now; raises `UserError`."""
    digests = session.call(annotation_digests, split.annotations, [record.image_id for record in split.images])
    check_ground_truth(run, split.images, split.categories, digests)


def check_networks(session: Session, networks: NetworkSpec, policies: Sequence[Policy], split: CocoSplit) -> None:
    """Try the networks on the first images of a split, away from the driver; raises as `NetworkSpec.check` does."""
    open_image = image_opener(split.folder, split.max_pixels)
    session.call(
        networks.check, policies, split.categories, split.unused_categories, split.images[:MOST_FAILED], open_image
    )


def evaluate_policies(
    session: Session,
    run: RunFolder,
    policies: Sequence[Policy],
    networks: NetworkSpec,
    split: CocoSplit,
    report: Callable[[Progress | str], None],
    *,
    compare_with: str | None = None,
    pictures: int = PICTURES,
    retry_failed: bool = False,
) -> Metrics:
    """Work through all policies and evaluate them; writes metrics.json, analysis.json, policies.svg and report.html.

    Args:
        session: the engine.
        run: the run folder, begun; what it has already is not done again.
        policies: in the order in which they are done.
        networks: the detector and Scale Net.
        split: the images.
        report: takes the progress, and a line for what comes after the last image.
        compare_with: one of the policies; how the others differ from it is measured, with bootstrap intervals. By
            default the whole image, or the first policy that reads no ground truth, and for very many images without
            intervals.
        pictures: photographs in the report.
        retry_failed: also try those images again that failed before.

    Returns:
        What metrics.json holds.
    """
    ids = [record.image_id for record in split.images]
    check_split(session, run, split)
    open_image = image_opener(split.folder, split.max_pixels)
    log = ProgressLog(report)
    reads_features = session.call(networks.reads_features, policies)
    metrics: dict[str, Any] = {}
    for policy in policies:
        made = replace(_networks(policy, networks, split), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=made, open_image=open_image)
        run_policy(split.images, policy.name, start, run, log, retry_failed=retry_failed)
        figures = session.call(evaluate_policy, run.uri, policy.name, split.annotations, ids)
        metrics[policy.name] = {"kind": policy.kind, **figures.pop("bbox"), **figures}
    report("all images are done: comparing what was found, and writing the report")
    document = write_summary(session, run, metrics, len(split.images))
    base = compare_with or _baseline(policies)
    intervals = compare_with is not None or len(ids) <= INTERVALS_UP_TO
    analysis: EvaluationAnalysis = session.call(
        analyse_run, run.uri, list(metrics), base, split.annotations, ids, intervals
    )
    if analysis["differences"]:
        document["compared_with"] = base
        document["differences"] = analysis["differences"]
        run.write_json("metrics.json", document)
    run.write_text("policies.svg", policy_plot(document))
    # A task of the engine has no GPU of its own, and a few looks need none. Most CPUs only imitate bfloat16.
    on_cpu = replace(networks, device="cpu", mixed_precision=False)
    looks = [(policy, _networks(policy, on_cpu, split)) for policy in policies]
    task = PictureTask(run.uri, looks, open_image, split.annotations, base)
    write_report(session, run, document, analysis, split.images, split.categories, task, log, pictures)
    return document


def _baseline(policies: Sequence[Policy]) -> str:
    """What the others are compared with: the whole image, else the first policy that reads no ground truth, if any."""
    whole = [policy for policy in policies if policy.is_whole]
    honest = [policy for policy in policies if not policy.reads_truth]
    named = [policy for policy in whole if policy.name == "whole"]
    return next(policy.name for policy in (*named, *whole, *honest, *policies))


def _networks(policy: Policy, names: NetworkSpec, split: CocoSplit) -> NetworkFactories:
    return NetworkFactories(
        partial(names.load_detector, split.categories, split.unused_categories),
        partial(oracle_from, split.annotations) if policy.reads_truth else names.load_scale_net,
    )
