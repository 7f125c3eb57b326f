"""Matching of COCO results to objects by pycocotools, a few images at a time, kept in compact columns."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.masks import checked_segmentation
from scalenet_ray.data.coco import CocoDataset

_IMAGES_AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class RankedDetections:
    """The N detections of one category by descending score, and its M objects, in one range of areas.

    Attributes:
        images: [N] int32 indices of the detections' images.
        true_positive: [thresholds, N] bool, matched to an object that is not ignored.
        false_positive: [thresholds, N] bool, unmatched and not ignored.
        object_images: [M] int32 indices of the objects' images, without ignored objects.
    """

    images: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray
    object_images: np.ndarray


class Matches:
    """Results of one policy, matched to the objects: 29 bytes a detection, 8 an object.

    Attributes:
        image_ids: ids of the images, in ascending order.
        thresholds: [thresholds] IoU.
        recalls: [recalls] at which precision is sampled.
        max_detections: numbers of detections of AR, the last one also that of AP.
    """

    def __init__(self, image_ids: Sequence[int]) -> None:
        parameters = COCOeval(iouType="bbox").params
        self.image_ids = image_ids
        self.thresholds, self.recalls = np.asarray(parameters.iouThrs), np.asarray(parameters.recThrs)
        self.max_detections: tuple[int, ...] = tuple(parameters.maxDets)
        self._areas = len(parameters.areaRng)
        self._found: defaultdict[int, list[tuple[np.ndarray, ...]]] = defaultdict(list)
        self._objects: defaultdict[int, list[tuple[np.ndarray, ...]]] = defaultdict(list)

    def add(self, evaluation: COCOeval) -> None:
        """Add the evaluated images, which follow those added before."""
        parameters = evaluation.params
        index_of = {image_id: int(np.searchsorted(self.image_ids, image_id)) for image_id in parameters.imgIds}
        shape = (len(parameters.catIds), self._areas, len(parameters.imgIds))
        matches = np.empty(len(evaluation.evalImgs), object)
        matches[:] = evaluation.evalImgs
        for category, of_category in zip(parameters.catIds, matches.reshape(shape), strict=True):
            # A category that an image lacks is None at each area.
            present = [areas for areas in of_category.T if areas[0] is not None]
            self._add_category(category, present, index_of)

    def _add_category(self, category: int, images: Sequence[Any], index_of: Mapping[int, int]) -> None:
        if not images:
            return
        scores = [np.asarray(areas[0]["dtScores"], np.float64) for areas in images]
        indices = [index_of[areas[0]["image_id"]] for areas in images]
        ignored = _joined(images, "dtIgnore").astype(bool)
        matched = _joined(images, "dtMatches") > 0
        counts = [len(part) for part in scores]
        self._found[category].append(
            (
                np.repeat(np.array(indices, np.int32), counts),
                np.concatenate(scores),
                np.concatenate([np.arange(count, dtype=np.uint8) for count in counts]),
                np.packbits(matched & ~ignored, axis=1),
                np.packbits(~matched & ~ignored, axis=1),
            )
        )
        objects = ~_joined(images, "gtIgnore").astype(bool)
        sizes = [len(areas[0]["gtIgnore"]) for areas in images]
        self._objects[category].append((np.repeat(np.array(indices, np.int32), sizes), objects))

    @property
    def categories(self) -> list[int]:
        """Ids of the categories with detections or objects, in ascending order."""
        return sorted(self._found)

    def ranked(self, category: int, area: int, max_detections: int | None = None) -> RankedDetections:
        """The detections and objects of one category.

        Args:
            category: one of `categories`.
            area: index of pycocotools' range of areas: all, small, medium, large.
            max_detections: only so many detections of an image; by default the most.
        """
        images, scores, ranks, hits, misses = (
            np.concatenate(parts, axis=-1) for parts in zip(*self._found[category], strict=True)
        )
        object_images, counts = (np.concatenate(parts, axis=-1) for parts in zip(*self._objects[category], strict=True))
        # Equal scores are in pycocotools' order: by image, then by rank.
        order = np.argsort(-scores, kind="stable")
        order = order[ranks[order] < (max_detections or self.max_detections[-1])]
        true_positive, false_positive = (
            np.unpackbits(bits[area][:, order], axis=0, count=len(self.thresholds)).astype(bool)
            for bits in (hits, misses)
        )
        return RankedDetections(images[order], true_positive, false_positive, object_images[counts[area]])


def _joined(images: Sequence[Any], name: str) -> np.ndarray:
    """[areas, ..., N] values of pycocotools' matches of some images, one after the other."""
    areas = zip(*images, strict=True)
    return np.stack([np.concatenate([np.asarray(match[name]) for match in matches], axis=-1) for matches in areas])


def match_results(
    dataset: CocoDataset,
    results: Iterable[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Collection[int] | None = None,
) -> Matches:
    """Match results to objects, a few images at a time.

    Args:
        dataset: the ground truth.
        results: COCO results in order of their image ids, see `to_results`.
        iou_type: "bbox", or "segm" for masks. An object without a valid mask counts by its box; the sizes of images are
            those of their results' masks.
        image_ids: images to evaluate, all by default. All objects of an image without results are missed.

    Raises:
        UserError: if a result or `image_ids` names an image or a category that the annotations do not have.
        ValueError: if the results are not in order.
    """
    known = set(dataset.images.ids.tolist())
    chosen = known if image_ids is None else {int(image_id) for image_id in image_ids}
    if chosen - known:
        msg = f"image_ids must be of the annotations' images, got {sorted(chosen - known)[:5]}: leave them out"
        raise UserError(msg)
    matches = Matches(sorted(chosen))
    by_image = _results_by_image(results, dataset, known, iou_type)
    image_id, found = next(by_image, (None, []))
    for start in range(0, len(matches.image_ids), _IMAGES_AT_ONCE):
        ids = matches.image_ids[start : start + _IMAGES_AT_ONCE]
        rows: list[dict] = []
        while image_id is not None and image_id <= ids[-1]:
            rows += found if image_id in chosen else []
            image_id, found = next(by_image, (None, []))
        matches.add(_evaluated(dataset, ids, rows, iou_type))
    # Results of unknown images after the last one are refused, too.
    for _ in by_image:
        pass
    return matches


def _evaluated(
    dataset: CocoDataset, image_ids: Sequence[int], found: list[dict], iou_type: Literal["bbox", "segm"]
) -> COCOeval:
    """Match the results of some images."""
    images: list[dict[str, Any]] = [{"id": image_id} for image_id in image_ids]
    truth = _ground_truth(dataset, image_ids)
    if iou_type == "segm":
        for image in images:
            image["height"], image["width"] = dataset.images.by_id(image["id"]).hw or (None, None)
        _add_masks(truth, images, found)
    # Ids from 1 on: pycocotools takes a match with object 0 for none.
    for rows in (truth, found):
        for i, row in enumerate(rows, start=1):
            row["id"] = i
    used = {row["category_id"] for row in (*truth, *found)}
    categories = [{"id": category_id, "name": dataset.categories[category_id]} for category_id in sorted(used)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, found), iou_type)
        evaluation.evaluate()
    return evaluation


def _coco(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = cast(Any, {"images": images, "categories": categories, "annotations": annotations})
    coco.createIndex()
    return coco


def _ground_truth(dataset: CocoDataset, image_ids: Sequence[int]) -> list[dict]:
    """Convert the objects of some images to pycocotools' annotations, with unchecked segmentations."""
    by_image = dataset.rows_by_image
    return [
        {
            "image_id": image_id,
            "category_id": int(dataset.labels[row]),
            "bbox": dataset.boxes_xywh[row].tolist(),
            "area": float(dataset.areas[row]),
            "iscrowd": int(dataset.crowd[row]),
            "segmentation": dataset.segmentations[row],
        }
        for image_id in image_ids
        for row in by_image.get(image_id, ())
    ]


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
            x, y, width, height = row["bbox"]
            corners = [x, y, x, y + height, x + width, y + height, x + width, y]
            row["segmentation"] = checked_segmentation([corners], hw)


def _results_by_image(
    results: Iterable[Mapping[str, Any]], dataset: CocoDataset, known: set[int], iou_type: str
) -> Iterator[tuple[int, list[dict]]]:
    """Convert results to pycocotools' annotations, image by image; it modifies them, so they are copies."""
    before: int | None = None
    for image_id, rows in groupby(results, key=lambda result: result["image_id"]):
        if image_id not in known:
            raise _unknown(f"image {image_id}")
        if before is not None and image_id <= before:
            msg = f"results must be in order of their image ids, got {image_id} after {before}: sort them"
            raise ValueError(msg)
        before = image_id
        yield image_id, [_result_row(result, dataset, iou_type) for result in rows]


def _unknown(what: str) -> UserError:
    return UserError(f"results must be of the annotations' images and categories, got {what}: use the same data set")


def _result_row(result: Mapping[str, Any], dataset: CocoDataset, iou_type: str) -> dict:
    image_id, label = result["image_id"], result["category_id"]
    if label not in dataset.categories:
        raise _unknown(f"category {label}")
    box = list(result["bbox"])
    row = {"image_id": image_id, "category_id": label, "bbox": box, "iscrowd": 0}
    row |= {"score": result["score"], "area": box[2] * box[3]}
    if iou_type == "segm":
        if "segmentation" not in result:
            msg = f"segm needs a segmentation in each result, got none in image {image_id}: evaluate bbox"
            raise UserError(msg)
        row["segmentation"] = dict(result["segmentation"])
        # The size range goes by the mask: the box of a thin object is much larger.
        row["area"] = float(coco_mask.area(result["segmentation"]))
    return row
