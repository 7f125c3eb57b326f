"""Tiny detector of the embedded sample: anchor-free, three levels, under a million parameters.

It is trained without small objects, like a frozen detector that misses them in the whole image and finds them in a
zoomed window.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import box_iou, generalized_box_iou_loss

from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.models.onnx_export import to_onnx
from scalenet_ray.models.padding import PADDING_GREY
from scalenet_ray.models.scale_net import conv_block, load_state, read_checkpoint
from scalenet_ray.models.weights import save_weights
from scalenet_ray.sample.tiny import (
    NECK_CHANNELS,
    STRIDES,
    TINY_DETECTOR,
    TinyDetector,
    TinyNetConfig,
    tiny_config,
)

LEVEL_BOUNDS = (48.0, 112.0)
"""Longer sides in tile pixels: objects below the first are assigned to stride 8, below the second to 16, else to 32."""

MIN_TRAINED_SIDE = 16.0
"""Objects with a longer side below this, in tile pixels, are ignored in the loss."""

CENTRE_RADIUS = 1.5
"""Cells within this many strides of an object's centre are positive."""

_WIDTHS = (24, 32, 64, 96, 128)


class _Residual(nn.Module):
    """Residual block of two 3 x 3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_block(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> the same shape."""
        return functional.relu(x + self.second(self.first(x)))


class Answers(NamedTuple):
    """Network output per cell, in the order of `cell_centres`: stride 8 first, each level row by row.

    Attributes:
        quality: [B, cells] logits of the box's IoU with an object.
        classes: [B, cells, classes] logits.
        boxes: [B, cells, 4] xyxy in canvas pixels.
        levels: feature maps of the neck at strides 8, 16 and 32, [B, 64, h, w] each.
    """

    quality: torch.Tensor
    classes: torch.Tensor
    boxes: torch.Tensor
    levels: tuple[torch.Tensor, ...] = ()


class TinyNet(nn.Module):
    """Backbone, top-down neck, and a head shared by all levels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        stem, quarter, *deep = _WIDTHS
        self.stem = nn.Sequential(conv_block(3, stem, 2), conv_block(stem, quarter, 2), conv_block(quarter, quarter))
        widths = (quarter, *deep)
        self.stages = nn.ModuleList(
            nn.Sequential(conv_block(before, width, 2), _Residual(width))
            for before, width in zip(widths, deep, strict=False)
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, NECK_CHANNELS, 1) for width in deep)
        self.tower = nn.Sequential(conv_block(NECK_CHANNELS, NECK_CHANNELS), conv_block(NECK_CHANNELS, NECK_CHANNELS))
        self.quality = nn.Conv2d(NECK_CHANNELS, 1, 3, padding=1)
        self.classes = nn.Conv2d(NECK_CHANNELS, classes, 3, padding=1)
        self.sides = nn.Conv2d(NECK_CHANNELS, 4, 3, padding=1)
        # Initial probability of 1 %, since nearly all cells are background (RetinaNet's initialization).
        nn.init.constant_(self.quality.bias, -4.6)  # type: ignore[arg-type]

    def forward(self, images: torch.Tensor) -> Answers:
        """[B, 3, S, S] in 0..255 -> output per cell."""
        x = self.stem((images - PADDING_GREY) / 64.0)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top = None
        levels = []
        for lateral, feature in zip(reversed(self.laterals), reversed(features), strict=True):
            merged = lateral(feature)
            top = merged if top is None else merged + functional.interpolate(top, scale_factor=2.0)
            levels.append(top)
        levels.reverse()
        quality, classes, sides = [], [], []
        for stride, level in zip(STRIDES, levels, strict=True):
            shared = self.tower(level)
            quality.append(self.quality(shared).flatten(1))
            classes.append(self.classes(shared).flatten(2).transpose(1, 2))
            # Clamped against overflow; e^4 strides exceed any tile.
            sides.append(self.sides(shared).clamp(max=4.0).exp().flatten(2).transpose(1, 2) * stride)
        centres, _ = cell_centres((images.shape[-2], images.shape[-1]), images.device)
        left_top, right_bottom = torch.cat(sides, dim=1).split(2, dim=2)
        boxes = torch.cat([centres - left_top, centres + right_bottom], dim=2)
        return Answers(torch.cat(quality, dim=1), torch.cat(classes, dim=1), boxes, tuple(levels))


def cell_centres(hw: tuple[int, int], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Centres [cells, 2] xy in canvas pixels and strides [cells] of the cells of a canvas of (height, width)."""
    centres, strides = [], []
    for stride in STRIDES:
        rows, columns = ((torch.arange(side // stride, device=device) + 0.5) * stride for side in hw)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        strides.append(torch.full((len(centres[-1]),), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


class Targets(NamedTuple):
    """Training targets per cell.

    Attributes:
        labels: [B, cells] int64 class indices, -1 for background, -2 for ignored cells.
        boxes: [B, cells, 4] xyxy in canvas pixels, valid where there is an object.
    """

    labels: torch.Tensor
    boxes: torch.Tensor


def assign_targets(
    boxes: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], ignored: Sequence[torch.Tensor], side: int
) -> Targets:
    """Assign each object to the cells around its centre, on the level of its size.

    Args:
        boxes: B times [N, 4] float32 xyxy in canvas pixels.
        labels: B times [N] int64 class indices.
        ignored: B times [N] bool; cells inside these boxes, and those below MIN_TRAINED_SIDE, are ignored.
        side: side of the canvas in pixels.
    """
    centres, strides = cell_centres((side, side))
    all_labels = torch.full((len(boxes), len(centres)), -1, dtype=torch.int64)
    all_boxes = torch.zeros((len(boxes), len(centres), 4))
    for i in range(len(boxes)):
        sizes = boxes[i][:, 2:] - boxes[i][:, :2]
        longer = sizes.amax(dim=1)
        blank = ignored[i] | (longer < MIN_TRAINED_SIDE)
        # Largest first: where objects overlap, the smaller one takes the cells.
        for j in torch.argsort(-longer).tolist():
            box = boxes[i][j]
            if blank[j]:
                near = (centres + strides[:, None] > box[:2]) & (centres - strides[:, None] < box[2:])
                all_labels[i, near.all(dim=1) & (all_labels[i] < 0)] = -2
                continue
            level = sum(bool(longer[j] >= bound) for bound in LEVEL_BOUNDS)
            offset = (centres - (box[:2] + box[2:]) / 2).abs().amax(dim=1)
            inside = ((centres > box[:2]) & (centres < box[2:])).all(dim=1)
            cells = inside & (offset < CENTRE_RADIUS * strides) & (strides == STRIDES[level])
            all_labels[i, cells] = labels[i][j]
            all_boxes[i, cells] = box
    return Targets(all_labels, all_boxes)


def detection_loss(answers: Answers, targets: Targets) -> torch.Tensor:
    """Quality focal loss (Li et al., 2020) + cross-entropy + 3 x GIoU loss, normalized by the positive cells.

    The quality target is the IoU of the predicted box with its object, 0 for background.
    """
    found = targets.labels >= 0
    count = found.sum().clamp(min=1)
    boxes, wanted = answers.boxes[found], targets.boxes[found]
    box_loss = generalized_box_iou_loss(boxes, wanted, reduction="sum")
    class_loss = functional.cross_entropy(answers.classes[found], targets.labels[found], reduction="sum")
    quality = torch.zeros_like(answers.quality)
    quality[found] = box_iou(boxes.detach(), wanted).diagonal()
    weight = (answers.quality.detach().sigmoid() - quality) ** 2 * (targets.labels != -2)
    quality_loss = functional.binary_cross_entropy_with_logits(answers.quality, quality, reduction="none") * weight
    return (quality_loss.sum() + class_loss + 3.0 * box_loss) / count


def save_tiny_detector(model: TinyNet, config: TinyNetConfig, path: str | Path) -> None:
    """Write the weights, in half precision, and the configuration as a safetensors file."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_weights(state, {TINY_DETECTOR: json.dumps(asdict(config))}, str(path))


def load_tiny_net(path: str | Path) -> tuple[TinyNet, TinyNetConfig]:
    """Load a checkpoint of `save_tiny_detector`, local or in a store.

    Raises:
        UserError: if it is no such checkpoint or the weights do not match.
    """
    tensors, fields = read_checkpoint(path, TINY_DETECTOR)
    config = tiny_config(fields)
    model = TinyNet(len(config.category_ids))
    load_state(model, tensors, path)
    return model, config


class _TinyNetOnPixels(nn.Module):
    """The network with its input conversion and its scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, H, W, 3] uint8 RGB -> scores [B, cells, classes], boxes [B, cells, 4], feature maps of three strides."""
        answers: Answers = self.model(tiles.permute(0, 3, 1, 2).float())
        scores = answers.quality.float().sigmoid()[:, :, None] * answers.classes.float().softmax(dim=2)
        return scores, answers.boxes, *answers.levels


def tiny_detector(
    model: TinyNet,
    config: TinyNetConfig,
    *,
    device: str = "cpu",
    mixed_precision: bool = False,
    **thresholds: float | None,
) -> TinyDetector:
    """The detector with a network in torch, on a device, under bfloat16 autocast if wanted; see `TinyDetector`."""
    at = device_on_this_machine(device)
    autocast = torch.autocast(at.type, torch.bfloat16, enabled=mixed_precision)

    def run(net: nn.Module, tiles: np.ndarray, features: bool) -> list[np.ndarray]:
        """Output of the network for a batch."""
        with torch.inference_mode(), autocast:
            outputs = net(torch.from_numpy(tiles).to(at))[: None if features else 2]
            return [output.float().cpu().numpy() for output in outputs]

    net = _TinyNetOnPixels(model).eval().to(at, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TinyDetector(config, net, run, on_gpu=at.type == "cuda", **thresholds)  # type: ignore[arg-type]


def export_tiny_detector(path: str) -> bytes:
    """A checkpoint of `save_tiny_detector` as an ONNX file, for `load_tiny_detector`; any batch, any canvas.

    Args:
        path: a local path or a store's address.
    """
    model, config = load_tiny_net(path)
    tiles = torch.zeros(1, config.input_side, config.input_side, 3, dtype=torch.uint8)
    outputs = ["scores", "boxes", *(f"features_{stride}" for stride in STRIDES)]
    sizes = {"tiles": {0: "batch", 1: "height", 2: "width"}}
    metadata = {TINY_DETECTOR: json.dumps(asdict(config))}
    return to_onnx(_TinyNetOnPixels(model), [tiles], sizes, outputs, metadata)
