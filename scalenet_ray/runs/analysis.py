"""Analysis of a finished run: bootstrap intervals, precision-recall curves, error types, objects gained and lost.

Needs the run folder and the annotations only; runs as a Ray task.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.data.coco import CocoDataset, objects_of, read_annotations
from scalenet_ray.data.schemas import detections_from_structs
from scalenet_ray.evaluation.ap import match_results, precision_curves
from scalenet_ray.evaluation.compare import are_new, found_and_lost, gained_and_lost, paired_intervals
from scalenet_ray.evaluation.tide import Explained, error_breakdown, explain
from scalenet_ray.runs.documents import ClassCounts, DetectionAnalysis, EvaluationAnalysis, FoundCounts, ImageChanges
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import detections_by_image
from scalenet_ray.runs.summary import coco_results

__all__ = [
    "INTERVALS_UP_TO",
    "analyse_detections",
    "analyse_run",
    "whole_passes",
]

INTERVALS_UP_TO = 5000
"""Bootstrap intervals are computed by default up to this many images: their time grows with the number of images."""


_LISTED_IMAGES = 5000
_MOST_LISTED = 10


def _median_side(areas: Sequence[np.ndarray]) -> float | None:
    """Median of the roots of areas, in image pixels; None without any."""
    return round(float(np.median(np.sqrt(np.concatenate(areas)))), 1) if areas else None


def analyse_run(
    run_uri: str, policies: Sequence[str], baseline: str, annotations: str, image_ids: Sequence[int], intervals: bool
) -> EvaluationAnalysis:
    """Analyse the detections of all policies.

    Args:
        run_uri: the run folder, with all policies finished.
        policies: their names.
        baseline: the policy that the others are compared with.
        annotations: address of the instances file.
        image_ids: the images to evaluate.
        intervals: whether to compute paired bootstrap intervals.

    Returns:
        "compared_with"; "shown_score"; "differences" (`paired_intervals`; {} without `intervals`); "curves": policy ->
        `precision_curves`; "errors": policy -> `error_breakdown`; "changes": policy -> `gained_and_lost`; "images": one
        row per image, for the images that changed most: "id", "objects" (their number), "labels" (of its objects), and
        "by": policy -> [found, gained, lost], and "cost" (`ImageChanges`).
    """
    run, dataset = RunFolder(run_uri), read_annotations(annotations)
    matched = {name: match_results(dataset, coco_results(run, name), image_ids=image_ids) for name in policies}
    curves = {name: precision_curves(evaluation) for name, evaluation in matched.items()}
    differences = paired_intervals(matched, baseline) if intervals and len(policies) > 1 else {}
    explained = {name: _explain_all(run, name, dataset, image_ids) for name in policies}
    changes = {
        name: gained_and_lost(explained[baseline], images, dataset.categories, SHOWN_SCORE)
        for name, images in explained.items()
    }
    return {
        "compared_with": baseline,
        "shown_score": SHOWN_SCORE,
        "differences": differences,
        "curves": curves,
        "errors": {name: error_breakdown(images, SHOWN_SCORE) for name, images in explained.items()},
        "changes": changes,
        "images": _with_costs(_image_rows(explained, baseline, image_ids), run, policies),
    }


def _explain_all(run: RunFolder, policy: str, dataset: CocoDataset, image_ids: Sequence[int]) -> list[Explained]:
    found = dict(detections_by_image(run, policy))
    return [explain(found.get(image_id, Detections.empty()), objects_of(dataset, image_id)) for image_id in image_ids]


def _image_rows(
    explained: Mapping[str, Sequence[Explained]], baseline: str, image_ids: Sequence[int]
) -> list[ImageChanges]:
    rows: list[ImageChanges] = []
    for i, image_id in enumerate(image_ids):
        before = explained[baseline][i]
        by: dict[str, list[int | None]] = {}
        for name, images in explained.items():
            gained, lost = found_and_lost(before, images[i], SHOWN_SCORE)
            by[name] = [int((images[i].found_at >= SHOWN_SCORE).sum()), int(gained.sum()), int(lost.sum())]
        labels = np.unique(before.object_labels).tolist()
        rows.append({"id": image_id, "objects": len(before.object_labels), "labels": labels, "by": by})
    return _most_changed(rows)


def _most_changed(rows: list[ImageChanges]) -> list[ImageChanges]:
    """The rows with the most changes under any policy, in the order of the images."""
    by_change = sorted(
        rows, key=lambda row: -max((gained or 0) + (lost or 0) for _, gained, lost in row["by"].values())
    )
    listed = {row["id"] for row in by_change[:_LISTED_IMAGES]}
    return [row for row in rows if row["id"] in listed]


def _with_costs(rows: list[ImageChanges], run: RunFolder, policies: Sequence[str]) -> list[ImageChanges]:
    """The rows, with the cost of each image."""
    costs = {}
    for policy in policies:
        table = run.table("images", policy, ["image_id", "detector_pixels", "zoom"])
        columns = (table.column(name).to_pylist() for name in ("image_id", "detector_pixels", "zoom"))
        costs[policy] = {
            image_id: None if not zoom else [round(pixels / 1e6, 3), round(zoom, 2)]
            for image_id, pixels, zoom in zip(*columns, strict=True)
        }
    return [{**row, "cost": {policy: costs[policy].get(row["id"]) for policy in policies}} for row in rows]


def whole_passes(run: RunFolder, policy: str) -> Iterator[tuple[int, Detections]]:
    """Iterate over (image id, detections of the pass over the whole image alone, `ImageResult.whole_pass`).

    Images without such a pass, and images of older versions, are skipped.
    """
    table = run.table("images", policy, ["image_id", "whole_pass"])
    for image_id, boxes in zip(table.column("image_id").to_pylist(), table.column("whole_pass"), strict=True):
        if boxes.is_valid:
            yield image_id, detections_from_structs(boxes.as_py())


def analyse_detections(run_uri: str, policy: str, image_ids: Sequence[int]) -> DetectionAnalysis:
    """Compare a policy's detections with those of its pass over the whole image, without ground truth.

    A box is new if it does not match any box of the whole image's pass (`are_new`); a box of that pass is lost if no
    box of the policy matches it. Boxes that score less than `SHOWN_SCORE` are ignored.

    Args:
        run_uri: the run folder, with the policy finished.
        policy: the policy's name.
        image_ids: the images to analyse.

    Returns:
        "shown_score"; "images": rows as in `analyse_run`, where new boxes are gained, and gained and lost are None for
        an image without a pass over the whole image; "found": see `FoundCounts`, with the classes by descending number
        of boxes.
    """
    run = RunFolder(run_uri)
    whole = dict(whole_passes(run, policy))
    found = {image_id: boxes[boxes.scores >= SHOWN_SCORE] for image_id, boxes in detections_by_image(run, policy)}
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    areas: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    rows: list[ImageChanges] = []
    for image_id in image_ids:
        after, before = found.get(image_id, Detections.empty()), whole.get(image_id)
        for label in np.unique(after.labels).tolist():
            counts[label]["images"] += 1
            areas[label].append(after.areas[after.labels == label])
        changes: list[int | None] = [None, None]
        shown = {"boxes": after}
        if before is not None:
            shown |= {
                "after": after,
                "before": before,
                "new": after[are_new(after, before)],
                "lost": before[are_new(before, after)],
            }
            changes = [len(shown["new"]), len(shown["lost"])]
        for name, boxes in shown.items():
            for label in boxes.labels.tolist():
                counts[label][name] += 1
        rows.append(
            {
                "id": image_id,
                "objects": 0,
                "labels": np.unique(after.labels).tolist(),
                "by": {policy: [len(after), *changes]},
            }
        )
    names = ("boxes", "images", "after", "before", "new", "lost")
    by_class = [
        cast(
            ClassCounts,
            {"label": label, **{name: count[name] for name in names}, "median_side": _median_side(areas[label])},
        )
        for label, count in counts.items()
    ]
    most = sorted(rows, key=lambda row: -(row["by"][policy][0] or 0))[:_MOST_LISTED]
    found_counts = {
        **{name: sum(count[name] for count in counts.values()) for name in names},
        "images": sum(bool(row["by"][policy][0]) for row in rows),
        "compared": len(whole.keys() & set(image_ids)),
        "by_class": sorted(by_class, key=lambda row: (-row["boxes"], row["label"])),
        "most": [{"id": row["id"], "boxes": row["by"][policy][0]} for row in most if row["by"][policy][0]],
    }
    return {
        "shown_score": SHOWN_SCORE,
        "images": _with_costs(_most_changed(rows), run, [policy]),
        "found": cast(FoundCounts, found_counts),
    }
