"""Analysis of a finished run: bootstrap intervals, precision-recall curves, error types, objects gained and lost.

Needs the run folder and the annotations only; runs as a Ray task.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from heapq import nlargest
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np

from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.data.coco import CocoDataset, objects_of, read_annotations
from scalenet_ray.data.schemas import detections_from_structs
from scalenet_ray.evaluation.ap import precision_curves
from scalenet_ray.evaluation.compare import are_new, found_and_lost, gained_and_lost, paired_intervals
from scalenet_ray.evaluation.matching import match_results
from scalenet_ray.evaluation.tide import Explained, error_breakdown, explain, join
from scalenet_ray.runs.documents import DetectionAnalysis, EvaluationAnalysis, FoundCounts, ImageChanges
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import rows_in_order
from scalenet_ray.runs.summary import coco_results

INTERVALS_UP_TO = 5000
"""Bootstrap intervals are computed by default up to this many images: their time grows with the number of images."""


_LISTED_IMAGES = 5000
_MOST_LISTED = 10
_IMAGES_AT_ONCE = 1000


def analyse_run(
    run_uri: str, policies: Sequence[str], baseline: str, annotations: str, image_ids: np.ndarray, intervals: bool
) -> EvaluationAnalysis:
    """Analyse the detections of all policies of a finished run, compared with those of `baseline`.

    `annotations` is the address of the instances file, `image_ids` are [N] int64, ascending. Without `intervals`
    "differences" is {}; "images" are the images that changed most.
    """
    run, dataset = RunFolder(run_uri), read_annotations(annotations)
    matched = {name: match_results(dataset, coco_results(run, name), image_ids=image_ids) for name in policies}
    curves = {name: precision_curves(matches) for name, matches in matched.items()}
    differences = paired_intervals(matched, baseline) if intervals and len(policies) > 1 else {}
    explained, rows = _explain_all(run, policies, baseline, dataset, image_ids)
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
        "images": rows,
    }


def _explain_all(
    run: RunFolder, policies: Sequence[str], baseline: str, dataset: CocoDataset, image_ids: np.ndarray
) -> tuple[dict[str, list[Explained]], list[ImageChanges]]:
    """Policy -> matchings of groups of images, and the images that changed most."""
    joined: dict[str, list[Explained]] = {name: [] for name in policies}
    changed: list[ImageChanges] = []
    by_image = zip(*(_explained(run, name, dataset, image_ids) for name in policies), strict=True)
    for start in range(0, len(image_ids), _IMAGES_AT_ONCE):
        ids = image_ids[start : start + _IMAGES_AT_ONCE].tolist()
        group = [dict(zip(policies, images, strict=True)) for images in islice(by_image, len(ids))]
        changed = _most_changed(
            [*changed, *(_image_row(image_id, images, baseline) for image_id, images in zip(ids, group, strict=True))]
        )
        for name, parts in joined.items():
            parts.append(join([images[name].explained for images in group]))
    return joined, changed


class _ExplainedImage(NamedTuple):
    explained: Explained
    cost: list[float] | None


def _explained(run: RunFolder, policy: str, dataset: CocoDataset, image_ids: np.ndarray) -> Iterator[_ExplainedImage]:
    """Match the detections of each of the images; those without a record have none."""
    rows = rows_in_order(run, policy, ["image_id", "detector_pixels", "zoom"])
    row, found = next(rows, ({}, Detections.empty()))
    for image_id in image_ids.tolist():
        while row and row["image_id"] < image_id:
            row, found = next(rows, ({}, Detections.empty()))
        is_there = bool(row) and row["image_id"] == image_id
        explained = explain(found if is_there else Detections.empty(), objects_of(dataset, image_id))
        yield _ExplainedImage(explained, _cost(row) if is_there else None)


def _cost(row: Mapping[str, Any]) -> list[float] | None:
    """The cost of an image by its record, see `ImageChanges`."""
    return [round(row["detector_pixels"] / 1e6, 3), round(row["zoom"], 2)] if row["zoom"] else None


def _image_row(image_id: int, images: Mapping[str, _ExplainedImage], baseline: str) -> ImageChanges:
    before = images[baseline].explained
    by: dict[str, list[int | None]] = {}
    for name, (explained, _) in images.items():
        gained, lost = found_and_lost(before, explained, SHOWN_SCORE)
        by[name] = [int((explained.found_at >= SHOWN_SCORE).sum()), int(gained.sum()), int(lost.sum())]
    labels = np.unique(before.object_labels).tolist()
    cost = {name: image.cost for name, image in images.items()}
    return {"id": image_id, "objects": len(before.object_labels), "labels": labels, "by": by, "cost": cost}


def _most_changed(rows: Sequence[ImageChanges]) -> list[ImageChanges]:
    """The rows with the most changes under any policy, in the order of the images."""
    chosen = nlargest(
        _LISTED_IMAGES, rows, lambda row: max((gained or 0) + (lost or 0) for _, gained, lost in row["by"].values())
    )
    return sorted(chosen, key=lambda row: row["id"])


def analyse_detections(run_uri: str, policy: str) -> DetectionAnalysis:
    """Compare a policy's detections with those of its pass over the whole image, without ground truth.

    A box is new if it does not match any box of the whole image's pass (`are_new`); a box of that pass is lost if no
    box of the policy matches it. Boxes that score less than `SHOWN_SCORE` are ignored.

    Returns:
        "images" as in `analyse_run`, where new boxes are gained, and gained and lost are None for an image without a
        pass over the whole image; "found" has the classes by descending number of boxes.
    """
    tally = _DetectionTally(policy)
    columns = ["image_id", "whole_pass", "detector_pixels", "zoom"]
    records = rows_in_order(RunFolder(run_uri), policy, columns)
    changed: list[ImageChanges] = []
    most: list[ImageChanges] = []
    while rows := [tally.add(row, found) for row, found in islice(records, _IMAGES_AT_ONCE)]:
        changed = _most_changed([*changed, *rows])
        most = nlargest(_MOST_LISTED, [*most, *rows], key=lambda row: row["by"][policy][0] or 0)
    boxes_of = [(row["id"], row["by"][policy][0]) for row in most]
    return {
        "shown_score": SHOWN_SCORE,
        "images": changed,
        "found": cast(
            FoundCounts,
            {**tally.counts(), "most": [{"id": image_id, "boxes": boxes} for image_id, boxes in boxes_of if boxes]},
        ),
    }


class _DetectionTally:
    """Counts of boxes by class, over images added one by one."""

    _NAMES = ("boxes", "images", "after", "before", "new", "lost")

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._by_class: defaultdict[int, Counter[str]] = defaultdict(Counter)
        # Flat, since an array for each image would take more than its boxes.
        self._areas: defaultdict[int, array[float]] = defaultdict(partial(array, "f"))
        self._images: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any], found: Detections) -> ImageChanges:
        """Count an image with its record and detections, and return its row."""
        after = found[found.scores >= SHOWN_SCORE]
        for label in np.unique(after.labels).tolist():
            self._by_class[label]["images"] += 1
            self._areas[label].extend(after.areas[after.labels == label].tolist())
        changes: list[int | None] = [None, None]
        shown = {"boxes": after}
        if row["whole_pass"] is not None:
            before = detections_from_structs(row["whole_pass"])
            shown |= {
                "after": after,
                "before": before,
                "new": after[are_new(after, before)],
                "lost": before[are_new(before, after)],
            }
            changes = [len(shown["new"]), len(shown["lost"])]
            self._images["compared"] += 1
        for name, boxes in shown.items():
            for label in boxes.labels.tolist():
                self._by_class[label][name] += 1
        self._images["images"] += bool(len(after))
        return {
            "id": row["image_id"],
            "objects": 0,
            "labels": np.unique(after.labels).tolist(),
            "by": {self._policy: [len(after), *changes]},
            "cost": {self._policy: _cost(row)},
        }

    def counts(self) -> dict[str, Any]:
        """The fields of `FoundCounts` except "most"."""
        by_class = [
            {"label": label, **{name: count[name] for name in self._NAMES}, "median_side": self._median_side(label)}
            for label, count in self._by_class.items()
        ]
        return {
            **{name: sum(count[name] for count in self._by_class.values()) for name in self._NAMES},
            "images": self._images["images"],
            "compared": self._images["compared"],
            "by_class": sorted(by_class, key=lambda row: (-row["boxes"], row["label"])),
        }

    def _median_side(self, label: int) -> float | None:
        """Median of the roots of the boxes' areas, in image pixels; None without any."""
        areas = self._areas[label]
        return round(float(np.median(np.sqrt(areas))), 1) if areas else None
