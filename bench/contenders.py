"""Detection in one process by scalenet_ray without Ray, by SAHI and by supervision.

All use the same detector, resize for it in the same way, and read the files themselves.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from bench.workloads import Workload
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.geometry import cut_tile
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.data.images import decode_image

DETECTOR_ALONE = "detector"
"""In a race: a pass on a tile in memory for every image, and nothing else."""

_OVERLAP = 0.2
_SCORE = 0.01
_PATIENCE_SECONDS = 600


def _on_slice(workload: Workload) -> Callable[[np.ndarray], Detections]:
    """The detector on pictures of any size: what each peer's adapter of a detector does."""
    detector, whole = workload.load_detector(), workload.policy("whole")

    def detect(pixels: np.ndarray) -> Detections:
        """[h, w, 3] uint8 RGB -> detections in its pixels."""
        tile = whole.root(0, (pixels.shape[0], pixels.shape[1]))
        (found,) = detector([cut_tile(pixels, tile)])
        if not isinstance(found, Detections):
            raise found
        scale = np.array([pixels.shape[1] / tile.width, pixels.shape[0] / tile.height] * 2, np.float32)
        # A rounding error outside would be warned of.
        boxes = np.clip(found.boxes * scale, 0, [pixels.shape[1], pixels.shape[0]] * 2)
        return Detections(boxes.astype(np.float32), found.scores, found.labels)

    return detect


def _slice_side(side: int, per_side: int) -> int:
    """Pixels of each of so many overlapping slices that cover a side."""
    return math.ceil(side / (per_side - (per_side - 1) * _OVERLAP))


def _ours(workload: Workload, policy_name: str) -> Callable[[Path], Detections]:
    detector, policy = workload.load_detector(), workload.policy(policy_name)
    predict_scale = OracleScalePredictor(workload.objects_in_image) if policy.reads_truth else None
    ids = {record.file_name: record.image_id for record in workload.records}

    def run(path: Path) -> Detections:
        """The file's detections."""
        image = decode_image(path.read_bytes())
        return recursive_detect(image, ids[path.name], policy, detect=detector, predict_scale=predict_scale).detections

    return run


def _detector_alone(workload: Workload) -> Callable[[Path], Detections]:
    detector, whole = workload.load_detector(), workload.policy("whole")
    pixels = decode_image((workload.folder / workload.records[0].file_name).read_bytes())
    tile = cut_tile(pixels, whole.root(0, (pixels.shape[0], pixels.shape[1])))
    return lambda _: detector([tile])[0]


def _sahi(workload: Workload, per_side: int | None, merge: str) -> Callable[[Path], Detections]:
    # Beside the project's environment, and not in it.
    from sahi.models.base import DetectionModel  # pyright: ignore[reportMissingImports]
    from sahi.predict import get_sliced_prediction  # pyright: ignore[reportMissingImports]
    from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]
    from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list  # pyright: ignore[reportMissingImports]

    logging.getLogger("sahi").setLevel(logging.ERROR)
    detect = _on_slice(workload)

    class Adapter(DetectionModel):
        def load_model(self) -> None:
            self.model = detect

        def perform_inference(self, image: np.ndarray) -> None:
            self._original_predictions = detect(image)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = ((0, 0),), full_shape_list: Any = None
        ) -> None:
            found = self._original_predictions
            (shift,) = fix_shift_amount_list(shift_amount_list)
            (full_shape,) = fix_full_shape_list(full_shape_list)
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        bbox=box,
                        category_id=label,
                        score=score,
                        category_name=str(label),
                        shift_amount=shift,
                        full_shape=full_shape,
                    )
                    for box, score, label in zip(
                        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
                    )
                ]
            ]

    # Below 0.1 SAHI takes NMS of its own accord; GREEDYNMM, its default elsewhere, must be forced.
    settings = {"postprocess_type": merge, "force_postprocess_type": True}
    if merge == "NMS":
        settings["postprocess_match_metric"] = "IOU"
    model = Adapter(confidence_threshold=_SCORE, device="cpu")

    def run(path: Path) -> Detections:
        """The file's detections."""
        width, height = _size(path)
        if per_side is None:
            slice_height = slice_width = workload.policy("whole").input_side
        else:
            slice_height, slice_width = _slice_side(height, per_side), _slice_side(width, per_side)
        result = get_sliced_prediction(
            str(path),
            model,
            slice_height=slice_height,
            slice_width=slice_width,
            verbose=0,
            **settings,
        )
        found = result.object_prediction_list
        return Detections(
            np.array([each.bbox.to_xyxy() for each in found], np.float32).reshape(-1, 4),
            np.array([each.score.value for each in found], np.float32),
            np.array([each.category.id for each in found], np.int64),
        )

    return run


def _supervision(workload: Workload, per_side: int | None) -> Callable[[Path], Detections]:
    import supervision  # pyright: ignore[reportMissingImports]

    detect = _on_slice(workload)

    def one_slice(pixels: np.ndarray) -> Any:
        found = detect(pixels)
        return supervision.Detections(xyxy=found.boxes, confidence=found.scores, class_id=found.labels)

    def run(path: Path) -> Detections:
        """The file's detections."""
        image = decode_image(path.read_bytes())
        if per_side is None:
            sides = (workload.policy("whole").input_side,) * 2
        else:
            sides = tuple(_slice_side(side, per_side) for side in (image.shape[1], image.shape[0]))
        overlap = tuple(math.floor(_OVERLAP * side) for side in sides)
        slicer = supervision.InferenceSlicer(one_slice, slice_wh=sides, overlap_wh=overlap, thread_workers=1)
        found = slicer(image)
        return Detections(
            found.xyxy.astype(np.float32), found.confidence.astype(np.float32), found.class_id.astype(np.int64)
        )

    return run


CONTENDERS: dict[str, Callable[[Workload], Callable[[Path], Detections]]] = {
    "sahi_grid2": lambda workload: _sahi(workload, 2, "GREEDYNMM"),
    "sahi_grid3": lambda workload: _sahi(workload, 3, "GREEDYNMM"),
    "sahi_grid2_nms": lambda workload: _sahi(workload, 2, "NMS"),
    "sahi_grid3_nms": lambda workload: _sahi(workload, 3, "NMS"),
    "supervision_grid2": lambda workload: _supervision(workload, 2),
    "supervision_grid3": lambda workload: _supervision(workload, 3),
    "sahi_native": lambda workload: _sahi(workload, None, "GREEDYNMM"),
    "sahi_native_nms": lambda workload: _sahi(workload, None, "NMS"),
    "supervision_native": lambda workload: _supervision(workload, None),
}
"""What detects: made for a workload, an image's file -> its detections in image pixels. `native`: slices of the
detector's input side in image pixels."""


class Raced(NamedTuple):
    """Result of a race.

    Attributes:
        images_per_second: from the moment when all processes are ready.
        found: image id -> detections.
        megapixels: computed by the detector for an image.
    """

    images_per_second: float
    found: dict[int, Detections]
    megapixels: float


def race(name: str, workload: Workload, records: Sequence[ImageRecord], processes: int) -> Raced:
    """A contender in one process or several, each on its share of the images and on one thread.

    Args:
        name: of `CONTENDERS`, a policy, or `DETECTOR_ALONE`.
        workload: where the images are, and the detector.
        records: the images.
        processes: how many.
    """
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(processes + 1), context.Queue()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = [
        context.Process(target=_work, args=(name, workload, records[i::processes], ready, answers))
        for i in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    # A worker that breaks says so here: the barrier is broken, or nothing comes for too long.
    ready.wait(_PATIENCE_SECONDS)
    start = time.perf_counter()
    parts = [answers.get(timeout=_PATIENCE_SECONDS) for _ in workers]
    # The clock is the machine's: the last one to finish counts.
    seconds = max(end for end, _, _ in parts) - start
    for worker in workers:
        worker.join()
    found = {image_id: each for _, part, _ in parts for image_id, each in part}
    return Raced(len(records) / seconds, found, sum(pixels for _, _, pixels in parts) / 1e6 / len(records))


def _work(name: str, workload: Workload, records: Sequence[ImageRecord], ready: Any, answers: Any) -> None:
    cv2.setNumThreads(1)
    try:
        make = {DETECTOR_ALONE: _detector_alone, **CONTENDERS}.get(name, partial(_ours, policy_name=name))
        detect = make(workload)
        detect(workload.folder / records[0].file_name)
    except BaseException:
        ready.abort()
        raise
    before = workload.pixels_computed()
    ready.wait(_PATIENCE_SECONDS)
    found = list(_detect_all(detect, workload, records))
    answers.put((time.perf_counter(), found, workload.pixels_computed() - before))


def _detect_all(
    detect: Callable[[Path], Detections], workload: Workload, records: Sequence[ImageRecord]
) -> Iterator[tuple[int, Detections]]:
    for record in records:
        yield record.image_id, detect(workload.folder / record.file_name)


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size
