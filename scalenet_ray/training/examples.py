"""Annotated training images: splits, pixels, object masks and random windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window, fit_longer_side, tile_pixels
from scalenet_ray.core.masks import mask_of_segmentation
from scalenet_ray.data.coco import Objects, objects_of, safe_file_name
from scalenet_ray.data.datasets import Layout, find_layout
from scalenet_ray.data.rasters import open_image
from scalenet_ray.data.storage import join


@dataclass(frozen=True, eq=False)
class Example:
    """Reference to an annotated image.

    Attributes:
        image_id: id in the data set.
        uri: local path or a store's address of the file.
        hw: annotated (height, width) in image pixels, None if not annotated.
        objects: ground truth in image pixels.
    """

    image_id: int
    uri: str
    hw: tuple[int, int] | None
    objects: Objects


def read_examples(data: str | Layout, split: str, limit: int | None = None) -> list[Example]:
    """Read the examples of a split of a data set, or of its address: the first `limit` images, ordered by id.

    Raises:
        FileNotFoundError: if the annotations do not exist.
        UserError: if they list no image or are not in their layout's form.
    """
    layout = find_layout(split, data=data) if isinstance(data, str) else data
    dataset = layout.read(split)
    if limit is not None and limit < 1:
        msg = f"training wants at least one image, got a limit of {limit}: raise it"
        raise UserError(msg)
    return [
        Example(
            record.image_id,
            join(layout.images_of(split), safe_file_name(record.file_name)),
            record.hw,
            objects_of(dataset, record.image_id),
        )
        for record in dataset.images[:limit]
    ]


@dataclass(frozen=True)
class TrainingImages:
    """Training and validation images of a data set.

    Attributes:
        data: a folder or a data.yaml, see `data.datasets`; None if `annotations` and `images` are given.
        split: training split.
        val_split: validation split; not used if a share of `split` is held out.
        holdout: share of `split` to validate on instead, at least 0 and below 1.
        limit: use the first N images of each split only.
        annotations: instances file or folder of label files, in place of `data`; {split} stands for the split's name.
        images: folder of the images, with `annotations`.

    Raises:
        UserError: if `holdout` is out of range.
    """

    data: str | None
    split: str = "train2017"
    val_split: str = "val2017"
    holdout: float = 0.0
    limit: int | None = None
    annotations: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            msg = f"holdout must be a share of the images, at least 0 and under 1, got {self.holdout}"
            raise UserError(msg)

    @functools.cached_property
    def layout(self) -> Layout:
        """Places of the splits.

        Raises:
            UserError: if it is not said, or training and validation split are the same.
        """
        found = find_layout(self.split, data=self.data, annotations=self.annotations, images=self.images)
        if not self.holdout and not found.tells_splits_apart:
            msg = (
                f"training and validation images must differ, got {found.annotations} for both: hold out a share with "
                "--holdout 0.1, or write {split} for the split's name, as in --annotations 'labels/{split}.json'"
            )
            raise UserError(msg)
        return found

    @property
    def splits(self) -> list[str]:
        """The splits that are read."""
        return [self.split] if self.holdout else [self.split, self.val_split]

    def in_coco_form(self, folder: str) -> TrainingImages:
        """The same images with annotations in COCO's form, which other processes read from `folder`."""
        if self.layout.form == "coco":
            return self
        converted = self.layout.in_coco_form(self.splits, folder)
        return replace(self, data=None, annotations=converted.annotations, images=converted.images)

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Training examples and validation examples; raises as `read_examples` does."""
        return _read(self)

    def count_boxes_alone(self) -> int:
        """Number of objects without a usable segmentation, whose mask is their box."""
        examples = (example for part in self.examples() for example in part)
        return sum(mask is None for example in examples for mask in example.objects.segmentations)


@functools.lru_cache(maxsize=1)
def _read(images: TrainingImages) -> tuple[list[Example], list[Example]]:
    examples = read_examples(images.layout, images.split, images.limit)
    if not images.holdout:
        return examples, read_examples(images.layout, images.val_split, images.limit)
    order = np.random.default_rng(0).permutation(len(examples))
    held_out = set(order[: round(images.holdout * len(examples))].tolist())
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [examples[i] for i in sorted(held_out)],
    )


def read_tile(example: Example, tile_side: int, choose: Callable[[tuple[int, int]], Window]) -> tuple[Tile, np.ndarray]:
    """Read a window of an image, a large TIFF's as `data.rasters` reads it.

    Args:
        example: the image.
        tile_side: the longer side of the result, in tile pixels.
        choose: (height, width) of the image -> the window, in image pixels.

    Returns:
        The tile, and its pixels, [h, w, 3] uint8 RGB.

    Raises:
        TileError: if the file is missing, can't be decoded or differs from the annotated size; the message names it.
    """
    try:
        image = open_image(example.uri, expect_hw=example.hw)
        hw = (image.shape[0], image.shape[1])
        tile = tile_of_window(example.image_id, hw, choose(hw), tile_side)
        return tile, tile_pixels(image, tile)
    except TileError as error:
        msg = f"image {example.image_id}, {example.uri}: {error}"
        raise TileError(msg) from error


def whole_image(hw: tuple[int, int]) -> Window:
    """The window of a whole image of (height, width)."""
    return Window(0, 0, hw[1], hw[0])


def object_mask(objects: Objects, i: int, hw: tuple[int, int], window: Window) -> np.ndarray:
    """Mask of object `i` in a window of an image of (height, width): [window.height, window.width] uint8, 0 or 1.

    It is that of its box if it has no mask of this size.
    """
    try:
        return mask_of_segmentation(objects.segmentations[i], hw)[window.y0 : window.y1, window.x0 : window.x1]
    except TileError:
        mask = np.zeros((window.height, window.width), np.uint8)
        corners = np.round(objects.boxes[i]) - (window.x0, window.y0) * 2
        x0, y0, x1, y1 = np.maximum(corners, 0).astype(int)
        mask[y0:y1, x0:x1] = 1
        return mask


def random_window(rng: np.random.Generator, hw: tuple[int, int], share: float) -> Window:
    """A uniformly placed window whose sides are `share` of the image's (height, width)."""
    height, width = max(1, round(hw[0] * share)), max(1, round(hw[1] * share))
    y0, x0 = int(rng.integers(0, hw[0] - height + 1)), int(rng.integers(0, hw[1] - width + 1))
    return Window(x0, y0, x0 + width, y0 + height)


def tile_of_window(image_id: int, hw: tuple[int, int], window: Window, tile_side: int) -> Tile:
    """The tile of a window, with its longer side at `tile_side` tile pixels."""
    return Tile(image_id, (), hw, window, *fit_longer_side(window.height, window.width, tile_side))
