"""Annotated images as training sees them: which, their pixels, their objects' masks, and windows of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window, fit_longer_side
from scalenet_ray.core.masks import mask_of_segmentation
from scalenet_ray.data.coco import Objects, annotations_uri, objects_of, read_annotations, safe_file_name
from scalenet_ray.data.images import read_image
from scalenet_ray.data.storage import join

__all__ = [
    "Example",
    "TrainingImages",
    "object_mask",
    "random_window",
    "read_examples",
    "read_pixels",
    "tile_of_window",
]


@dataclass(frozen=True, eq=False)
class Example:
    """An annotated image, not read yet.

    Attributes:
        image_id: its id in the data set.
        uri: where it lies.
        hw: (height, width) in image pixels, as annotated.
        objects: the ground truth, in image pixels.
    """

    image_id: int
    uri: str
    hw: tuple[int, int] | None
    objects: Objects


def read_examples(data: str, split: str, limit: int | None = None) -> list[Example]:
    """The annotated images of DATA/SPLIT, by DATA/annotations/instances_SPLIT.json, in the order of their ids.

    Args:
        data: a folder in COCO's layout, local or s3://.
        split: e.g. "train2017".
        limit: only the first so many.

    Raises:
        FileNotFoundError: if there are no annotations of that name.
        UserError: if they name no image, or are not COCO's.
    """
    dataset = read_annotations(annotations_uri(data, split))
    if limit is not None and limit < 1:
        msg = f"training wants at least one image, got a limit of {limit}: raise it"
        raise UserError(msg)
    return [
        Example(
            record.image_id,
            join(data, split, safe_file_name(record.file_name)),
            record.hw,
            objects_of(dataset, record.image_id),
        )
        for record in dataset.images[:limit]
    ]


@dataclass(frozen=True)
class TrainingImages:
    """Which annotated images a network learns from, and which it is judged by.

    Attributes:
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: what is trained on.
        val_split: what is validated on, unless a share of `split` is held out.
        holdout: that share, at least 0 and under 1; the held-out images are not trained on.
        limit: only the first so many images of each split.

    Raises:
        UserError: if `holdout` is no such share.
    """

    data: str
    split: str = "train2017"
    val_split: str = "val2017"
    holdout: float = 0.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            msg = f"holdout must be a share of the images, at least 0 and under 1, got {self.holdout}"
            raise UserError(msg)

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Those to train on and those to validate on.

        Raises:
            FileNotFoundError: if there are no annotations of that name.
            UserError: if they name no image, or are not COCO's.
        """
        return _read(self)

    def count_boxes_alone(self) -> int:
        """How many objects have no usable segmentation, so that their boxes' pixels stand in."""
        return sum(o is None for part in self.examples() for each in part for o in each.objects.segmentations)


@functools.lru_cache(maxsize=1)
def _read(images: TrainingImages) -> tuple[list[Example], list[Example]]:
    learned = read_examples(images.data, images.split, images.limit)
    if not images.holdout:
        return learned, read_examples(images.data, images.val_split, images.limit)
    order = np.random.default_rng(0).permutation(len(learned))
    held_out = set(order[: round(images.holdout * len(learned))].tolist())
    return (
        [example for i, example in enumerate(learned) if i not in held_out],
        [learned[i] for i in sorted(held_out)],
    )


def read_pixels(example: Example) -> np.ndarray:
    """The image as [h, w, 3] uint8 RGB.

    Raises:
        TileError: if it is not there, can't be decoded or is not as annotated; the reason names it.
    """
    try:
        return read_image(example.uri, expect_hw=example.hw)
    except TileError as error:
        msg = f"image {example.image_id}, {example.uri}: {error}"
        raise TileError(msg) from error


def object_mask(objects: Objects, i: int, hw: tuple[int, int]) -> np.ndarray:
    """[h, w] uint8 0 or 1, of object `i`; its box stands in where it has no mask of this image."""
    try:
        return mask_of_segmentation(objects.segmentations[i], hw)
    except TileError:
        mask = np.zeros(hw, np.uint8)
        x0, y0, x1, y1 = np.maximum(np.round(objects.boxes[i]), 0).astype(int)
        mask[y0:y1, x0:x1] = 1
        return mask


def random_window(rng: np.random.Generator, hw: tuple[int, int], share: float) -> Window:
    """A window anywhere in an image of `hw`, with sides that are `share` of the image's."""
    height, width = max(1, round(hw[0] * share)), max(1, round(hw[1] * share))
    y0, x0 = int(rng.integers(0, hw[0] - height + 1)), int(rng.integers(0, hw[1] - width + 1))
    return Window(x0, y0, x0 + width, y0 + height)


def tile_of_window(image_id: int, hw: tuple[int, int], window: Window, tile_side: int) -> Tile:
    """The tile of a window whose longer side becomes `tile_side` tile pixels."""
    return Tile(image_id, (), hw, window, *fit_longer_side(window.height, window.width, tile_side))
