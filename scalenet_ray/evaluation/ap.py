"""AP and AR of COCO results, and precision-recall curves, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.masks import checked_segmentation
from scalenet_ray.data.coco import CocoDataset, parse_annotations, read_annotations
from scalenet_ray.data.storage import Address

if TYPE_CHECKING:
    from scalenet_ray.runs.documents import Curves

__all__ = [
    "METRICS",
    "evaluate",
    "match_results",
    "precision_curves",
]

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""Names of the metrics, in the order of pycocotools' summary."""


def evaluate(
    annotations: CocoDataset | Mapping[str, Any] | Address,
    results: Iterable[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """Compute AP and AR of COCO results.

    Args:
        annotations: the ground truth, as a data set, a parsed instances file or its address.
        results: COCO results, see `to_results`; without any, the metrics are 0.
        iou_type: "bbox", or "segm" for masks. An object without a valid mask counts by its box; the sizes of images are
            those of their results' masks.
        image_ids: images to evaluate, all by default. All objects of an image without results are missed.

    Returns:
        `METRICS` in percent, 0 to 100; NaN for a size of which there are no objects.

    Raises:
        UserError: if a result or `image_ids` names an image or a category that the annotations do not have.
    """
    evaluation = match_results(annotations, results, iou_type=iou_type, image_ids=image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    values = np.asarray(evaluation.stats, np.float64).tolist()
    return {name: math.nan if value < 0 else 100.0 * value for name, value in zip(METRICS, values, strict=True)}


def match_results(
    annotations: CocoDataset | Mapping[str, Any] | Address,
    results: Iterable[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Collection[int] | None = None,
) -> COCOeval:
    """Match results to objects image by image; arguments as of `evaluate`, and `UserError` as there."""
    if isinstance(annotations, CocoDataset):
        dataset = annotations
    else:
        is_parsed = isinstance(annotations, Mapping)
        dataset = parse_annotations(annotations) if is_parsed else read_annotations(cast(Address, annotations))
    known = {record.image_id for record in dataset.images}
    chosen = known if image_ids is None else set(image_ids)
    if chosen - known:
        msg = f"image_ids must be of the annotations' images, got {sorted(chosen - known)[:5]}: leave them out"
        raise UserError(msg)
    found = _results_to_count(results, dataset, known, chosen, iou_type)
    images = [{"id": r.image_id, "height": r.height, "width": r.width} for r in dataset.images if r.image_id in chosen]
    truth = _ground_truth(dataset, chosen)
    if iou_type == "segm":
        _add_masks(truth, images, found)
    categories = [{"id": category_id, "name": name} for category_id, name in dataset.categories.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco(images, categories, truth),
            _coco(images, categories, found),
            iou_type,
        )
        evaluation.evaluate()
    return evaluation


def _coco(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = cast(Any, {"images": images, "categories": categories, "annotations": annotations})
    coco.createIndex()
    return coco


def _ground_truth(dataset: CocoDataset, chosen: set[int]) -> list[dict]:
    """Convert the objects of the chosen images to pycocotools' annotations, with unchecked segmentations."""
    rows = []
    columns = zip(
        dataset.image_ids.tolist(),
        dataset.labels.tolist(),
        dataset.boxes_xywh.tolist(),
        dataset.areas.tolist(),
        dataset.crowd.tolist(),
        dataset.segmentations,
        strict=True,
    )
    for image_id, label, box, area, crowd, segmentation in columns:
        if image_id not in chosen:
            continue
        rows.append(
            {
                # New ids from 1 on: pycocotools takes a match with object 0 for none.
                "id": len(rows) + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
                "segmentation": segmentation,
            }
        )
    return rows


def _add_masks(truth: list[dict], images: list[dict], found: list[dict]) -> None:
    """Set the sizes of the images and a valid mask of each object: its own, or its box.

    Objects of images without results get a mask of one pixel: it is compared with nothing, and the annotated size of
    the image, which was never verified, may be huge.
    """
    sizes = {row["image_id"]: tuple(row["segmentation"]["size"]) for row in found}
    for image in images:
        if image["id"] in sizes:
            image["height"], image["width"] = sizes[image["id"]]
    for row in truth:
        hw = sizes.get(row["image_id"])
        if hw is None:
            row["segmentation"] = {"size": [1, 1], "counts": "1"}
            continue
        try:
            row["segmentation"] = checked_segmentation(row["segmentation"], hw)
        except TileError:
            row["segmentation"] = checked_segmentation([_box_polygon(row["bbox"])], hw)


def _box_polygon(box_xywh: Sequence[float]) -> list[float]:
    x, y, width, height = box_xywh
    return [x, y, x, y + height, x + width, y + height, x + width, y]


def _results_to_count(
    results: Iterable[Mapping[str, Any]], dataset: CocoDataset, known: set[int], chosen: set[int], iou_type: str
) -> list[dict]:
    """Convert the results of the chosen images to pycocotools' annotations; it modifies them, so they are copies."""
    rows = []
    for result in results:
        image_id, label = result["image_id"], result["category_id"]
        if image_id not in known or label not in dataset.categories:
            got = f"image {image_id}" if image_id not in known else f"category {label}"
            msg = f"results must be of the annotations' images and categories, got {got}: use the same data set"
            raise UserError(msg)
        if image_id not in chosen:
            continue
        box = list(result["bbox"])
        row = {"id": len(rows) + 1, "image_id": image_id, "category_id": label, "bbox": box, "iscrowd": 0}
        row |= {"score": result["score"], "area": box[2] * box[3]}
        if iou_type == "segm":
            if "segmentation" not in result:
                msg = f"segm needs a segmentation in each result, got none in image {image_id}: evaluate bbox"
                raise UserError(msg)
            row["segmentation"] = dict(result["segmentation"])
            # The size range goes by the mask: the box of a thin object is much larger.
            row["area"] = float(coco_mask.area(result["segmentation"]))
        rows.append(row)
    return rows


_AREAS = {"small": 1, "medium": 2, "large": 3}
"""Size -> index of pycocotools' area range."""


def precision_curves(evaluation: COCOeval) -> dict[str, Curves]:
    """Compute precision at the recalls 0, .01, ... 1, averaged over the classes that have objects of a size.

    Args:
        evaluation: from `match_results`.

    Returns:
        Size (small, medium, large) -> curves; sizes without objects are missing.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    # [thresholds, recalls, classes, areas] at the largest number of boxes; -1 where a class has no object of the size.
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    curves: dict[str, Curves] = {}
    for size, area in _AREAS.items():
        known = precision[:, :, (precision[0, 0, :, area] > -1), area]
        if known.shape[2]:
            by_recall = 100.0 * known.mean(axis=2)
            curves[size] = {"iou50": by_recall[0].tolist(), "mean": by_recall.mean(axis=0).tolist()}
    return curves
