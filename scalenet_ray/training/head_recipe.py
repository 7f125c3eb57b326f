"""Training recipe of the scale head: a frozen detector's feature maps with scale class maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.scale import IGNORE
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.scale_net import ScaleHead, save_scale_head
from scalenet_ray.models.scale_networks import HeadConfig
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.training.examples import Example, TrainingImages
from scalenet_ray.training.recipe import Batch, Row
from scalenet_ray.training.scale_recipe import ClassMapRecipe, View, class_map


@dataclass(frozen=True)
class HeadRecipe(ClassMapRecipe):
    """Recipe of a scale head (preset head).

    A row has level0, level1, ... [C, h, w] float16, target [h, w] uint8 in 0..5 or IGNORE, and image_id [1].

    Attributes:
        networks: specification of the frozen detector, which runs on the CPU.
    """

    images: TrainingImages
    networks: NetworkSpec
    config: HeadConfig
    seed: int = 0

    learning_rate = 2e-3

    @property
    def _tile_side(self) -> int:
        return _load_detector(self).input_side

    def _row(self, example: Example, view: View) -> Row:
        found = _load_detector(self).with_features([view.pixels])[0]
        if isinstance(found.detections, TileError):
            raise found.detections
        hw = (self._side(), self._side())
        rows, columns = (-(-side // self.config.stride) for side in view.pixels.shape[:2])
        target = np.full(hw, IGNORE, np.uint8)
        target[:rows, :columns] = class_map(example, view, (rows, columns))
        return {
            "image_id": np.array([example.image_id]),
            # Zeros beside the canvas are what the head's own padding puts there.
            **{
                f"level{i}": _filled_up(level.astype(np.float16), (hw[0] >> i, hw[1] >> i))
                for i, level in enumerate(found.features)
            },
            "target": target,
        }

    def _side(self) -> int:
        """Side of the square that holds the finest feature map of any image, in cells."""
        detector = _load_detector(self)
        return detector.canvas_hw((detector.input_side, detector.input_side))[0] // self.config.stride

    def blank(self) -> Row:
        """Zero features with every cell ignored."""
        side = self._side()
        channels = self.config.feature_channels
        return {
            "image_id": np.array([-1]),
            **{f"level{i}": np.zeros((c, side >> i, side >> i), np.float16) for i, c in enumerate(channels)},
            "target": np.full((side, side), IGNORE, np.uint8),
        }

    def build(self) -> nn.Module:
        """The head with random weights."""
        return ScaleHead(self.config)

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model([batch[f"level{i}"] for i in range(len(self.config.feature_channels))])

    def save(self, model: nn.Module, path: str) -> None:
        """Write a checkpoint that `load_predictor` reads."""
        save_scale_head(model, self.config, path)


def _filled_up(level: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[C, h, w] -> [C, *hw] with zeros at the right and below."""
    return np.pad(level, ((0, 0), (0, hw[0] - level.shape[1]), (0, hw[1] - level.shape[2])))


@functools.lru_cache(maxsize=1)
def _load_detector(recipe: HeadRecipe) -> MappedDetector:
    dataset = recipe.images.dataset()
    return recipe.networks.load_detector(dataset.categories, dataset.unused_categories)
