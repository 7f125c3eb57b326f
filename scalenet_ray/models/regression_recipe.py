"""How the paper's small Scale Net (Table 1) is trained on annotated images: views of them with maps of scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.scale import scale_target
from scalenet_ray.models.examples import Example, TrainingImages, object_mask
from scalenet_ray.models.losses import masked_mse
from scalenet_ray.models.recipe import Batch, Row
from scalenet_ray.models.scale_net import ScaleNetConfig, build_scale_net, normalised, save_scale_net
from scalenet_ray.models.scale_recipe import View, random_view, whole_view

__all__ = ["UNIT_SIDE", "RegressionRecipe"]

UNIT_SIDE = 16
"""The side, in tile pixels, of an object whose scale is 1 (section 'MNIST')."""


@dataclass(frozen=True)
class RegressionRecipe:
    """Trains a Scale Net that says how large an object is, in numbers (the preset fcn-digits).

    Attributes:
        images: what is learned from.
        config: the network's; a regression.
        tile_side: the longer side of the tiles that it sees, in pixels.
        seed: an example's randomness depends on this, the epoch and its index alone.
    """

    images: TrainingImages
    config: ScaleNetConfig
    tile_side: int
    seed: int = 0

    best_by = "minus_error"
    file_name = "scale_net.safetensors"
    learning_rate = 2e-3

    def sizes(self) -> tuple[int, int]:
        """How many images there are to train on, and to validate on."""
        learned, held_out = self.images.examples()
        return len(learned), len(held_out)

    def example(self, index: int, epoch: int) -> Row:
        """image: [side, side, 3] uint8, black beyond the tile; scale: [side, side] float32, 0 off objects."""
        example = self.images.examples()[0][index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(example, random_view(example, self.tile_side, rng))

    def validation_example(self, index: int) -> Row:
        """The whole image, as it is."""
        example = self.images.examples()[1][index]
        return self._row(example, whole_view(example, self.tile_side))

    def blank(self) -> Row:
        """Black, without an object."""
        side = self.tile_side
        return {
            "image_id": np.array([-1], np.int64),
            "image": np.zeros((side, side, 3), np.uint8),
            "scale": np.zeros((side, side), np.float32),
        }

    def build(self) -> nn.Module:
        """A fresh network."""
        return build_scale_net(self.config)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The squared error over the pixels of objects."""
        return masked_mse(model(normalised(batch["image"], self.config)), batch["scale"])

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Sums over the pixels of objects: the squared error, and the error as a share of the scale."""
        found, scale = model(normalised(batch["image"], self.config)).float(), batch["scale"]
        on_object = scale > 0
        error = (found - scale)[on_object]
        squared, relative = (error**2).sum(), (error.abs() / scale[on_object]).sum()
        sums = {"squared": squared, "relative": relative, "pixels": on_object.sum()}
        return {name: value.detach().cpu().double().numpy() for name, value in sums.items()}

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The mean loss, and minus the mean error as a share of the scale, in percent."""
        pixels = max(float(counts["pixels"]), 1.0)
        return {"minus_error": -100.0 * float(counts["relative"]) / pixels, "loss": float(counts["squared"]) / pixels}

    def save(self, model: nn.Module, path: str) -> None:
        """A checkpoint that `load_scale_net` reads."""
        save_scale_net(model, self.config, path)

    def _row(self, example: Example, view: View) -> Row:
        row = self.blank() | {"image_id": np.array([example.image_id], np.int64)}
        height, width = view.pixels.shape[:2]
        row["image"][:height, :width] = view.pixels
        row["scale"][:height, :width] = _scales(example, view)
        return row


def _scales(example: Example, view: View) -> np.ndarray:
    """[h, w] float32 of a view: each object's longer side in tile pixels over the unit, crowds left out."""
    window, zoom = view.tile.window, max(view.tile.zoom_xy)
    masks, scales = [], []
    for i in np.flatnonzero(~example.objects.crowd):
        whole = object_mask(example.objects, int(i), view.tile.image_hw)
        mask = _nearest(whole[window.y0 : window.y1, window.x0 : window.x1], (view.tile.height, view.tile.width))
        x0, y0, x1, y1 = example.objects.boxes[i]
        masks.append(mask[:, ::-1] if view.mirrored else mask)
        scales.append(max(x1 - x0, y1 - y0) * zoom / UNIT_SIDE)
    return scale_target(masks, np.array(scales), (view.tile.height, view.tile.width))


def _nearest(mask: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[H, W] mask -> [h, w] bool, each pixel what lies at its centre."""
    rows = (np.arange(hw[0]) * 2 + 1) * mask.shape[0] // (2 * hw[0])
    columns = (np.arange(hw[1]) * 2 + 1) * mask.shape[1] // (2 * hw[1])
    return mask[rows[:, None], columns[None, :]].astype(bool)
