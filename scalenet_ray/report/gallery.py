"""Gallery of a report: photographs with scale maps, windows and boxes.

Boxes are read from the run folder. Photographs, scale maps and windows are recomputed for the chosen images, in a task
of the engine, which has access to the cluster's files and networks.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.expansion import planning_weights
from scalenet_ray.core.geometry import AnyImage, whole_pixels
from scalenet_ray.core.inference import needs_detector_first
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import TracedTile, trace_tiles
from scalenet_ray.data.coco import CocoDataset, objects_of, read_annotations
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.evaluation.compare import SMALL_AREA, are_new
from scalenet_ray.evaluation.tide import KINDS, best_rows, explain
from scalenet_ray.report.pictures import encoded
from scalenet_ray.runs.documents import ImageChanges
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import detections_of, whole_passes_of

_LONGER_SIDES = (4096, 2880, 2048, 1440, 960)
_JPEG_QUALITY = 82
_MAX_BYTES = 16_000_000
_MAX_BOXES = 80
_MAP_SIDE = 96

_HELD_BYTES = 2**29
"""Images that are kept for the policies' looks; beyond these they are opened again for each policy."""

_MAP_COLOUR = (230, 159, 0)
"""Orange of Okabe and Ito's palette, as the page draws new boxes."""

_ByImage = Mapping[int, Detections]


def choose_pictures(rows: Sequence[ImageChanges], policy: str, count: int) -> dict[int, str]:
    """Choose the images of a gallery: a third that gained most, a third that lost most, the rest at random.

    Returns:
        Image id -> "gained", "lost" or "random", in this order.
    """

    def change(row: ImageChanges) -> int:
        """Return the number of objects gained minus lost."""
        _, gained, lost = row["by"][policy]
        return (gained or 0) - (lost or 0)

    share = max(1, count // 3)
    by_change = sorted(rows, key=lambda row: -change(row))
    chosen = {row["id"]: "gained" for row in by_change[:share] if change(row) > 0}
    by_loss = sorted(rows, key=lambda row: -(row["by"][policy][2] or 0))
    chosen |= {row["id"]: "lost" for row in by_loss[:share] if row["by"][policy][2] and row["id"] not in chosen}
    left = [row["id"] for row in rows if row["id"] not in chosen]
    chosen |= dict.fromkeys(random.Random(0).sample(left, min(len(left), max(0, count - len(chosen)))), "random")
    return dict(list(chosen.items())[:count])


@dataclass(frozen=True)
class PictureTask:
    """Picklable task that makes the pictures of a run's gallery.

    `annotations` is None without ground truth; `compared_with` is the baseline policy of new boxes, None to compare
    each policy with its own pass over the whole image.
    """

    run_uri: str
    policies: Sequence[tuple[Policy, NetworkFactories]]
    open_image: OpenImage
    annotations: str | None = None
    compared_with: str | None = None

    def __call__(self, chosen: Sequence[tuple[ImageRecord, str]]) -> list[dict[str, Any]]:
        """Make the pictures of images, each given with its group; skips unreadable images.

        The photographs share 16 megabytes: the fewer there are, the larger each is; those for which nothing is left
        are left out.

        Returns:
            For each picture: "id", "file", "group", "width", "height" (image pixels), "photo" (data URI); "truth": rows
            [x0, y0, x1, y1, label, is small, is crowd]; "boxes": policy -> rows [x0, y0, x1, y1, score, label, depth,
            kind, is new]; "before": policy -> the boxes compared with, or None; "looks": policy -> "windows", rows [x0,
            y0, x1, y1, depth], and "map" (data URI or None).
        """
        dataset = None if self.annotations is None else read_annotations(self.annotations)
        ids = {record.image_id for record, _ in chosen}
        run, names = RunFolder(self.run_uri), [policy.name for policy, _ in self.policies]
        boxes = {name: dict.fromkeys(ids, Detections.empty()) | detections_of(run, name, ids) for name in names}
        if self.compared_with is None:
            before = {name: whole_passes_of(run, name, ids) for name in names}
        else:
            before = dict.fromkeys(names, boxes[self.compared_with])
        pictures: list[dict[str, Any]] = []
        opened: list[tuple[ImageRecord, AnyImage | None]] = []
        held, left = 0, _MAX_BYTES
        for record, group in chosen:
            try:
                image = self.open_image(record)
                photo = _photo(image, _MAX_BYTES // len(chosen))
            except TileError:
                continue
            left -= len(photo)
            if left < 0:
                break
            held += image.nbytes
            opened.append((record, image if held <= _HELD_BYTES else None))
            pictures.append(
                {
                    "id": record.image_id,
                    "file": record.file_name,
                    "group": group,
                    "height": image.shape[0],
                    "width": image.shape[1],
                    "photo": photo,
                    "truth": _truth(dataset, record.image_id),
                    **_all_box_rows(boxes, before, dataset, record.image_id),
                    "looks": {},
                }
            )
        for policy, networks in self.policies:
            self._look(policy, networks, opened, pictures)
        return pictures

    def _look(
        self,
        policy: Policy,
        networks: NetworkFactories,
        images: Sequence[tuple[ImageRecord, AnyImage | None]],
        pictures: Sequence[dict[str, Any]],
    ) -> None:
        needs_map = policy.needs_predictor
        predict_scale = networks.predict_scale() if needs_map and networks.predict_scale else None
        detect = networks.detect() if needs_detector_first(policy, predict_scale) else None
        for (record, held), picture in zip(images, pictures, strict=True):
            try:
                image = self.open_image(record) if held is None else held
                looked = trace_tiles(image, picture["id"], policy, detect=detect, predict_scale=predict_scale)
            except TileError:
                continue
            picture["looks"][policy.name] = _look_rows(looked, policy)


def _truth(dataset: CocoDataset | None, image_id: int) -> list[list[Any]]:
    if dataset is None:
        return []
    objects = objects_of(dataset, image_id)
    columns = zip(
        objects.boxes.tolist(), objects.labels.tolist(), objects.areas.tolist(), objects.crowd.tolist(), strict=True
    )
    return [[*_rounded(box), label, int(area < SMALL_AREA), int(crowd)] for box, label, area, crowd in columns]


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in box]


def _all_box_rows(
    boxes: Mapping[str, _ByImage], before: Mapping[str, _ByImage], dataset: CocoDataset | None, image_id: int
) -> dict[str, Any]:
    """Return the fields "boxes" and "before" of a picture."""
    rows: dict[str, dict[str, Any]] = {"boxes": {}, "before": {}}
    for name, by_image in boxes.items():
        found, known = by_image[image_id], before[name].get(image_id)
        new = np.zeros(len(found), bool)
        rows["before"][name] = None
        if known is not None:
            known = known[known.scores >= SHOWN_SCORE]
            new = are_new(found, known)
            rows["before"][name] = _box_rows(known, np.zeros(len(known), bool), dataset, image_id)
        rows["boxes"][name] = _box_rows(found, new, dataset, image_id)
    return rows


def _box_rows(found: Detections, new: np.ndarray, dataset: CocoDataset | None, image_id: int) -> list[list[Any]]:
    """Return the shown boxes of one image by descending score; new: [N] bool; kind is "" without ground truth."""
    kinds = [""] * len(found)
    if dataset is not None:
        explained = explain(found, objects_of(dataset, image_id))
        for row, kind in zip(best_rows(found), explained.kinds, strict=True):
            kinds[row] = KINDS[kind]
    shown = [i for i in np.argsort(-found.scores, kind="stable") if found.scores[i] >= SHOWN_SCORE][:_MAX_BOXES]
    return [
        [
            *_rounded(found.boxes[i].tolist()),
            round(float(found.scores[i]), 2),
            int(found.labels[i]),
            int(found.depth[i]),
            kinds[i],
            int(new[i]),
        ]
        for i in shown
    ]


def _look_rows(looked: Sequence[TracedTile], policy: Policy) -> dict[str, Any]:
    """Return the windows, and the planning weights of the whole image's map as an overlay; its tile is the first."""
    windows = [[*traced.tile.window.xyxy, traced.tile.depth] for traced in looked[1:]]
    whole, seen = looked[0]
    return {"windows": windows, "map": None if seen is None else _overlay(planning_weights(whole, seen, policy))}


def _overlay(weights: np.ndarray) -> str:
    """Render [h, w] weights in [0, 1] as an image of one colour with the weights as opacity."""
    alpha = np.rint(255 * weights).astype(np.uint8)
    colour = np.broadcast_to(np.array(_MAP_COLOUR, np.uint8), (*alpha.shape, 3))
    image = Image.fromarray(np.dstack([colour, alpha]))
    image.thumbnail((_MAP_SIDE, _MAP_SIDE))
    return _data_uri("image/png", encoded(image, "PNG", optimize=True))


def _photo(image: AnyImage, max_bytes: int) -> str:
    """The largest photograph that is not much longer than `max_bytes` as a data URI; the smallest at any length."""
    photo = Image.fromarray(whole_pixels(image, _LONGER_SIDES[0]))
    jpeg = b""
    for side in _LONGER_SIDES:
        photo.thumbnail((side, side), Image.Resampling.LANCZOS)
        jpeg = encoded(photo, "JPEG", quality=_JPEG_QUALITY)
        if 4 * len(jpeg) // 3 <= max_bytes:
            break
    return _data_uri("image/jpeg", jpeg)


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
