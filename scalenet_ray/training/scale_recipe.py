"""How a Scale Net is trained: annotated images -> views of them with maps of scale classes, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from scalenet_ray.core.geometry import Tile, Window, cut_tile
from scalenet_ray.core.scale import IGNORE, class_target
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.scale_net import ScaleNetConfig, build_scale_net, normalised, save_scale_net, squashed
from scalenet_ray.training.examples import (
    Example,
    TrainingImages,
    object_mask,
    random_window,
    read_pixels,
    tile_of_window,
)
from scalenet_ray.training.imagenet import load_encoder_weights
from scalenet_ray.training.losses import count_pixels, focal_loss, pixel_figures
from scalenet_ray.training.recipe import Batch, Row

__all__ = [
    "CLASS_WEIGHTS",
    "ScaleRecipe",
    "View",
    "random_view",
    "whole_view",
    "window_target",
]

CLASS_WEIGHTS = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0)
"""Of the focal loss: class 1 decides where to zoom, and covers the fewest pixels."""


ZOOMED_SHARE = 0.6


WINDOW_SHARES = (0.5, 1.0)


COLOUR_JITTER = 0.2


CELL_COVER = 0.25


def _cells(mask: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[H, W] mask -> [h, w] bool: cells that it covers a good part of, and always the one that it covers most."""
    cover = np.asarray(Image.fromarray(mask * np.uint8(255)).resize((hw[1], hw[0]), Image.Resampling.BOX))
    # A majority would lose what is smaller than a cell, which is what the map is there to find.
    return cover >= max(1, min(CELL_COVER * 255, int(cover.max())))


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
        mask = object_mask(objects, i, image_hw)[window.y0 : window.y1, window.x0 : window.x1]
        if mask.any():
            masks.append(_cells(mask, hw))
            kept.append(i)
    # An object that the window cuts keeps the area of the whole: a sliver of a large one is not small.
    return class_target(masks, objects.areas[kept], window.area, hw, objects.crowd[kept].tolist())


class View(NamedTuple):
    """A window of an image as the network sees it.

    Attributes:
        tile: the recipe of its pixels.
        pixels: [h, w, 3] uint8 RGB, tile pixels; mirrored if `mirrored`.
        mirrored: left and right are exchanged.
    """

    tile: Tile
    pixels: np.ndarray
    mirrored: bool


def whole_view(example: Example, tile_side: int) -> View:
    """The whole image with its longer side at `tile_side`; raises as `read_pixels` does."""
    image = read_pixels(example)
    hw = (image.shape[0], image.shape[1])
    tile = tile_of_window(example.image_id, hw, Window(0, 0, hw[1], hw[0]), tile_side)
    return View(tile, cut_tile(image, tile), False)


def random_view(example: Example, tile_side: int, rng: np.random.Generator) -> View:
    """A window of random size and place (scale jitter and crop), mirrored or not, its colours changed a little.

    Raises:
        TileError: as `read_pixels` does.
    """
    image = read_pixels(example)
    hw = (image.shape[0], image.shape[1])
    share = rng.uniform(*WINDOW_SHARES) if rng.random() < ZOOMED_SHARE else 1.0
    tile = tile_of_window(example.image_id, hw, random_window(rng, hw, share), tile_side)
    mirrored = bool(rng.random() < 0.5)
    pixels = _jittered(cut_tile(image, tile), rng)
    return View(tile, np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels, mirrored)


def _jittered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation, each by a random factor near 1."""
    colours = torch.from_numpy(pixels).permute(2, 0, 1)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        colours = adjust(colours, 1.0 + float(rng.uniform(-COLOUR_JITTER, COLOUR_JITTER)))
    return colours.permute(1, 2, 0).numpy()


def class_map(example: Example, view: View, hw: tuple[int, int]) -> np.ndarray:
    """[h, w] uint8, the map of scale classes of a view."""
    target = window_target(example.objects, view.tile.image_hw, view.tile.window, hw)
    return np.ascontiguousarray(target[:, ::-1]) if view.mirrored else target


@dataclass(frozen=True)
class ScaleRecipe:
    """Trains a Scale Net that looks at pixels (the presets unet-vgg16, unet-light and unet-lite0).

    Attributes:
        images: what is learned from.
        config: the network's; of classes.
        tile_side: the longer side of the detector's tiles, in tile pixels: the net sees what is left of a picture
            at that size, in training as later; None for the network's own input side.
        encoder_weights: what the encoder starts from: "imagenet" or a classifier's file; None: random ones.
        seed: an example's randomness depends on this, the epoch and its index alone.
    """

    images: TrainingImages
    config: ScaleNetConfig
    tile_side: int | None = None
    encoder_weights: str | None = None
    seed: int = 0

    best_by = "pixel_ap_small"
    file_name = "scale_net.safetensors"

    @property
    def learning_rate(self) -> float:
        """The paper's for its own network; the light ones learn faster."""
        return 1e-4 if self.config.architecture == "unet" else 2e-3

    def sizes(self) -> tuple[int, int]:
        """How many images there are to train on, and to validate on."""
        learned, held_out = self.images.examples()
        return len(learned), len(held_out)

    @property
    def _side(self) -> int:
        return self.tile_side or self.config.output_hw[0] * self.config.output_stride

    def _row(self, example: Example, view: View) -> Row:
        return {
            "image_id": np.array([example.image_id], np.int64),
            "image": squashed(view.pixels, self.config),
            "target": class_map(example, view, self.config.output_hw),
        }

    def example(self, index: int, epoch: int) -> Row:
        """image: [side, side, 3] uint8; target: [h, w] uint8 in 0..5 or IGNORE; image_id: [1]."""
        example = self.images.examples()[0][index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(example, random_view(example, self._side, rng))

    def validation_example(self, index: int) -> Row:
        """The whole image, as it is."""
        example = self.images.examples()[1][index]
        return self._row(example, whole_view(example, self._side))

    def blank(self) -> Row:
        """Grey, with every pixel ignored."""
        side = self.config.input_side or 0
        return {
            "image_id": np.array([-1], np.int64),
            "image": np.full((side, side, 3), 128, np.uint8),
            "target": np.full(self.config.output_hw, IGNORE, np.uint8),
        }

    def build(self) -> nn.Module:
        """A fresh network, its encoder filled where weights are given."""
        model = build_scale_net(self.config)
        if self.encoder_weights is not None:
            load_encoder_weights(model, self.config.encoder, self.encoder_weights)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Focal, class 1 counting double."""
        logits = model(normalised(batch["image"], self.config))
        return focal_loss(logits, batch["target"], class_weights=torch.tensor(CLASS_WEIGHTS))

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Sums over pixels, of the loss too."""
        logits = model(normalised(batch["image"], self.config))
        return count_pixels(logits, batch["target"]) | _summed_loss(logits, batch["target"])

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """pixel_figures, and the mean loss."""
        return pixel_figures(counts) | {"loss": float(counts["loss"] / max(counts["pixels"], 1.0))}

    def save(self, model: nn.Module, path: str) -> None:
        """A checkpoint that `load_scale_net` reads."""
        save_scale_net(model, self.config, path)


def _summed_loss(logits: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    pixels = int((target != IGNORE).sum())
    mean = focal_loss(logits, target, class_weights=torch.tensor(CLASS_WEIGHTS))
    return {"loss": np.array(mean.item() * pixels), "pixels": np.array(pixels, np.float64)}
