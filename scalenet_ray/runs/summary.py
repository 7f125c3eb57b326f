"""COCO results, metrics, cost and failure counts of a finished run."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalenet_ray.data import storage
from scalenet_ray.data.coco import read_annotations
from scalenet_ray.data.formats import to_results, write_results
from scalenet_ray.evaluation.ap import summarize
from scalenet_ray.evaluation.matching import match_results
from scalenet_ray.runs.documents import FailureCount, PolicyCost
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import image_results

_MAX_REASONS = 20

_REDUCED = 0.5
"""Zoom under which an image counts as never seen at its own resolution."""


_SPECIFIC = re.compile(r"""('.*?'|".*?"|\S*/\S*[^\s:;,)]|\d+(?:\.\d+)?)""")
"""What may be specific to an image in a reason: quoted text, a path, a number."""


def coco_results(run: RunFolder, policy: str, *, name_files: bool = False) -> Iterator[dict[str, Any]]:
    """Iterate over a policy's detections as COCO results, by image id, then descending score.

    With `name_files` each has the file_name, height and width of its image.
    """
    for image in image_results(run, policy):
        about = {"file_name": image.file, "height": image.hw[0], "width": image.hw[1]} if name_files else {}
        for row in to_results(image.image_id, image.detections, image.hw):
            yield {**row, **about}


def write_policy_results(run_uri: str, policy: str, names: Sequence[str], name_files: bool = False) -> int:
    """Write one policy's `coco_results` to each of the files `names` of the run folder; returns their number."""
    run = RunFolder(run_uri)
    return max(
        write_results(storage.join(run_uri, name), coco_results(run, policy, name_files=name_files)) for name in names
    )


def policy_cost(run: RunFolder, policy: str) -> PolicyCost:
    """Cost of one policy: means over the images that did not fail, and counts."""
    measured = ["tiles", "detector_passes", "detector_pixels", "scalenet_pixels", "zoom"]
    images = run.table("images", policy, ["image_id", "guards", "failure_stage", *measured])
    done = images.filter(pc.field("failure_stage").is_null())
    guards: Counter[str] = Counter()
    for row in done.column("guards").value_counts().to_pylist():
        for name, count in json.loads(row["values"]).items():
            guards[name] += count * row["counts"]
    zoom = done.column("zoom").drop_null().to_numpy()
    smallest = float(zoom.min(initial=math.inf))

    def mean(column: str, unit: float = 1.0) -> float:
        """Mean of a column over the images that did not fail, in multiples of `unit`; 0 without images."""
        values = done.column(column).drop_null().to_numpy()
        return float(values.mean()) / unit if len(values) else 0.0

    return {
        "tiles_per_image": mean("tiles"),
        "detector_passes_per_image": mean("detector_passes"),
        "detector_megapixels_per_image": mean("detector_pixels", 1e6),
        "scalenet_megapixels_per_image": mean("scalenet_pixels", 1e6),
        "seconds_by_stage": run.seconds_by_stage(policy),
        "guards": dict(sorted(guards.items())),
        "images_reduced": int((zoom < _REDUCED).sum()),
        "most_reduced": 1.0 / smallest if 0 < smallest < math.inf else 1.0,
        "images_done": done.num_rows,
        "images_failed": images.num_rows - done.num_rows,
    }


def evaluate_policy(run_uri: str, policy: str, annotations: str, image_ids: np.ndarray) -> dict[str, dict[str, float]]:
    """COCO metrics of one policy on images, of which failed ones count as without detections.

    Returns:
        IoU type -> metric -> percent: "bbox", and "segm" if all detections have masks.
    """
    run = RunFolder(run_uri)
    dataset = read_annotations(annotations)
    iou_types = ("bbox", "segm") if _all_have_masks(run, policy) else ("bbox",)
    return {
        iou_type: summarize(match_results(dataset, coco_results(run, policy), iou_type=iou_type, image_ids=image_ids))
        for iou_type in iou_types
    }


def _all_have_masks(run: RunFolder, policy: str) -> bool:
    """True if there are detections, and each has a mask."""
    masks = [part.column("mask") for part in run.parts("detections", policy, ["image_id", "mask"])]
    return any(map(len, masks)) and not any(column.null_count for column in masks)


def failure_counts(failures: pa.Table) -> list[FailureCount]:
    """Group failed images (schema `FAILURES`) by stage and reason; what differs in it is replaced. At most 20."""
    counts: Counter[tuple[str, ...]] = Counter()
    reasons: dict[tuple[str, ...], list[str]] = {}
    examples: dict[tuple[str, ...], str] = {}
    seen: set[tuple[int, tuple[str, ...]]] = set()
    columns = (failures.column(name).to_pylist() for name in ("image_id", "file", "stage", "reason"))
    for image_id, file, stage, reason in zip(*columns, strict=True):
        # Text and what is specific, in turn.
        parts = _SPECIFIC.split(reason.replace(file, "..."))
        group = (stage, *parts[::2])
        before = reasons.setdefault(group, parts)
        reasons[group] = [one if one == other else _masked(one) for one, other in zip(before, parts, strict=True)]
        if (image_id, group) not in seen:
            seen.add((image_id, group))
            counts[group] += 1
            examples.setdefault(group, file)
    return [
        {"stage": group[0], "reason": "".join(reasons[group]), "count": count, "example": examples[group]}
        for group, count in counts.most_common(_MAX_REASONS)
    ]


def _masked(part: str) -> str:
    return "N" if part == "N" or part[0].isdigit() else "..."
