"""Training recipe for fine-tuning a torchvision detector on upsampled windows (the paper's "fine-tuned")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, Window, boxes_to_tile
from scalenet_ray.core.scale import class_of_area
from scalenet_ray.data.categories import map_categories
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector, load_torchvision, save_detector
from scalenet_ray.training.examples import Example, TrainingImages, read_tile, whole_image
from scalenet_ray.training.recipe import Batch, Row

WHOLE_SHARE = 0.3
"""Probability that an example is the whole image, so that the detector does not forget large objects."""

WINDOW_SHARES = (0.25, 0.5)
"""Range of W, the side of a window as a share of the image's longer side."""

SMALL_SHARE = 0.75
"""Probability that a window is placed on a small object, if there is one."""

MIN_VISIBLE = 0.5
"""Minimum visible share of a box in a tile; boxes below are not trained on."""

MIN_SIDE = 32


@dataclass(frozen=True)
class DetectorRecipe:
    """Recipe of a torchvision detector; create it with `plan_fine_tuning`.

    Attributes:
        start: initial detector: torchvision:NAME, torchvision:PATH or untrained:NAME.
        name: name of the network, one of `detector_names()`.
        categories: the detector's class ids with their names.
        classes: category id of the data set -> class id of the detector.
        input_side: longer side of a tile in tile pixels.
        canvas_side: side of the square that tiles are padded to.
        most_boxes: maximum number of boxes of an image.
        seed: seed of the augmentation, which depends on it, the epoch and the index only.
    """

    images: TrainingImages
    start: str
    name: str
    categories: Mapping[int, str]
    classes: Mapping[int, int]
    input_side: int
    canvas_side: int
    most_boxes: int
    seed: int = 0

    best_by = "fit"
    file_name = "detector.safetensors"

    @property
    def learning_rate(self) -> float:
        """1e-3 for random weights, 1e-4 for fine-tuning."""
        return 1e-3 if _is_untrained(self.start) else 1e-4

    def sizes(self) -> tuple[int, int]:
        """Number of training images, and twice the number of validation images."""
        train, validation = self.images.examples()
        return len(train), 2 * len(validation)

    def example(self, index: int, epoch: int) -> Row:
        """A random window of an image, or the whole image.

        The row has image [canvas_side, canvas_side, 3] uint8 RGB, the tile in the top left corner; hw [2], its
        (height, width); boxes [most_boxes, 4] float32 xyxy in tile pixels; labels [most_boxes], the detector's class
        ids; count, the number of boxes; zoomed, 1 for a window; image_id.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(self.images.examples()[0][index], rng if rng.random() >= WHOLE_SHARE else None)

    def validation_example(self, index: int) -> Row:
        """The whole image at even indices, a fixed window of it at odd ones."""
        example = self.images.examples()[1][index // 2]
        return self._row(example, np.random.default_rng(index) if index % 2 else None)

    def _row(self, example: Example, zoom: np.random.Generator | None) -> Row:
        choose = whole_image if zoom is None else partial(zoom_window, zoom, objects=example.objects)
        tile, pixels = read_tile(example, self.input_side, choose)
        boxes, category_ids = boxes_in_tile(example.objects, tile)
        row = self.blank()
        row["image"][: tile.height, : tile.width] = pixels
        row["boxes"][: len(boxes)] = boxes
        row["labels"][: len(boxes)] = [self.classes[category_id] for category_id in category_ids.tolist()]
        numbers = {"image_id": example.image_id, "count": len(boxes), "zoomed": zoom is not None}
        return row | {"hw": np.array([tile.height, tile.width])} | {k: np.array(int(v)) for k, v in numbers.items()}

    def blank(self) -> Row:
        """A black image with a count of -1, which excludes it from the loss."""
        return {
            "image_id": np.array(-1),
            "image": np.zeros((self.canvas_side, self.canvas_side, 3), np.uint8),
            "hw": np.array([self.canvas_side, self.canvas_side]),
            "boxes": np.zeros((self.most_boxes, 4), np.float32),
            "labels": np.zeros(self.most_boxes, np.int64),
            "count": np.array(-1),
            "zoomed": np.array(0),
        }

    def build(self) -> nn.Module:
        """The initial detector in training mode, with trained batch norms frozen.

        It returns torchvision's losses; its transform normalizes and pads, and never resizes.
        """
        model = _open(self.start, self.categories).release()
        means, deviations = model.transform.image_mean, model.transform.image_std
        model.transform = GeneralizedRCNNTransform(
            0, 0, means, deviations, size_divisible=self.canvas_side, _skip_resize=True
        )
        if not _is_untrained(self.start):
            _freeze_norms(model)
        return model.train()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of torchvision's losses; 0 for a batch of padding rows only."""
        counts = batch["count"].tolist()
        real = [i for i, count in enumerate(counts) if count >= 0]
        # DistributedDataParallel waits for every worker's gradients: padding rows need them too, of 0.
        return _losses(model, batch, real or list(range(len(counts)))) * float(bool(real))

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Summed losses of whole images and of windows, [2], computed per image to be independent of the batches."""
        sums = {"loss": np.zeros(2), "images": np.zeros(2)}
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        device = batch["image"].device
        for i, count in enumerate(batch["count"].tolist()):
            if count < 0:
                continue
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                # torchvision samples anchors and regions at random.
                torch.manual_seed(0)
                loss = _losses(model, batch, [i]).item()
            zoomed = int(batch["zoomed"][i])
            sums["loss"][zoomed] += loss
            sums["images"][zoomed] += 1
        model.eval()
        return sums

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Mean losses "loss_whole", "loss_windows" and "loss" (of both), and "fit", 1 / (1 + loss)."""
        loss, images = counts["loss"], counts["images"]
        with np.errstate(invalid="ignore"):  # NaN of what has no image.
            (whole, windows), mean = (loss / images).tolist(), float(loss.sum() / images.sum())
        return {"fit": 1 / (1 + mean), "loss": mean, "loss_whole": whole, "loss_windows": windows}

    def save(self, model: nn.Module, path: str) -> None:
        """Write a file that `torchvision:PATH` loads."""
        save_detector(model, self.name, self.categories, path)


def _losses(model: nn.Module, batch: Batch, chosen: list[int]) -> torch.Tensor:
    """Sum of torchvision's losses over the chosen rows of a batch, a scalar."""
    images, targets = [], []
    for i in chosen:
        (height, width), count = batch["hw"][i].tolist(), max(0, int(batch["count"][i]))
        images.append(batch["image"][i, :height, :width].permute(2, 0, 1).float() / 255)
        targets.append({"boxes": batch["boxes"][i, :count], "labels": batch["labels"][i, :count]})
    return torch.stack([loss.float() for loss in model(images, targets).values()]).sum()


def _freeze_norms(module: nn.Module) -> None:
    """Replace all batch norms of a module by torchvision's frozen ones: statistics of small batches are poor."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_norms(child)


def plan_fine_tuning(
    images: TrainingImages, start: str, *, input_side: int | None = None, seed: int = 0
) -> DetectorRecipe:
    """Make the recipe for fine-tuning a detector on a data set.

    Args:
        images: training and validation images.
        start: torchvision:NAME or torchvision:PATH, as for `load_detector`; or untrained:NAME, a network with random
            weights whose classes are the data set's.
        input_side: longer side of a tile in tile pixels; the detector's by default.
        seed: seed of the augmentation.

    Raises:
        FileNotFoundError: if a file does not exist.
        ConnectionError: if torchvision's weights can't be downloaded.
        UserError: if the detector can't be fine-tuned or lacks a category of the data set, or no image has objects.
    """
    kind, _, what = start.partition(":")
    if kind not in ("torchvision", "untrained") or not what:
        msg = (
            "a detector that is fine-tuned must be torchvision:NAME, torchvision:PATH or untrained:NAME, "
            f"got {start!r}: other kinds, such as exported ONNX files, can't be trained here"
        )
        raise UserError(msg)
    dataset_categories, unused = _categories(images)
    detector = _open(start, dict(enumerate(dataset_categories.values(), start=1)))
    name = detector.name or what
    if name.startswith("maskrcnn"):
        msg = f"{name} learns masks too, which are not cut into windows here: fine-tune a Faster R-CNN, got {start!r}"
        raise UserError(msg)
    side = detector.input_side if input_side is None else input_side
    if side < MIN_SIDE:
        msg = f"input_side must be {MIN_SIDE} tile pixels or more, got {side}"
        raise UserError(msg)
    mapping = map_categories(detector.categories, dataset_categories, unused)
    examples = [example for part in images.examples() for example in part]
    most_boxes = max((len(example.objects.boxes) for example in examples), default=0)
    if not most_boxes:
        msg = f"fine-tuning wants objects, got {len(examples)} images without any: check the splits and the limit"
        raise UserError(msg)
    return DetectorRecipe(
        images=images,
        start=start,
        name=name,
        categories=detector.categories,
        # If two classes have the same name, the first is trained.
        classes={category_id: class_id for class_id, category_id in sorted(mapping.items(), reverse=True)},
        input_side=side,
        canvas_side=detector.canvas_hw((side, side))[0],
        most_boxes=most_boxes,
        seed=seed,
    )


def _is_untrained(start: str) -> bool:
    return start.startswith("untrained:")


def _open(start: str, categories: Mapping[int, str]) -> TorchvisionDetector:
    """Load the initial detector; `categories`, class id -> name, are for an untrained one."""
    what = start.partition(":")[2]
    if _is_untrained(start):
        return TorchvisionDetector(build_detector(what, len(categories) + 1), categories)
    return load_torchvision(what)


def _categories(images: TrainingImages) -> tuple[dict[int, str], frozenset[int]]:
    """Category id -> name, equal in all splits, and the ids without an annotation in any split."""
    datasets = [images.layout.read(split) for split in images.splits]
    if datasets[0].categories != datasets[-1].categories:
        msg = f"{' and '.join(images.splits)} must have the same categories, got others: correct the annotations"
        raise UserError(msg)
    return datasets[0].categories, frozenset.intersection(*(dataset.unused_categories for dataset in datasets))


def small_objects(objects: Objects, image_hw: tuple[int, int]) -> np.ndarray:
    """[K] int64, indices of the objects of scale class 1 that are not crowds."""
    return np.flatnonzero((class_of_area(objects.areas, image_hw[0] * image_hw[1]) == 1) & ~objects.crowd)


def zoom_window(rng: np.random.Generator, image_hw: tuple[int, int], objects: Objects) -> Window:
    """A random window, square if it fits the image, placed on a small object with probability `SMALL_SHARE`."""
    limit = np.array([image_hw[1], image_hw[0]])
    size = np.clip(round(rng.uniform(*WINDOW_SHARES) * limit.max()), 1, limit)
    room = limit - size
    low, high = np.zeros(2, np.int64), room
    small = small_objects(objects, image_hw)
    if len(small) and rng.random() < SMALL_SHARE:
        box = objects.boxes[rng.choice(small)].astype(np.float64)
        ends = np.clip([np.ceil(box[2:]) - size, np.floor(box[:2])], 0, room).astype(np.int64)
        # An object longer than the window fills it.
        low, high = ends.min(axis=0), ends.max(axis=0)
    x0, y0 = rng.integers(low, high + 1).tolist()
    return Window(x0, y0, x0 + int(size[0]), y0 + int(size[1]))


def boxes_in_tile(objects: Objects, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Training boxes of a tile, with their category ids.

    Crowds, boxes visible to less than `MIN_VISIBLE` and boxes thinner than a tile pixel are left out.

    Returns:
        [N, 4] float32 xyxy in tile pixels, clipped to the tile, and [N] int64.
    """
    boxes = boxes_to_tile(objects.boxes, tile).astype(np.float64)
    cut = np.clip(boxes, 0, [tile.width, tile.height] * 2)
    sides = cut[:, 2:] - cut[:, :2]
    visible, area = np.prod(sides, axis=1), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    usable = ~objects.crowd & (visible >= MIN_VISIBLE * area) & (sides >= 1).all(axis=1)
    return cut[usable].astype(np.float32), objects.labels[usable]
