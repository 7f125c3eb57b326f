"""Refusal rates of the check of hidden resizing, for a detector that pads its tiles and for one that resizes them."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.data.images import read_image
from scalenet_ray.models.detector_check import follows_size, three_views
from scalenet_ray.models.detectors import Detector, load_detector

_IMAGES, _DRAWS, _DRAWN = 60, 1000, 3
_SHORTER = 800

Answer = Callable[[np.ndarray], Detections]
Views = tuple[Detections, Detections, Detections]


def _plain(detector: Detector, tile: np.ndarray) -> Detections:
    (found,) = detector([tile])
    assert not isinstance(found, TileError)
    return found


def _resized(detector: Detector, side: Callable[[tuple[int, int]], float]) -> Answer:
    """The detector on tiles that are resized by a factor of their (height, width), its boxes carried back."""

    def answer(tile: np.ndarray) -> Detections:
        factor = side((tile.shape[0], tile.shape[1]))
        found = _plain(detector, cv2.resize(tile, None, fx=factor, fy=factor))
        return Detections(found.boxes / np.float32(factor), found.scores, found.labels)

    return answer


def _refused(seen: Sequence[Views]) -> str:
    """The share of draws of three pictures in which the detector is refused."""
    draws = random.Random(0)
    count = sum(follows_size(draws.sample(list(seen), _DRAWN)) is not None for _ in range(_DRAWS))
    return f"{100 * count / _DRAWS:.1f} %"


def main() -> None:
    """Print a line for the detector as it is, and for each way to resize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="val2017")
    data = Path(os.environ["SCALENET_RAY_DATA"])
    split = parser.parse_args().split
    images = [read_image(path) for path in sorted((data / "coco" / split).glob("*.jpg"))[:_IMAGES]]
    detector = load_detector(f"yolox-onnx:{data / 'models' / 'yolox_nano_dynamic.onnx'}")
    ways: dict[str, Answer] = {"padded": lambda tile: _plain(detector, tile)}
    for longer in (320, 416, 640):
        ways[f"resized to a longer side of {longer}"] = _resized(detector, lambda hw, to=longer: to / max(hw))
    ways[f"resized to a shorter side of {_SHORTER}"] = _resized(detector, lambda hw: _SHORTER / min(hw))
    print(f"{len(images)} photographs of {split}, {_DRAWS} draws of {_DRAWN}; refused:")
    for name, answer in ways.items():
        views = [three_views(image, detector.input_side) for image in images]
        seen = [(answer(small), answer(padded), answer(larger)) for small, padded, larger in filter(None, views)]
        print(f"{name}: {_refused(seen)}")


if __name__ == "__main__":
    main()
