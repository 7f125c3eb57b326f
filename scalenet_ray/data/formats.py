"""Conversion of detections: COCO results, YOLO and VOC label files, FiftyOne labels, supervision, GeoJSON."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Window
from scalenet_ray.core.masks import mask_of_image
from scalenet_ray.data.storage import Address, atomic_writer

if TYPE_CHECKING:
    import supervision  # pyright: ignore[reportMissingImports]


SUPERVISION_COLUMNS = ("x_min", "y_min", "x_max", "y_max", "class_id", "confidence", "tracker_id", "class_name")
"""Columns of supervision's CSVSink for detections with class names."""


def _relative_xywh(detections: Detections, image_hw: tuple[int, int]) -> np.ndarray:
    """Return boxes as [N, 4] float64 x, y, width, height, relative to the image's size."""
    corners = detections.boxes.astype(np.float64) / np.array([image_hw[1], image_hw[0]] * 2)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def yolo_lines(detections: Detections, image_hw: tuple[int, int], classes: Mapping[int, int]) -> list[str]:
    """Convert an image's detections to lines of a YOLO label file: class x y width height.

    x and y are the box's centre; all four are relative to the image's size. The format has no scores. `classes` maps a
    category id to its index, from 0.
    """
    boxes = _relative_xywh(detections, image_hw)
    boxes[:, :2] += boxes[:, 2:] / 2
    return [
        " ".join([str(classes[label]), *(f"{value:.6f}" for value in box)])
        for label, box in zip(detections.labels.tolist(), boxes.tolist(), strict=True)
    ]


def voc_annotation(detections: Detections, image_hw: tuple[int, int], names: Mapping[int, str], file: str) -> bytes:
    """Convert an image's detections to a VOC file.

    Its pixels count from 1, and a box holds its last pixel. Boxes are rounded to whole pixels inside the image, at
    least one. The format has no scores.
    """
    height, width = image_hw
    folder, name = posixpath.split(file)
    root = ElementTree.Element("annotation")
    _add_texts(root, {"folder": folder, "filename": name})
    _add_texts(ElementTree.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
    boxes = detections.boxes.astype(np.float64).round().astype(int)
    low = np.clip(boxes[:, :2] + 1, 1, [width, height])
    high = np.clip(boxes[:, 2:], low, [width, height])
    for label, (x0, y0), (x1, y1) in zip(detections.labels.tolist(), low.tolist(), high.tolist(), strict=True):
        found = ElementTree.SubElement(root, "object")
        _add_texts(found, {"name": names[label], "pose": "Unspecified", "truncated": 0, "difficult": 0})
        _add_texts(ElementTree.SubElement(found, "bndbox"), {"xmin": x0, "ymin": y0, "xmax": x1, "ymax": y1})
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8") + b"\n"


def _add_texts(parent: ElementTree.Element, texts: Mapping[str, object]) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def fiftyone_objects(
    detections: Detections, image_hw: tuple[int, int], classes: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Convert an image's detections to labels of FiftyOneImageDetectionDataset's labels.json.

    Boxes are x, y, width, height relative to the image's size; the depth is an attribute. `classes` maps a category id
    to its index in the file's `classes`, from 0.
    """
    return [
        {
            "label": classes[label],
            "bounding_box": [round(value, 6) for value in box],
            "confidence": round(score, 6),
            "attributes": {"depth": depth},
        }
        for label, box, score, depth in zip(
            detections.labels.tolist(),
            _relative_xywh(detections, image_hw).tolist(),
            detections.scores.astype(np.float64).tolist(),
            detections.depth.tolist(),
            strict=True,
        )
    ]


def geojson_features(
    detections: Detections, names: Mapping[int, str], place: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[dict[str, Any]]:
    """Convert an image's detections to features of a GeoJSON FeatureCollection, RFC 7946.

    The geometry is the box's outline, counterclockwise; the box in image pixels, category, score and depth are
    properties. `place` maps [M, 2] x, y in image pixels to longitude, latitude in degrees; None keeps image pixels.
    """
    boxes = detections.boxes.astype(np.float64)
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    if place is not None:
        corners = place(corners.reshape(-1, 2)).reshape(corners.shape)
    # Twice the area, negative if the corners run clockwise.
    x, y = corners[..., 0], corners[..., 1]
    clockwise = (x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1) < 0
    corners[clockwise] = corners[clockwise, ::-1]
    rings = np.concatenate([corners, corners[:, :1]], axis=1).round(3 if place is None else 9).tolist()
    return [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "category": names[label],
                "category_id": label,
                "score": round(score, 6),
                "depth": depth,
                "box": box,
            },
        }
        for ring, label, score, depth, box in zip(
            rings,
            detections.labels.tolist(),
            detections.scores.astype(np.float64).tolist(),
            detections.depth.tolist(),
            boxes.round(3).tolist(),
            strict=True,
        )
    ]


def supervision_rows(detections: Detections, names: Mapping[int, str]) -> list[tuple[Any, ...]]:
    """Convert an image's detections to rows of `SUPERVISION_COLUMNS`; tracker_id is empty."""
    boxes = detections.boxes.astype(np.float64).round(3).tolist()
    scores = detections.scores.astype(np.float64).round(6).tolist()
    return [
        (*box, label, score, "", names[label])
        for box, label, score in zip(boxes, detections.labels.tolist(), scores, strict=True)
    ]


def to_supervision(
    detections: Detections, names: Mapping[int, str], image_hw: tuple[int, int] | None = None
) -> supervision.Detections:
    """Convert detections to `supervision.Detections`, for its annotators, trackers and metrics.

    Args:
        detections: N detections in image pixels.
        names: category id -> name.
        image_hw: (height, width) of the image, in pixels; required if there are masks.

    Returns:
        xyxy [N, 4] float32 in image pixels, confidence [N] float32, class_id [N] int64 (category ids), mask
        [N, height, width] bool or None, and in `data` class_name [N] and depth [N].

    Raises:
        ImportError: if the package supervision is not installed.
        UserError: if there are masks and no `image_hw`.
    """
    try:
        import supervision  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        msg = "to_supervision needs the package supervision, which is not installed: pip install supervision"
        raise ImportError(msg) from error
    masks = None
    if detections.masks is not None:
        if image_hw is None:
            msg = "masks need the image's size, got none: give image_hw"
            raise UserError(msg)
        masks = decoded_masks(detections, image_hw)
    return supervision.Detections(
        xyxy=detections.boxes,
        mask=masks,
        confidence=detections.scores,
        class_id=detections.labels,
        data={
            "class_name": np.array([names[label] for label in detections.labels.tolist()], dtype=str),
            "depth": detections.depth,
        },
    )


def decoded_masks(detections: Detections, image_hw: tuple[int, int]) -> np.ndarray | None:
    """Decode the masks of detections: [N, height, width] bool, or None if they have none."""
    if detections.masks is None:
        return None
    masks = np.zeros((len(detections), *image_hw), bool)
    for i, (counts, window) in enumerate(zip(detections.masks, detections.windows.tolist(), strict=True)):
        whole = mask_of_image(counts, Window(*window), image_hw)
        masks[i] = coco_mask.decode({"size": list(image_hw), "counts": whole})
    return masks


def to_results(image_id: int, detections: Detections, image_hw: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Convert the detections of an image to COCO results.

    Args:
        image_id: id of the image.
        detections: boxes in image pixels, category ids as labels, masks on their windows.
        image_hw: (height, width) of the image; required if there are masks.

    Returns:
        One dict per detection: image_id, category_id, bbox [x, y, width, height] rounded to 1/1000 px, score rounded to
        1/1,000,000, and segmentation (compressed run lengths on the whole image) if there are masks.

    Raises:
        UserError: if there are masks and no `image_hw`.
    """
    corners = detections.boxes.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
    scores = detections.scores.astype(np.float64).round(6).tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(detections.labels.tolist(), xywh, scores, strict=True)
    ]
    if detections.masks is None:
        return rows
    if image_hw is None:
        msg = f"masks of image {image_id} need the image's size, got none: give image_hw"
        raise UserError(msg)
    for row, counts, window in zip(rows, detections.masks, detections.windows.tolist(), strict=True):
        whole = mask_of_image(counts, Window(*window), image_hw)
        row["segmentation"] = {"size": list(image_hw), "counts": whole.decode("ascii")}
    return rows


def write_results(uri: Address, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write COCO results as a JSON list, row by row and atomically; returns the number of rows."""
    count = 0
    with atomic_writer(uri) as handle:
        handle.write(b"[")
        for row in rows:
            handle.write(b",\n" if count else b"\n")
            handle.write(json.dumps(row, allow_nan=False, separators=(",", ":")).encode())
            count += 1
        handle.write(b"\n]\n")
    return count
