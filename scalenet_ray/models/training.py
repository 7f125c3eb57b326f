"""Training Scale Net on a folder in COCO's layout: examples, augmentation, steps and measures. Plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from scalenet_ray.core.coco import Objects, objects_of, read_annotations, safe_file_name
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.images import cut_tile, decode_image
from scalenet_ray.core.scale import IGNORE, NUM_CLASSES, class_target
from scalenet_ray.core.storage import join, read_bytes
from scalenet_ray.core.window import Tile, Window
from scalenet_ray.models.losses import focal_loss, masked_mse
from scalenet_ray.models.scale_net import ScaleNetConfig, scale_net_input

__all__ = [
    "CLASS_WEIGHTS",
    "Batch",
    "Example",
    "ScaleDataset",
    "batches",
    "evaluate",
    "random_window",
    "read_examples",
    "read_pixels",
    "scale_net_loss",
    "tile_of_window",
    "train",
    "train_step",
    "window_target",
]

CLASS_WEIGHTS = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0)
"""Of the focal loss: class 1 decides where to zoom, and covers the fewest pixels."""

ZOOMED_SHARE = 0.6
WINDOW_SHARES = (0.5, 1.0)
CELL_COVER = 0.25
_BINS = 1000


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
        ValueError: if they name no image, or are not COCO's.
    """
    dataset = read_annotations(join(data, "annotations", f"instances_{split}.json"))
    if limit is not None and limit < 1:
        msg = f"training wants at least one image, got a limit of {limit}: raise it"
        raise ValueError(msg)
    return [
        Example(
            record.image_id,
            join(data, split, safe_file_name(record.file_name)),
            record.hw,
            objects_of(dataset, record.image_id),
        )
        for record in dataset.images[:limit]
    ]


def read_pixels(example: Example) -> np.ndarray:
    """The image as [h, w, 3] uint8 RGB.

    Raises:
        ValueError: if it can't be decoded or is not as annotated; the message names it.
    """
    try:
        return decode_image(read_bytes(example.uri), expect_hw=example.hw)
    except TileError as error:
        msg = f"image {example.image_id}, {example.uri}: {error.reason}"
        raise ValueError(msg) from error


def _mask(objects: Objects, i: int, hw: tuple[int, int]) -> np.ndarray:
    """[h, w] uint8 0 or 1, of object `i`; its box stands in where it has no segmentation."""
    segmentation = objects.segmentations[i]
    if segmentation is None:
        mask = np.zeros(hw, np.uint8)
        x0, y0, x1, y1 = np.maximum(np.round(objects.boxes[i]), 0).astype(int)
        mask[y0:y1, x0:x1] = 1
        return mask
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *hw))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, *hw)
    else:
        rle = segmentation
    return coco_mask.decode(rle)


def _cells(mask: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[H, W] mask -> [h, w] bool: cells that it covers a good part of, and always the one that it covers most."""
    cover = np.asarray(Image.fromarray(mask * np.uint8(255)).resize((hw[1], hw[0]), Image.Resampling.BOX))
    # A majority would lose what is smaller than a cell, which is what the map is there to find.
    return cover >= max(1, min(CELL_COVER * 255, int(cover.max())))


def random_window(rng: np.random.Generator, hw: tuple[int, int], share: float) -> Window:
    """A window anywhere in an image of `hw`, with sides that are `share` of the image's."""
    height, width = max(1, round(hw[0] * share)), max(1, round(hw[1] * share))
    y0, x0 = int(rng.integers(0, hw[0] - height + 1)), int(rng.integers(0, hw[1] - width + 1))
    return Window(x0, y0, x0 + width, y0 + height)


def tile_of_window(image_id: int, hw: tuple[int, int], window: Window, tile_side: int) -> Tile:
    """The tile of a window whose longer side becomes `tile_side` tile pixels."""
    ratio = tile_side / max(window.height, window.width)
    height, width = max(1, int(window.height * ratio)), max(1, int(window.width * ratio))
    return Tile(image_id, (), hw, window, height, width)


def window_target(objects: Objects, image_hw: tuple[int, int], window: Window, hw: tuple[int, int]) -> np.ndarray:
    """The map of scale classes of a window, measured in its own frame.

    Args:
        objects: of the whole image.
        image_hw: (height, width) of the image, in pixels.
        window: what is looked at.
        hw: (h, w) of the map.

    Returns:
        [h, w] uint8 in 0..5, or IGNORE where there is a crowd.
    """
    masks, kept = [], []
    for i in range(len(objects.boxes)):
        mask = _mask(objects, i, image_hw)[window.y0 : window.y1, window.x0 : window.x1]
        if mask.any():
            masks.append(_cells(mask, hw))
            kept.append(i)
    # An object that the window cuts keeps the area of the whole: a sliver of a large one is not small.
    return class_target(masks, objects.areas[kept], window.area, hw, objects.crowd[kept].tolist())


class ScaleDataset(torch.utils.data.Dataset):
    """Images with maps of scale classes, ready for a network of `config`.

    Args:
        examples: from `read_examples`.
        config: of the network, which fixes the sizes.
        tile_side: the longer side of the detector's tiles, in tile pixels: the net sees what is left of a picture
            at that size, in training as later; None for the network's own input side.
        augment: flips and windows at random; the classes are those of the window's own frame.
        seed: an example's randomness depends on this, `epoch` and its place alone.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: ScaleNetConfig,
        *,
        tile_side: int | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.examples = list(examples)
        self.config = config
        self.tile_side = tile_side or config.output_hw[0] * config.output_stride
        self.augment = augment
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(image [C, H, W] float32, target [h, w] uint8 in 0..5 or IGNORE, image id)."""
        example = self.examples[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image = read_pixels(example)
        hw = (image.shape[0], image.shape[1])
        zoomed = self.augment and rng.random() < ZOOMED_SHARE
        window = random_window(rng, hw, rng.uniform(*WINDOW_SHARES) if zoomed else 1.0)
        pixels = cut_tile(image, tile_of_window(example.image_id, hw, window, self.tile_side))
        target = window_target(example.objects, hw, window, self.config.output_hw)
        if self.augment and rng.random() < 0.5:
            pixels, target = np.ascontiguousarray(pixels[:, ::-1]), np.ascontiguousarray(target[:, ::-1])
        return scale_net_input([pixels], self.config)[0], torch.from_numpy(target), example.image_id


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples: images [B, C, H, W] float32, targets [B, h, w] (classes uint8, scales float32), image ids."""

    images: torch.Tensor
    targets: torch.Tensor
    image_ids: tuple[int, ...]


def batches(dataset: ScaleDataset, batch_size: int, order: Sequence[int]) -> Iterator[Batch]:
    """The examples at `order`, `batch_size` at a time; a last one alone joins none and is left out of training.

    Batch normalisation can't be trained on one example, so that a lone last one is dropped, unless it is all there is.
    """
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        if len(part) == 1 and start:
            return
        images, targets, image_ids = zip(*(dataset[int(i)] for i in part), strict=True)
        yield Batch(torch.stack(images), torch.stack(targets), image_ids)


def scale_net_loss(config: ScaleNetConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of a network: focal for classes, masked squared error for scales."""
    if config.kind == "regression":
        return masked_mse
    weights = torch.tensor(CLASS_WEIGHTS)
    return lambda logits, target: focal_loss(logits, target, class_weights=weights)


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    step: int,
    device: str = "cpu",
    mixed_precision: bool = False,
) -> float:
    """One step down; the loss before it.

    Raises:
        FloatingPointError: if the loss is NaN or infinite; the weights are left as they were.
    """
    images = batch.images.to(device, memory_format=torch.channels_last)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision):
        output = model(images)
    loss = loss_of(output.float(), batch.targets.to(device))
    if not torch.isfinite(loss):
        ids = ", ".join(str(i) for i in batch.image_ids)
        msg = f"the loss is {loss.item()} at step {step} (images {ids}): lower the learning rate or look at these"
        raise FloatingPointError(msg)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.item())


def evaluate(model: nn.Module, dataset: ScaleDataset, *, batch_size: int = 8, device: str = "cpu") -> dict:
    """How well a class map fits, over all pixels of a data set.

    Returns:
        "iou": [6] intersection over union of each class where the most probable class is taken;
        "pixel_ap": [6] average precision of each class's probability over pixels; in percent; NaN for a class
        that does not occur. "loss": the mean loss.
    """
    hits, unions = np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
    ranked = np.zeros((NUM_CLASSES, 2, _BINS))
    loss_of, losses = scale_net_loss(dataset.config), []
    model.eval()
    for batch in batches(dataset, batch_size, range(len(dataset))):
        with torch.inference_mode():
            logits = model(batch.images.to(device, memory_format=torch.channels_last)).float().cpu()
        losses.append(loss_of(logits, batch.targets).item())
        target = batch.targets.numpy()
        counted = target != IGNORE
        target = target[counted]
        prob = logits.softmax(dim=1).numpy().transpose(0, 2, 3, 1)[counted]
        classes = prob.argmax(axis=1)
        for c in range(NUM_CLASSES):
            hits[c] += np.sum((classes == c) & (target == c))
            unions[c] += np.sum((classes == c) | (target == c))
            bins = np.minimum((prob[:, c] * _BINS).astype(int), _BINS - 1)
            for truth in (0, 1):
                ranked[c, truth] += np.bincount(bins[(target == c) == truth], minlength=_BINS)
    with np.errstate(invalid="ignore"):
        iou = 100.0 * hits / unions
    return {
        "iou": iou.tolist(),
        "pixel_ap": [_average_precision(*ranked[c]) for c in range(NUM_CLASSES)],
        "loss": float(np.mean(losses)),
    }


def _average_precision(wrong: np.ndarray, right: np.ndarray) -> float:
    """Average precision in percent from counts of wrong and right pixels in rising bins of probability."""
    if not right.sum():
        return math.nan
    found, taken = np.cumsum(right[::-1]), np.cumsum((right + wrong)[::-1])
    return float(100.0 * np.sum(right[::-1] * found / np.maximum(taken, 1)) / right.sum())


def train(
    model: nn.Module,
    dataset: ScaleDataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    device: str = "cpu",
    mixed_precision: bool = False,
    report: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train with Adam and a learning rate that falls to 0 along a cosine.

    Args:
        model: changed in place.
        dataset: the examples; its `epoch` is set.
        epochs: passes over them.
        batch_size: examples a step.
        learning_rate: at the start.
        seed: of the order of the examples.
        device: where to.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.
        report: called after each epoch with its row.

    Returns:
        A row for each epoch: "epoch" from 1, "loss" (its mean), "seconds", "seconds_left".
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = epochs * math.ceil(len(dataset) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    loss_of = scale_net_loss(dataset.config)
    rows, step, start = [], 0, time.monotonic()
    for epoch in range(epochs):
        dataset.epoch = epoch
        model.train()
        order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
        losses = []
        for batch in batches(dataset, batch_size, order.tolist()):
            loss = train_step(
                model, batch, optimizer, loss_of, step=step, device=device, mixed_precision=mixed_precision
            )
            losses.append(loss)
            schedule.step()
            step += 1
        seconds = time.monotonic() - start
        left = seconds / (epoch + 1) * (epochs - epoch - 1)
        rows.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": seconds, "seconds_left": left})
        if report is not None:
            report(rows[-1])
    return rows
