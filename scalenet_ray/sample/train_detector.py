"""Training loop and augmentation of the sample's tiny detector. Plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scalenet_ray.core.geometry import boxes_to_tile, cut_tile
from scalenet_ray.data.images import read_image
from scalenet_ray.models.padding import padded
from scalenet_ray.sample.detector import Answers, TinyNet, assign_targets, detection_loss
from scalenet_ray.sample.tiny import TinyNetConfig
from scalenet_ray.training.examples import Example, random_window, tile_of_window

WINDOW_SHARES = (0.25, 1.0)
"""Range of a window's sides as shares of the image's, sampled log-uniformly."""

WHOLE_SHARE = 0.3
"""Probability that a tile is the whole image."""

MIN_VISIBLE = 0.5
"""Minimum visible share of a box; boxes below are ignored in the loss."""


@dataclass(frozen=True, eq=False)
class TrainingTile:
    """Augmented pixels of a tile with its objects.

    Attributes:
        pixels: [h, w, 3] uint8 RGB.
        boxes: [N, 4] float32 xyxy in tile pixels, clipped to the tile.
        category_ids: [N] int64.
        ignored: [N] bool, crowds and objects visible to less than `MIN_VISIBLE`.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    category_ids: np.ndarray
    ignored: np.ndarray


def random_tile(rng: np.random.Generator, pixels: np.ndarray, example: Example, input_side: int) -> TrainingTile:
    """Cut a random window of an image, [h, w, 3] uint8, with random flips, transposition and channel permutation.

    `input_side` is the longer side of the tile in tile pixels.
    """
    hw = (pixels.shape[0], pixels.shape[1])
    share = 1.0 if rng.random() < WHOLE_SHARE else math.exp(rng.uniform(*np.log(WINDOW_SHARES)))
    recipe = tile_of_window(example.image_id, hw, random_window(rng, hw, share), input_side)
    tile, limits = cut_tile(pixels, recipe), [recipe.width, recipe.height] * 2
    boxes = boxes_to_tile(example.objects.boxes, recipe).astype(np.float64)
    cut = np.clip(boxes, 0, limits)
    area, visible = (np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), axis=1) for b in (boxes, cut))
    inside = visible > 0
    ignored = example.objects.crowd | (visible < MIN_VISIBLE * area)
    tile, cut = _flipped(rng, tile, cut)
    tile = np.ascontiguousarray(tile[:, :, rng.permutation(3)])
    return TrainingTile(tile, cut[inside].astype(np.float32), example.objects.labels[inside], ignored[inside])


def _flipped(rng: np.random.Generator, tile: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random flips and transposition of a tile and its boxes [N, 4] xyxy."""
    if rng.random() < 0.5:
        width = tile.shape[1]
        tile, boxes = tile[:, ::-1], np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if rng.random() < 0.5:
        height = tile.shape[0]
        tile, boxes = tile[::-1], np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1)
    if rng.random() < 0.5:
        tile, boxes = tile.transpose(1, 0, 2), boxes[:, [1, 0, 3, 2]]
    return tile, boxes


def _loss(
    model: TinyNet, tiles: Sequence[TrainingTile], config: TinyNetConfig, device: str, *, mixed_precision: bool
) -> torch.Tensor:
    index_of = {category_id: i for i, category_id in enumerate(config.category_ids)}
    targets = assign_targets(
        [torch.from_numpy(tile.boxes) for tile in tiles],
        [torch.tensor([index_of[int(c)] for c in tile.category_ids], dtype=torch.int64) for tile in tiles],
        [torch.from_numpy(tile.ignored) for tile in tiles],
        config.input_side,
    )
    images = torch.from_numpy(padded([tile.pixels for tile in tiles], (config.input_side, config.input_side)))
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision):
        output = model(images.permute(0, 3, 1, 2).float().to(device, memory_format=torch.channels_last))
    return detection_loss(Answers(*(part.float().cpu() for part in output[:3])), targets)


def train_tiny_detector(
    examples: Sequence[Example],
    config: TinyNetConfig,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    device: str = "cpu",
    mixed_precision: bool = False,
    report: Callable[[dict], None] | None = None,
) -> TinyNet:
    """Train from scratch with AdamW and a one-cycle schedule; returns the network in evaluation mode.

    Args:
        examples: training images; all pixels are held in memory.
        config: configuration of the detector.
        epochs: passes over the images.
        batch_size: tiles per step.
        learning_rate: peak learning rate.
        seed: seed of the weights, the order and the augmentation.
        device: torch device.
        mixed_precision: run under bfloat16 autocast.
        report: called after each epoch with "epoch" from 1, "loss", "seconds" and "seconds_left".

    Raises:
        FloatingPointError: if the loss is NaN or infinite.
    """
    torch.manual_seed(seed)
    model = TinyNet(len(config.category_ids)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    steps = epochs * math.ceil(len(examples) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=min(0.1, 100 / steps)
    )
    images = [read_image(example.uri, expect_hw=example.hw) for example in examples]
    start = time.monotonic()
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(examples))
        losses = []
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            tiles = [random_tile(rng, images[i], examples[i], config.input_side) for i in part]
            loss = _loss(model, tiles, config, device, mixed_precision=mixed_precision)
            if not torch.isfinite(loss):
                ids = ", ".join(str(examples[i].image_id) for i in part)
                msg = f"the loss is {loss.item()} in epoch {epoch + 1} (images {ids}): lower the learning rate"
                raise FloatingPointError(msg)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.monotonic() - start
        left = seconds / (epoch + 1) * (epochs - epoch - 1)
        if report is not None:
            report({"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": seconds, "seconds_left": left})
    return model.eval()
