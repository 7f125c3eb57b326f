"""What a finished evaluation has to say beyond its figures: intervals, curves, errors, objects gained and lost.

Runs as a Ray task, from the run folder and the annotations alone.
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
"""Images up to which the bootstrap's intervals are made unasked: it takes time in proportion to them."""


_LISTED_IMAGES = 2000


def analyse_run(
    run_uri: str, policies: Sequence[str], baseline: str, annotations: str, image_ids: Sequence[int], intervals: bool
) -> EvaluationAnalysis:
    """Look through all policies' detections once.

    Args:
        run_uri: the run folder, all policies worked through.
        policies: their names.
        baseline: the one that the others are compared with.
        annotations: address of the instances file.
        image_ids: the images that count.
        intervals: whether to draw the paired bootstrap's intervals.

    Returns:
        "compared_with"; "shown_score"; "differences" (`paired_intervals`; {} if not asked for); "curves": policy ->
        `precision_curves`; "errors": policy -> `error_breakdown`; "changes": policy -> `gained_and_lost`; "images": a
        row each for those that changed most, with "id", "objects", "labels" of its objects, and "by": policy ->
        [found, gained, lost].
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
        "images": _image_rows(explained, baseline, image_ids),
    }


def _explain_all(run: RunFolder, policy: str, dataset: CocoDataset, image_ids: Sequence[int]) -> list[Explained]:
    found = dict(detections_by_image(run, policy))
    return [explain(found.get(each, Detections.empty()), objects_of(dataset, each)) for each in image_ids]


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
    """The rows that change most under any policy, in the images' order: all of COCO would be too long a page."""
    by_change = sorted(
        rows, key=lambda row: -max((gained or 0) + (lost or 0) for _, gained, lost in row["by"].values())
    )
    kept = {row["id"] for row in by_change[:_LISTED_IMAGES]}
    return [row for row in rows if row["id"] in kept]


def whole_passes(run: RunFolder, policy: str) -> Iterator[tuple[int, Detections]]:
    """What the pass over each whole image found alone (`ImageResult.whole_pass`), image after image.

    Images without such a pass, and those of older versions, are left out.
    """
    table = run.table("images", policy, ["image_id", "whole_pass"])
    for image_id, boxes in zip(table.column("image_id").to_pylist(), table.column("whole_pass"), strict=True):
        if boxes.is_valid:
            yield image_id, detections_from_structs(boxes.as_py())


def analyse_detections(run_uri: str, policy: str, image_ids: Sequence[int]) -> DetectionAnalysis:
    """What one policy found without ground truth, and what of that the whole image's pass alone would have found.

    A box is new if it overlaps none of that pass by half (`are_new`), and one of that pass is lost if no box of the
    policy overlaps it so. Boxes count from `SHOWN_SCORE` on.

    Args:
        run_uri: the run folder, the policy worked through.
        policy: its name.
        image_ids: the images that count.

    Returns:
        "shown_score"; "images": rows as those of `analyse_run`, where gained are the new boxes, and gained and lost are
        None for an image without a pass over the whole; "found": "boxes", "images" (that have one), "compared" (images
        with a pass over the whole; 0 if there is nothing to compare with), of these "after" (boxes), "before" (boxes of
        those passes), "new" and "lost", and "by_class": a row for each class, the most frequent first, with "label",
        "boxes", "images", "after", "before", "new" and "lost".
    """
    run = RunFolder(run_uri)
    alone = dict(whole_passes(run, policy))
    found = {each: boxes[boxes.scores >= SHOWN_SCORE] for each, boxes in detections_by_image(run, policy)}
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    rows: list[ImageChanges] = []
    for image_id in image_ids:
        after, before = found.get(image_id, Detections.empty()), alone.get(image_id)
        for label in np.unique(after.labels).tolist():
            counts[label]["images"] += 1
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
        for what, boxes in shown.items():
            for label in boxes.labels.tolist():
                counts[label][what] += 1
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
        cast(ClassCounts, {"label": label, **{name: count[name] for name in names}}) for label, count in counts.items()
    ]
    found_counts = {
        **{name: sum(count[name] for count in counts.values()) for name in names},
        "images": sum(bool(row["by"][policy][0]) for row in rows),
        "compared": len(alone.keys() & set(image_ids)),
        "by_class": sorted(by_class, key=lambda row: (-row["boxes"], row["label"])),
    }
    return {
        "shown_score": SHOWN_SCORE,
        "images": _most_changed(rows),
        "found": cast(FoundCounts, found_counts),
    }
