"""The embedded sample: synthetic scenes with objects at many scales, written in COCO's layout.

Ten shapes of 6 to 250 pixels on textured, cluttered backgrounds. Most objects are small and clustered, so that zooming
into a part of a scene helps. A third split, large2017, has large scenes (`sample.large_scenes`). Scenes are
deterministic: a scene depends on the seed, the split and its index only. So each machine draws its own, and reads it
as `SAMPLE`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import UserError
from scalenet_ray.sample.large_scenes import FIRST_LARGE_ID, LargeScene, large_scene
from scalenet_ray.sample.shapes import SAMPLE_CATEGORIES, SMALL_SIDE, arc, paint, shape_alpha

SAMPLE = "embedded://sample"
"""Address of the sample, on any machine; `data.stores` names `SampleFiles` as its file system."""

SAMPLE_VERSION = 1
"""Version of the scenes; a sample on disk with another version is replaced."""

SIZES_HW = ((384, 384), (288, 384), (384, 288), (336, 448), (448, 336))
"""(height, width) of the scenes in pixels."""

MIN_SIDE, MAX_SIDE = 7.0, 250.0
"""Longer sides of the objects in pixels: minimum and maximum."""

SMALL_SHARE = 0.55
"""Share of the objects that are small."""

SPLITS = {"train2017": 0, "val2017": 1_000_000, "large2017": FIRST_LARGE_ID}
"""Split -> offset of its image ids."""

_STAMP = "sample.json"
_FOLDER = Path("runs/sample")


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its objects.

    Attributes:
        pixels: [height, width, 3] uint8 RGB.
        masks: [N, height, width] bool, visible part of each object.
        category_ids: [N] int64, keys of SAMPLE_CATEGORIES.
    """

    pixels: np.ndarray
    masks: np.ndarray
    category_ids: np.ndarray


def _background(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Background of a gradient, low-frequency noise and sometimes stripes: [h, w, 3] float32 in about 0..255."""
    height, width = hw
    cells = int(rng.integers(3, 9))
    rough = rng.normal(0, rng.uniform(6, 26), (cells, cells, 3)) + rng.uniform(50, 205, 3)
    slope = rng.normal(0, 30, (2, 1, 1, 3))
    ramp = np.linspace(-1, 1, cells)
    rough = rough + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    small = Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8))
    canvas = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    if rng.random() < 0.4:
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
        rows = np.arange(height, dtype=np.float32)[:, None] * (math.sin(angle) / period)
        columns = np.arange(width, dtype=np.float32)[None, :] * (math.cos(angle) / period)
        stripes = np.sin(2 * np.pi * (rows + columns)) * rng.uniform(4, 16)
        canvas = canvas + stripes[:, :, None].astype(np.float32)
    return canvas


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Draw distractors (lines, blurred blobs, specks) over [h, w, 3] float32."""
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    width, height = image.size
    draw = ImageDraw.Draw(image)

    def near(x: int, y: int, spread: float) -> tuple[int, ...]:
        """A random colour close to that of a pixel."""
        return tuple(int(v) for v in np.clip(canvas[y, x] + rng.normal(0, spread, 3), 0, 255))

    for _ in range(int(rng.integers(0, 6))):
        x, y, radius = int(rng.integers(width)), int(rng.integers(height)), rng.uniform(8, 60)
        points = arc(0, 2 * math.pi, count=13)[:12] * (radius * rng.uniform(0.5, 1.0, (12, 1))) + (x, y)
        draw.polygon([tuple(point) for point in points.tolist()], fill=near(x, y, 35))
    # Distinct from objects, which have sharp edges and are thicker than lines.
    image = image.filter(ImageFilter.BoxBlur(4))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 9))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        end = (x + rng.normal(0, 120), y + rng.normal(0, 120))
        draw.line([(x, y), end], fill=near(x, y, 45), width=int(rng.integers(1, 3)))
    for _ in range(int(rng.integers(0, 40))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        draw.rectangle([x, y, x + int(rng.integers(0, 3)), y + int(rng.integers(0, 3))], fill=near(x, y, 60))
    return np.asarray(image, np.float32)


def _sides(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """[N] longer sides of a scene's objects in pixels, descending; log-uniform among small and among other objects."""
    count = int(rng.integers(3, 13))
    limit = min(MAX_SIDE, 0.88 * min(hw))
    small = np.exp(rng.uniform(math.log(MIN_SIDE), math.log(SMALL_SIDE), count))
    other = np.exp(rng.uniform(math.log(SMALL_SIDE), math.log(limit), count))
    return np.sort(np.where(rng.random(count) < SMALL_SHARE, small, other))[::-1]


def _place(
    rng: np.random.Generator, size_hw: tuple[int, int], taken: np.ndarray, centre: np.ndarray | None
) -> tuple[int, int] | None:
    """(y, x) of a free place for a box of `size_hw`, near `centre` (x, y) if given; None if none is found."""
    height, width = size_hw
    room_y, room_x = taken.shape[0] - height, taken.shape[1] - width
    for _ in range(25):
        if centre is None:
            y, x = rng.integers(0, room_y + 1), rng.integers(0, room_x + 1)
        else:
            x, y = np.clip(rng.normal(centre, 30) - (width / 2, height / 2), 0, (room_x, room_y)).astype(int)
        if (taken[y : y + height, x : x + width] >= 0).mean() < 0.05:
            return int(y), int(x)
    return None


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 3 to 12 objects with little overlap, largest first."""
    hw = SIZES_HW[int(rng.integers(len(SIZES_HW)))]
    canvas = _clutter(rng, _background(rng, hw))
    owner = np.full(hw, -1, np.int16)
    centres = rng.uniform(0.12, 0.88, (int(rng.integers(1, 3)), 2)) * (hw[1], hw[0])
    ids = list(SAMPLE_CATEGORIES)
    category_ids: list[int] = []
    for side in _sides(rng, hw):
        category_id = ids[int(rng.integers(len(ids)))]
        alpha = shape_alpha(rng, SAMPLE_CATEGORIES[category_id], float(side))
        clustered = side < SMALL_SIDE and rng.random() < 0.8
        place = _place(rng, alpha.shape, owner, centres[int(rng.integers(len(centres)))] if clustered else None)
        if place is None or alpha.max() < 0.5:
            continue
        spot = np.s_[place[0] : place[0] + alpha.shape[0], place[1] : place[1] + alpha.shape[1]]
        canvas[spot] = paint(rng, canvas[spot], alpha)
        owner[spot][alpha >= 0.5] = len(category_ids)
        category_ids.append(category_id)
    noise = rng.standard_normal((*hw, 1), dtype=np.float32) * np.float32(rng.uniform(1, 7))
    pixels = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    masks = owner[None] == np.arange(len(category_ids), dtype=np.int16)[:, None, None]
    seen = masks.any(axis=(1, 2))
    return Scene(pixels, masks[seen], np.array(category_ids, np.int64)[seen])


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw a scene of the sample, without JPEG compression.

    Args:
        split: train2017 or val2017.
        index: index in the split, from 0.
        seed: seed of the sample.
    """
    return make_scene(np.random.default_rng([seed, SPLITS[split], index]))


def _objects(scene: Scene) -> list[dict]:
    """A scene's objects as fields of COCO annotations, with run-length masks; `area` counts mask pixels."""
    rows = []
    for mask in scene.masks:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        rows.append(
            {
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "area": float(coco_mask.area(rle)),
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},  # type: ignore[attr-defined]
            }
        )
    return rows


def _large_objects(scene: LargeScene) -> list[dict]:
    """A large scene's objects as fields of COCO annotations: boxes and areas, no masks."""
    corners = scene.boxes.astype(float)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return [{"bbox": box, "area": float(mask.sum())} for box, mask in zip(boxes, scene.masks, strict=True)]


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        if split == "large2017":
            scene = large_scene(i, seed)
            objects = _large_objects(scene)
        else:
            scene = sample_scene(split, i, seed)
            objects = _objects(scene)
        image_id = SPLITS[split] + i + 1
        name = f"{image_id:012d}.jpg"
        Image.fromarray(scene.pixels).save(folder / split / name, quality=92)
        height, width = scene.pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for category_id, fields in zip(scene.category_ids.tolist(), objects, strict=True):
            shared = {"image_id": image_id, "category_id": category_id, "iscrowd": 0}
            annotations.append({"id": SPLITS[split] + len(annotations) + 1, **shared, **fields})
    document = {
        "info": {"description": "scalenet_ray's embedded sample", "version": str(SAMPLE_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in SAMPLE_CATEGORIES.items()],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def write_sample(folder: Path, *, train: int = 600, val: int = 100, large: int = 0, seed: int = 0) -> Path:
    """Write the sample: {train,val,large}2017/*.jpg, annotations/instances_{train,val,large}2017.json.

    Args:
        folder: target folder; created if missing. It is returned.
        train: number of scenes in train2017.
        val: number of scenes in val2017.
        large: number of scenes in large2017, of 12 megapixels each.
        seed: seed of the scenes.

    Raises:
        FileExistsError: if `folder` is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        msg = f"the sample wants a new or empty folder, got {folder} with files in it: name another one"
        raise FileExistsError(msg)
    counts = {"train": train, "val": val, "large": large}
    for name, count in counts.items():
        _write_split(folder, f"{name}2017", count, seed)
    (folder / _STAMP).write_text(json.dumps(counts | {"seed": seed, "version": SAMPLE_VERSION}))
    return folder


def ensure_sample(folder: Path) -> Path:
    """Write the default sample to `folder` unless it is there.

    The write is atomic, and of concurrent processes of a machine one writes. A sample of another version is replaced.

    Raises:
        FileExistsError: if `folder` holds other files.
    """
    folder = Path(folder)
    wanted = {"train": 600, "val": 100, "large": 8, "seed": 0, "version": SAMPLE_VERSION}
    if _stamp(folder) == wanted:
        return folder
    if folder.exists() and any(folder.iterdir()) and _stamp(folder) is None:
        msg = f"{folder} holds files that are no sample of scalenet_ray: name another folder"
        raise FileExistsError(msg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        if _stamp(folder) == wanted:
            return folder
        fresh = write_sample(Path(scratch) / "new", large=8)
        if folder.exists() and _stamp(folder) != wanted:
            os.replace(folder, Path(scratch) / "old")
        try:
            os.replace(fresh, folder)
        except OSError:
            # A non-empty folder is not replaced: another machine has written the sample, which does not see the lock.
            if _stamp(folder) != wanted:
                raise
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on a folder in the block."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stamp(folder: Path) -> dict | None:
    """Parameters of the sample in `folder`, or None if there is none."""
    path = folder / _STAMP
    return json.loads(path.read_text()) if path.is_file() else None


class SampleFiles(DirFileSystem):
    """File system of `SAMPLE`, to read only: the files of runs/sample, which are written first if they are not there.

    Its paths start with sample/. A working directory, where they are, is each node's own in a cluster.

    Raises:
        FileExistsError: if runs/sample holds other files.
    """

    protocol = "embedded"
    cachable = False  # The working directory may change.

    def __init__(self, **options: Any) -> None:
        super().__init__(str(ensure_sample(_FOLDER).absolute().parent), LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped = str(super()._strip_protocol(path))
        if stripped.partition("/")[0] != _FOLDER.name:
            msg = f"an embedded:// address must start with {SAMPLE}, got {path}: write {SAMPLE}, or {SAMPLE}/SPLIT"
            raise UserError(msg)
        return stripped
