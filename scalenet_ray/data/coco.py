"""COCO instances files: reading and validation of images, categories and annotations.

COCO's boxes are xywh; outside `data` and `evaluation.ap` all boxes are xyxy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import numpy as np

from scalenet_ray.core.errors import TileError, UserError, abbreviated, repeated
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.masks import checked_segmentation
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, is_text
from scalenet_ray.data.storage import Address, join, read_bytes

# Of a value, in error messages.
_MAX_CHARACTERS = 80

MAX_BYTES = 2 * 2**30
"""Of a file of annotations or addresses; parsed, it takes about ten times as much memory."""

# Of a coordinate or a side of a box.
_MAX_COORDINATE = 1e9
_MAX_AREA = _MAX_COORDINATE**2


class Objects(NamedTuple):
    """The ground truth of one image.

    Attributes:
        boxes: [N, 4] float32 xyxy, in image pixels.
        areas: [N] float64 annotated mask pixels; the box's area where the annotation has no area.
        labels: [N] int64 category ids.
        crowd: [N] bool, COCO's iscrowd.
        segmentations: N COCO segmentations (polygons or run lengths), or None for objects with a box only.
    """

    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """Validated annotations: M objects in columns, 73 bytes per object without its segmentation.

    Attributes:
        images: image records in the order of their ids.
        categories: category id -> name.
        image_ids: [M] int64 image ids.
        boxes_xywh: [M, 4] float64, in image pixels.
        areas: [M] float64 mask pixels.
        labels: [M] int64 category ids.
        crowd: [M] bool, COCO's iscrowd.
        segmentations: M valid COCO segmentations, or None where missing or invalid.
        annotation_ids: [M] int64 annotation ids.
        damaged_masks: ids of the annotations with an invalid segmentation, which count by their boxes.
    """

    images: ImageRecords
    categories: dict[int, str]
    image_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: tuple[Any, ...]
    annotation_ids: np.ndarray
    damaged_masks: tuple[int, ...] = ()

    @cached_property
    def unused_categories(self) -> frozenset[int]:
        """Ids of the categories without annotations; metrics do not include them."""
        return frozenset(self.categories.keys() - set(np.unique(self.labels).tolist()))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings about suspicious annotations, one line each, shown when a run starts."""
        lines = []
        if self.damaged_masks:
            count, ids = len(self.damaged_masks), abbreviated(self.damaged_masks)
            lines.append(f"annotations with a segmentation that is no mask: {count}, counted by their boxes (id {ids})")
        if twice := repeated(self.images.files.to_pylist()):
            count, names = len(twice), abbreviated(twice)
            lines.append(f"files listed as several images, which count as often: {count} ({names})")
        if self.crowd.all():
            lines.append("no annotation is of an object that counts (crowds do not): there is no AP to measure")
        empty = self.annotation_ids[self._outside_image & ~self.crowd].tolist()
        if empty:
            lines.append(
                f"annotations whose box has no area in its image: {len(empty)}, never found (id {abbreviated(empty)})"
            )
        return tuple(lines)

    @property
    def _outside_image(self) -> np.ndarray:
        """[M] bool, True if a box has no area inside its image; images without a size are unbounded."""
        size = {record.image_id: record.hw or (np.inf, np.inf) for record in self.images}
        ends = np.array([size[image_id][::-1] for image_id in self.image_ids.tolist()], np.float64).reshape(-1, 2)
        low = np.maximum(self.boxes_xywh[:, :2], 0)
        high = np.minimum(self.boxes_xywh[:, :2] + self.boxes_xywh[:, 2:], ends)
        return np.any(high <= low, axis=1)

    @cached_property
    def rows_by_image(self) -> dict[int, np.ndarray]:
        """Image id -> rows of its objects in the file's order; images without objects are missing."""
        order = np.argsort(self.image_ids, kind="stable")
        ids, starts = np.unique(self.image_ids[order], return_index=True)
        return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=True)) if len(ids) else {}


# --- annotations ------------------------------------------------------------------------------------


def _fail(message: str) -> NoReturn:
    raise UserError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."


def _rows(document: Mapping[str, Any], section: str, keys: Sequence[str], name: str) -> list[dict]:
    """Return a section of the document; its rows must have `keys` and unique ids."""
    rows = document.get(section)
    if not isinstance(rows, list):
        _fail(f"{name} must have a list of {section}, got {type(rows).__name__}: is it an instances file of COCO?")
    for i, row in enumerate(rows):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else list(keys)
        if missing:
            _fail(f"{section}[{i}] of {name} must have {', '.join(keys)}, got no {', '.join(missing)}: add it")
        for key in keys:
            if key.endswith("id") and not (type(row[key]) is int and abs(row[key]) < 2**63):
                which = f"{section}[{i}]" if key == "id" else f"{section}[{i}] (id {row['id']})"
                _fail(f"{key} of {which} of {name} must be a whole number, got {_short(row[key])}: number them")
    if twice := repeated(row["id"] for row in rows):
        _fail(f"each of {section} of {name} must have an id of its own, got twice {abbreviated(twice)}: renumber them")
    return rows


def _image_record(row: dict, name: str) -> ImageRecord:
    for key in ("height", "width"):
        value = row.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= _MAX_COORDINATE):
            got = _short(value)
            _fail(f"{key} of image {row['id']} of {name} must be 1 or more pixels, got {got}: correct it")
    if not is_text(row["file_name"]):
        _fail(f"file_name of image {row['id']} of {name} must be text, got {_short(row['file_name'])}: correct it")
    return ImageRecord(row["id"], row["file_name"], row.get("height"), row.get("width"))


def _check_fields(row: dict, name: str) -> None:
    """Validate the fields of an annotation, except its segmentation."""
    box = row["bbox"]
    of_numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))
    if not (of_numbers and all(abs(value) <= _MAX_COORDINATE for value in box) and min(box[2:]) >= 0):
        _fail(
            f"bbox of annotation {row['id']} of {name} must be 4 finite numbers [x, y, width, height], up to "
            f"{_MAX_COORDINATE:.0e} pixels, with no negative side, got {_short(box)}: correct or remove it"
        )
    area = row.get("area")
    if area is not None and not (_is_number(area) and 0 <= area <= _MAX_AREA):
        _fail(f"area of annotation {row['id']} of {name} must be 0 or more, got {_short(area)}: correct it")
    crowd = row.get("iscrowd")
    if crowd is not None and not (type(crowd) is int and crowd in (0, 1)):
        _fail(f"iscrowd of annotation {row['id']} of {name} must be 0 or 1, got {_short(crowd)}: correct it")


def _segmentation(row: dict, hw: tuple[int, int] | None, damaged: list[int]) -> Any:
    """Return the segmentation of an annotation, None if missing or invalid; ids of invalid ones go to `damaged`."""
    segmentation = row.get("segmentation")
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return None
    try:
        return checked_segmentation(segmentation, hw)
    except TileError:
        damaged.append(row["id"])
        return None


def parse_annotations(document: Mapping[str, Any], name: str = "the annotations") -> CocoDataset:
    """Validate a COCO instances file; raises `UserError` for wrong fields, repeated ids and unknown references."""
    if not isinstance(document, Mapping):
        _fail(f"{name} must be a JSON object with images, annotations and categories, got {type(document).__name__}")
    image_rows = _rows(document, "images", ("id", "file_name"), name)
    if not image_rows:
        _fail(f"{name} must list at least one image, got none: check that it is the right file")
    category_rows = _rows(document, "categories", ("id", "name"), name)
    for row in category_rows:
        if not is_text(row["name"]):
            got = _short(row["name"])
            _fail(f"name of a category of {name} must be text, got {got} in category {row['id']}: correct it")
    names = {row["id"]: row["name"] for row in category_rows}
    rows = _rows(document, "annotations", ("id", "image_id", "category_id", "bbox"), name)
    images = sorted((_image_record(row, name) for row in image_rows), key=lambda record: record.image_id)
    for key, known in (("image_id", {record.image_id for record in images}), ("category_id", names.keys())):
        unknown = [row["id"] for row in rows if row[key] not in known]
        if unknown:
            got = abbreviated(unknown)
            _fail(f"{key} of an annotation of {name} must be listed, got an unknown one in {got}: remove it")
    for row in rows:
        _check_fields(row, name)
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    areas = [box[2] * box[3] if row.get("area") is None else row["area"] for box, row in zip(boxes, rows, strict=True)]
    sizes, damaged = {record.image_id: record.hw for record in images}, []
    return CocoDataset(
        images=ImageRecords.of(images),
        categories=names,
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        boxes_xywh=boxes,
        areas=np.array(areas, np.float64),
        labels=np.array([row["category_id"] for row in rows], np.int64),
        crowd=np.array([row.get("iscrowd") == 1 for row in rows], bool),
        segmentations=tuple(_segmentation(row, sizes[row["image_id"]], damaged) for row in rows),
        annotation_ids=np.array([row["id"] for row in rows], np.int64),
        damaged_masks=tuple(damaged),
    )


def annotations_uri(data: Address, split: str) -> str:
    """The address of the instances file of a split: DATA/annotations/instances_SPLIT.json."""
    return join(data, "annotations", f"instances_{split}.json")


def read_annotations(uri: Address) -> CocoDataset:
    """Read and validate a COCO instances file.

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it is not JSON, or as in `parse_annotations`.
    """
    data = read_bytes(uri, max_bytes=MAX_BYTES)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets.
        msg = f"{uri} must be JSON, got something else ({error}): fetch or export it again"
        raise UserError(msg) from error
    return parse_annotations(document, str(uri))


class Listing(NamedTuple):
    """The fields of `CocoDataset` that a driver needs: all but the objects.

    `instances` is an instances file with all; None if the annotations are one already.
    """

    images: ImageRecords
    categories: dict[int, str]
    unused_categories: frozenset[int]
    remarks: tuple[str, ...]
    instances: bytes | None = None


def images_and_categories(uri: Address) -> Listing:
    """Read an instances file without its objects; raises as `read_annotations` does."""
    dataset = read_annotations(uri)
    return Listing(dataset.images, dataset.categories, dataset.unused_categories, dataset.remarks)


def objects_of(dataset: CocoDataset, image_id: int) -> Objects:
    """Return the ground truth of one image, in the file's order."""
    rows = dataset.rows_by_image.get(image_id, np.zeros(0, np.int64))
    xywh = dataset.boxes_xywh[rows]
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    segmentations = tuple(dataset.segmentations[i] for i in rows)
    return Objects(boxes, dataset.areas[rows], dataset.labels[rows], dataset.crowd[rows], segmentations)


def safe_file_name(name: str) -> str:
    """Return `name` if it is a path inside the folder that it is joined to; else raises `TileError`."""
    leaves = name.startswith("/") or "\\" in name or "://" in name or re.match(r"[A-Za-z]:", name)
    if not name or "\0" in name or leaves or ".." in name.split("/"):
        msg = f"file_name must be a path inside the images' folder, got {name!r}: correct the annotations"
        raise TileError(msg)
    return name


class GroundTruth:
    """Lookup of the objects of an image in an instances file, which is read once."""

    def __init__(self, annotations: str) -> None:
        self._dataset = read_annotations(annotations)

    def __call__(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes [N, 4] xyxy and mask areas [N] of an image's objects, in image pixels, without crowds."""
        objects = objects_of(self._dataset, image_id)
        return objects.boxes[~objects.crowd], objects.areas[~objects.crowd]


def oracle_from(annotations: str) -> OracleScalePredictor:
    """Build the oracle scale predictor from an instances file."""
    return OracleScalePredictor(GroundTruth(annotations))
