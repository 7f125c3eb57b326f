"""Images to measure with, and ratios of paired rounds.

These machines are noisy, so that two rates are compared only within one round.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data.coco import CocoDataset, parse_annotations
from scalenet_ray.data.formats import to_results
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.data.images import decode_image
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.resources import AdvancedResources, Resources


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: median, min and max."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max of what rounds measured."""
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}


_MOSAIC_HW = (4480, 6400)
_WALL_CELL = (480, 640)
_TILED_HW = (4320, 7680)
_CELL = 640

_FOR_PHOTOGRAPHS = Resources(detector_batch_size=16, advanced=AdvancedResources(max_open_images=384))


def data_folder() -> Path:
    """The folder of real photographs and detectors, `SCALENET_RAY_DATA`; ends the process where it is not set."""
    if "SCALENET_RAY_DATA" not in os.environ:
        msg = "this measures real photographs: set SCALENET_RAY_DATA to a folder with coco/ and models/yolox_nano.onnx"
        raise SystemExit(msg)
    return Path(os.environ["SCALENET_RAY_DATA"]).resolve()


def detector_name() -> str:
    """The real detector, as kind:what."""
    return f"yolox-onnx:{data_folder() / 'models' / 'yolox_nano.onnx'}"


class _Counted:
    """A detector that counts the pixels of its canvases."""

    pixels = 0

    def __init__(self, detector: Any) -> None:
        self._detector = detector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Any:
        _Counted.pixels += sum(math.prod(self._detector.canvas_hw(tile.shape[:2])) for tile in pixels)
        return self._detector(pixels)


@dataclass(frozen=True)
class Workload:
    """Images with objects, and the detector that works on them.

    Attributes:
        folder: of the images.
        annotations: of their objects, an instances file.
        detector: kind:what.
        resources: actors and batch sizes in the engine.
        least_objects: categories with fewer objects are left out.
    """

    folder: Path
    annotations: Path
    detector: str
    resources: Resources = _FOR_PHOTOGRAPHS
    least_objects: int = 0

    @cached_property
    def dataset(self) -> CocoDataset:
        """The objects."""
        document = json.loads(self.annotations.read_text())
        counts = Counter(each["category_id"] for each in document["annotations"] if not each.get("iscrowd"))
        enough = {each["id"] for each in document["categories"] if counts[each["id"]] >= self.least_objects}
        for key, name in (("categories", "id"), ("annotations", "category_id")):
            document[key] = [each for each in document[key] if each[name] in enough]
        return parse_annotations(document)

    @property
    def records(self) -> list[ImageRecord]:
        """The images."""
        return list(self.dataset.images)

    def repeated(self, times: int) -> list[ImageRecord]:
        """The images repeated `times` times, each time with other ids."""
        return [
            replace(record, image_id=round_ * 10**9 + record.image_id)
            for round_ in range(times)
            for record in self.dataset.images
        ]

    def policy(self, name: str) -> Policy:
        """A policy with its defaults for the detector."""
        info = NetworkSpec(detector=self.detector).describe_detector()
        return parse_policy(
            name,
            input_side=info.input_side,
            iou_threshold=info.iou_threshold,
            takes_larger=info.takes_larger,
        )

    def networks(self) -> NetworkFactories:
        """The detector, for actors."""
        return NetworkFactories(self.load_detector)

    def load_detector(self) -> Any:
        """The detector, its labels mapped to the objects' categories."""
        detector = NetworkSpec(detector=self.detector).load_detector(self.dataset.categories)
        return _Counted(detector)

    def objects_in_image(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] xyxy and areas [N] of an image's objects, without crowds."""
        of_image = (self.dataset.image_ids == image_id) & ~self.dataset.crowd
        boxes = self.dataset.boxes_xywh[of_image]
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), self.dataset.areas[of_image]

    @staticmethod
    def pixels_computed() -> int:
        """Pixels of all canvases that detectors of this process have computed."""
        return _Counted.pixels

    def ap_small(self, found: dict[int, Detections]) -> float:
        """AP of small objects, in percent."""
        sizes = {record.image_id: record.hw for record in self.dataset.images}
        results = [row for image_id, each in found.items() for row in to_results(image_id, each, sizes[image_id])]
        return evaluate(self.dataset, results)["AP_small"]


def photographs() -> Workload:
    """The real photographs of val2017."""
    coco = data_folder() / "coco"
    annotations = coco / "annotations" / "instances_val2017.json"
    return Workload(coco / "val2017", annotations, detector_name())


def mosaics(folder: Path, detector: str, fill: float, count: int = 3) -> Workload:
    """Mosaics of 6,400 x 4,480 pixels, and their objects; written if they are not there.

    A share of their cells holds a photograph of val2017, the others one blurred beyond recognition.

    Args:
        folder: where they are written.
        detector: kind:what.
        fill: share of the cells.
        count: number of mosaics.
    """
    annotations = folder / "instances_val.json"
    made = Workload(folder, annotations, detector)
    if annotations.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    source = photographs()
    document = json.loads(source.annotations.read_text())
    objects: dict[int, list[dict[str, Any]]] = {}
    for each in document["annotations"]:
        objects.setdefault(each["image_id"], []).append(each)
    rows, columns = _MOSAIC_HW[0] // _CELL, _MOSAIC_HW[1] // _CELL
    images, moved = [], []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng(image_id)
        photos = rng.permutation(len(document["images"]))[: rows * columns]
        sharp = set(rng.permutation(rows * columns)[: round(rows * columns * fill)].tolist())
        canvas = np.full((*_MOSAIC_HW, 3), 114, np.uint8)
        for i, photo in enumerate(document["images"][row] for row in photos):
            y, x = i // columns * _CELL, i % columns * _CELL
            pixels = decode_image((source.folder / photo["file_name"]).read_bytes())[:_CELL, :_CELL]
            if i not in sharp:
                canvas[y : y + _CELL, x : x + _CELL] = cv2.GaussianBlur(cv2.resize(pixels, (_CELL, _CELL)), (0, 0), 20)
                continue
            y, x = y + (_CELL - pixels.shape[0]) // 2, x + (_CELL - pixels.shape[1]) // 2
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            for each in objects.get(photo["id"], []):
                left, top, width, height = each["bbox"]
                box = [left + x, top + y, width, height]
                # Their areas are the photographs' own; the outlines are not needed.
                moved.append({**each, "id": len(moved) + 1, "image_id": image_id, "bbox": box, "segmentation": []})
        name = f"{image_id:03d}.png"
        Image.fromarray(canvas).save(folder / name, compress_level=1)
        images.append({"id": image_id, "file_name": name, "height": _MOSAIC_HW[0], "width": _MOSAIC_HW[1]})
    annotations.write_text(json.dumps({"images": images, "annotations": moved, "categories": document["categories"]}))
    return made


def wall(folder: Path, detector: str, least_score: float = 0.4) -> Workload:
    """A hundred photographs of val2017 as one picture of 6,400 x 4,800 pixels; written if it is not there.

    Its objects are those that the detector finds in the photographs one by one, each as it stands in the picture: a
    larger one is reduced to its cell of 640 x 480.

    Args:
        folder: where it is written.
        detector: kind:what.
        least_score: score of an object in its own photograph.
    """
    annotations = folder / "instances_val.json"
    made = Workload(folder, annotations, detector)
    if annotations.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    source = replace(photographs(), detector=detector)
    detect, policy = source.load_detector(), source.policy("whole")
    height, width = _WALL_CELL
    canvas = np.full((10 * height, 10 * width, 3), 114, np.uint8)
    objects = []
    for i, record in enumerate(source.records[:100]):
        pixels = decode_image((source.folder / record.file_name).read_bytes())
        scale = min(1.0, height / pixels.shape[0], width / pixels.shape[1])
        hw = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
        pixels = cv2.resize(pixels, hw[::-1], interpolation=cv2.INTER_AREA)
        y, x = i // 10 * height, i % 10 * width
        canvas[y : y + hw[0], x : x + hw[1]] = pixels
        found = recursive_detect(pixels, i, policy, detect=detect).detections
        found = found[found.scores >= least_score]
        for (x0, y0, x1, y1), label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
            box = [x + x0, y + y0, x1 - x0, y1 - y0]
            area = (x1 - x0) * (y1 - y0)
            shared = {"id": len(objects) + 1, "image_id": 1, "iscrowd": 0, "segmentation": []}
            objects.append({**shared, "category_id": label, "bbox": box, "area": area})
    Image.fromarray(canvas).save(folder / "001.png", compress_level=1)
    image = {"id": 1, "file_name": "001.png", "height": 10 * height, "width": 10 * width}
    categories = json.loads(source.annotations.read_text())["categories"]
    annotations.write_text(json.dumps({"images": [image], "annotations": objects, "categories": categories}))
    return made


def tiled(folder: Path, source: Workload) -> Workload:
    """A set's images side by side, as many in a picture as about 7,680 x 4,320 pixels hold; written if not there.

    Args:
        folder: where they are written.
        source: the set, whose images are about equally large.
    """
    annotations = folder / "instances_val.json"
    made = replace(source, folder=folder, annotations=annotations)
    if annotations.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(source.annotations.read_text())
    height, width = (max(image[side] for image in document["images"]) for side in ("height", "width"))
    columns = round(_TILED_HW[1] / width)
    per_picture = columns * round(_TILED_HW[0] / height)
    places, pictures = {}, []
    for start in range(0, len(document["images"]), per_picture):
        images = document["images"][start : start + per_picture]
        rows = math.ceil(len(images) / columns)
        canvas = np.full((rows * height, columns * width, 3), 114, np.uint8)
        picture = {"id": len(pictures) + 1, "height": canvas.shape[0], "width": canvas.shape[1]}
        for i, image in enumerate(images):
            y, x = i // columns * height, i % columns * width
            pixels = decode_image((source.folder / image["file_name"]).read_bytes())
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            places[image["id"]] = (picture["id"], x, y)
        pictures.append(picture | {"file_name": f"{picture['id']:03}.png"})
        Image.fromarray(canvas).save(folder / pictures[-1]["file_name"], compress_level=1)
    objects = []
    for each in document["annotations"]:
        picture_id, x, y = places[each["image_id"]]
        left, top, *size = each["bbox"]
        objects.append(each | {"image_id": picture_id, "bbox": [left + x, top + y, *size], "segmentation": []})
    annotations.write_text(json.dumps(document | {"images": pictures, "annotations": objects}))
    return made
