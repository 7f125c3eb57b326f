"""Images to measure with, and ratios of paired rounds.

These machines are noisy, so that two rates are compared only within one round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.data.coco import CocoDataset, ImageRecord, parse_annotations, to_results
from scalenet_ray.data.images import decode_image
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.resources import AdvancedResources, Resources

__all__ = ["Workload", "detector_name", "large_images", "photographs", "ratio", "spread"]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: median, min and max."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max of what rounds measured."""
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}


_LARGE_HW = (3000, 4000)
_CELL = 640

_FOR_PHOTOGRAPHS = Resources(detector_batch_size=16, advanced=AdvancedResources(max_open_images=128))
# A reader keeps the last 14 of these decoded: no more in work than that, or each is decoded again for its windows.
_FOR_LARGE_IMAGES = Resources(readers=2, detector_batch_size=4, advanced=AdvancedResources(max_open_images=28))


def _data() -> Path:
    if "SCALENET_RAY_DATA" not in os.environ:
        msg = "this measures real photographs: set SCALENET_RAY_DATA to a folder with coco/ and models/yolox_nano.onnx"
        raise SystemExit(msg)
    return Path(os.environ["SCALENET_RAY_DATA"]).resolve()


def detector_name() -> str:
    """The real detector, as kind:what."""
    return f"yolox-onnx:{_data() / 'models' / 'yolox_nano.onnx'}"


@dataclass(frozen=True)
class Workload:
    """Images with objects, and the detector that works on them.

    Attributes:
        folder: of the images.
        annotations: of their objects, an instances file.
        detector: kind:what.
        resources: who works, in the engine, on how much at a time.
    """

    folder: Path
    annotations: Path
    detector: str
    resources: Resources

    @cached_property
    def dataset(self) -> CocoDataset:
        """The objects."""
        return parse_annotations(json.loads(self.annotations.read_text()))

    @property
    def records(self) -> list[ImageRecord]:
        """The images."""
        return list(self.dataset.images)

    def repeated(self, times: int) -> list[ImageRecord]:
        """The images so many times over, with ids of their own."""
        return [
            replace(record, image_id=round_ * 10**9 + record.image_id)
            for round_ in range(times)
            for record in self.dataset.images
        ]

    def policy(self, name: str) -> Policy:
        """A policy with its defaults for the detector."""
        info = NetworkSpec(detector=self.detector).describe_detector()
        return parse_policy(name, input_side=info.input_side, iou_threshold=info.iou_threshold)

    def networks(self) -> NetworkFactories:
        """The detector, for actors."""
        return NetworkFactories(self.load_detector)

    def load_detector(self) -> Any:
        """The detector, its labels mapped to the objects' categories."""
        return NetworkSpec(detector=self.detector).load_detector(self.dataset.categories)

    def ap_small(self, found: dict[int, Detections]) -> float:
        """AP of small objects, in percent."""
        sizes = {record.image_id: record.hw for record in self.dataset.images}
        results = [row for image_id, each in found.items() for row in to_results(image_id, each, sizes[image_id])]
        return evaluate(self.dataset, results)["AP_small"]


def photographs() -> Workload:
    """The real photographs of val2017."""
    coco = _data() / "coco"
    annotations = coco / "annotations" / "instances_val2017.json"
    return Workload(coco / "val2017", annotations, detector_name(), _FOR_PHOTOGRAPHS)


def large_images(folder: Path, count: int = 12) -> Workload:
    """Images of 4,000 x 3,000 pixels, 24 photographs each, and their objects; written if they are not there."""
    annotations = folder / "instances_large.json"
    made = Workload(folder, annotations, detector_name(), _FOR_LARGE_IMAGES)
    if annotations.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    source = photographs()
    document = json.loads(source.annotations.read_text())
    objects: dict[int, list[dict[str, Any]]] = {}
    for each in document["annotations"]:
        objects.setdefault(each["image_id"], []).append(each)
    rng = np.random.default_rng(0)
    images, moved = [], []
    for image_id in range(1, count + 1):
        canvas = np.zeros((*_LARGE_HW, 3), np.uint8)
        cells = [(y, x) for y in range(0, _LARGE_HW[0] - _CELL, _CELL) for x in range(0, _LARGE_HW[1] - _CELL, _CELL)]
        for (y, x), row in zip(cells, rng.permutation(len(document["images"])), strict=False):
            photo = document["images"][row]
            pixels = decode_image((source.folder / photo["file_name"]).read_bytes())
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            for each in objects.get(photo["id"], []):
                left, top, width, height = each["bbox"]
                box = [left + x, top + y, width, height]
                # Their areas are the photographs' own; the outlines are not needed.
                moved.append({**each, "id": len(moved) + 1, "image_id": image_id, "bbox": box, "segmentation": []})
        name = f"{image_id:03d}.jpg"
        Image.fromarray(canvas).save(folder / name, quality=90)
        images.append({"id": image_id, "file_name": name, "height": _LARGE_HW[0], "width": _LARGE_HW[1]})
    annotations.write_text(json.dumps({"images": images, "annotations": moved, "categories": document["categories"]}))
    return made
