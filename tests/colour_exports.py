"""Small networks exported to ONNX as the makers of detectors export theirs; they see boxes by the tile's colours.

Each cell of 8 pixels is a box of its own size. It scores 0.9 times as much as one of red, green and blue exceeds the
mean of the others, for the classes 0, 1 and 2. Grey and coarser cells score nothing. So what a network must find can be
counted in the picture, without the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from scalenet_ray.models.onnx_export import to_onnx

CELL = 8
KINDS: dict[str, tuple[str, ...]] = {
    "yolov8": ("output0",),
    "yolov5": ("output",),
    "yolov6": ("outputs",),
    "yolox": ("output",),
    "yolox-decoded": ("output",),
    "end-to-end": ("output0",),
    "rtdetr-rows": ("output0",),
    "rtdetr-best": ("output0",),
    "queries": ("logits", "pred_boxes"),
    "target-sizes": ("labels", "boxes", "scores"),
    "torchvision": ("boxes", "labels", "scores"),
}
"""Kind of export -> names of its outputs."""


class ColourNet(nn.Module):
    """A network with the outputs of a kind.

    Args:
        kind: one of `KINDS`.
        classes: number of classes; those past the third score 0.
        baked: the size of the first input is written into the graph, as in exports of fixed size.
        queries: boxes of the kinds that answer with the best ones.
        strides: strides of the levels; with 64, the input's sides must be multiples of it.
        box_cells: side of a box in cells.
    """

    def __init__(
        self,
        kind: str,
        classes: int = 80,
        *,
        baked: bool = False,
        queries: int = 40,
        strides: Sequence[int] = (8, 16, 32),
        box_cells: float = 1.0,
    ) -> None:
        super().__init__()
        self.kind, self.baked, self.queries, self.strides, self.box_cells = kind, baked, queries, strides, box_cells
        self.levels = nn.ModuleList(nn.Conv2d(3, classes, stride, stride, bias=False) for stride in strides)
        for stride, conv in zip(strides, self.levels, strict=True):
            nn.init.zeros_(conv.weight)  # type: ignore[arg-type]
            if stride == CELL:
                share = 0.9 / stride**2
                conv.weight.data[:3] = ((1.5 * torch.eye(3) - 0.5) * share)[:, :, None, None]  # type: ignore[index]

    def forward(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        if self.kind == "torchvision":
            images = images[None]
        if self.kind == "yolox":
            images = images.flip(1) / 255
        scores, centres, sides = [], [], []
        for stride, conv in zip(self.strides, self.levels, strict=True):
            found = conv(images).relu()
            height, width = (int(found.shape[i]) if self.baked else found.shape[i] for i in (2, 3))
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            scores.append(found.flatten(2))
            centres.append(torch.stack([x.flatten(), y.flatten()]) + 0.5)
            sides.append(torch.full_like(centres[-1][:1], stride))
        if self.strides[-1] == 64:
            # As where levels are joined: of another size it can't be added.
            scores[0] = scores[0] + 0 * nn.functional.interpolate(found, scale_factor=8.0).flatten(2)
        score, centre, side = torch.cat(scores, 2), torch.cat(centres, 1), torch.cat(sides, 1)
        # [B, 2 or C, cells]
        whole = score[:, :2] * 0
        boxes = torch.cat([whole + centre * side, whole + side * self.box_cells], 1)
        return getattr(self, f"_{self.kind.replace('-', '_')}")(boxes, score, images, sizes)

    def _yolov8(self, boxes, score, images, sizes):
        return (torch.cat([boxes, score], 1),)

    def _yolov6(self, boxes, score, images, sizes):
        return (torch.cat([boxes, score[:, :1] * 0 + 1, score], 1).transpose(1, 2),)

    def _yolox(self, boxes, score, images, sizes):
        """Its input is BGR in 0..255; boxes are relative to their cells, with logarithms of the sides."""
        none = score[:, :1] * 0
        parts = [none + 0.5, none + 0.5, none + math.log(self.box_cells), none + math.log(self.box_cells), none + 0.9]
        return (torch.cat([*parts, score / 0.9], 1).transpose(1, 2),)

    def _yolox_decoded(self, boxes, score, images, sizes):
        return (torch.cat([boxes, score[:, :1] * 0 + 0.9, score / 0.9], 1).transpose(1, 2),)

    def _yolov5(self, boxes, score, images, sizes):
        """Objectness 0.9 of the second of three anchors alone."""
        levels, start = [], 0
        for stride in self.strides:
            count = (images.shape[2] // stride) * (images.shape[3] // stride)
            part = slice(start, start + count)
            start = start + count
            for anchor in range(3):
                objectness = score[:, :1, part] * 0 + (0.9 if anchor == 1 else 0)
                levels.append(torch.cat([boxes[:, :, part], objectness, score[:, :, part] / 0.9], 1))
        return (torch.cat(levels, 2).transpose(1, 2),)

    def _best(self, boxes, score):
        """The best cells, [B, Q, 4] cxcywh, [B, Q, C]."""
        chosen = score.amax(1).topk(self.queries, dim=1).indices[:, None]
        best = [torch.gather(part, 2, chosen.expand(-1, part.shape[1], -1)) for part in (boxes, score)]
        return best[0].transpose(1, 2), best[1].transpose(1, 2)

    def _corners(self, boxes):
        return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)

    def _end_to_end(self, boxes, score, images, sizes):
        boxes, score = self._best(boxes, score)
        values, labels = score.max(2, keepdim=True)
        return (torch.cat([self._corners(boxes), values, labels.to(values.dtype)], 2),)

    def _shares(self, boxes, images):
        height, width = images.shape[2], images.shape[3]
        return boxes / torch.tensor([1.0, 0, 1, 0]).mul(width).add(torch.tensor([0, 1.0, 0, 1]).mul(height))

    def _rtdetr_rows(self, boxes, score, images, sizes):
        boxes, score = self._best(boxes, score)
        return (torch.cat([self._shares(boxes, images), score], 2),)

    def _rtdetr_best(self, boxes, score, images, sizes):
        boxes, score = self._best(boxes, score)
        values, labels = score.max(2, keepdim=True)
        return (torch.cat([self._shares(boxes, images), values, labels.to(values.dtype)], 2),)

    def _queries(self, boxes, score, images, sizes):
        boxes, score = self._best(boxes, score)
        return torch.logit(score, 1e-6), self._shares(boxes, images)

    def _target_sizes(self, boxes, score, images, sizes):
        boxes, score = self._best(boxes, score)
        values, labels = score.max(2)
        return labels, self._corners(self._shares(boxes, images)) * sizes.repeat(1, 2)[:, None], values

    def _torchvision(self, boxes, score, images, sizes):
        values, labels = score[0].max(0)
        kept = (values > 0.01).nonzero().flatten()
        return self._corners(boxes[0].transpose(0, 1))[kept], labels[kept] + 1, values[kept]


def export(
    path: Path,
    kind: str,
    *,
    hw: tuple[int, int] = (96, 160),
    batch: int = 1,
    free: Sequence[str] = ("batch", "height", "width"),
    metadata: Mapping[str, str] | None = None,
    model: nn.Module | None = None,
    classes: int = 80,
    half: bool = False,
) -> str:
    """Write a network of a kind, with an input of `hw` or free axes; returns its path."""
    model = model or ColourNet(kind, classes, baked="height" not in free)
    axes = [0, 2, 3] if kind != "torchvision" else [0, 1, 2]
    names = dict(zip(axes, ("batch", "height", "width"), strict=True))
    image = torch.rand(3, *hw) if kind == "torchvision" else torch.rand(batch, 3, *hw)
    if kind == "torchvision":
        names = {1: "height", 2: "width"}
    inputs, sizes = [image], {"images": {axis: name for axis, name in names.items() if name in free}}
    if kind == "target-sizes":
        inputs.append(torch.tensor([[hw[1], hw[0]]] * batch))
        sizes["orig_target_sizes"] = {0: "batch"} if "batch" in free else {}
    model = model.half() if half else model
    data = to_onnx(
        model,
        [part.half() if half and part.is_floating_point() else part for part in inputs],
        sizes,
        KINDS[kind],
        metadata or {},
    )
    if "batch" not in free:
        data = _with_fixed_outputs(data)
    path.write_bytes(data)
    return str(path)


def _with_fixed_outputs(data: bytes) -> bytes:
    """Forget the names of the outputs' axes, which `to_onnx` leaves free."""
    model = onnx.load_from_string(data)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model.SerializeToString()


def noisy_tile(hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """[h, w, 3] uint8: each cell in a colour of its own, a twentieth of the cells not black; sides multiples of 8."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(60, 256, (-(-hw[0] // CELL), -(-hw[1] // CELL), 3))
    cells[rng.random(cells.shape[:2]) > 0.05] = 0
    return np.kron(cells, np.ones((CELL, CELL, 1))).astype(np.uint8)[: hw[0], : hw[1]]


def seen_in(tile: np.ndarray, *, every_class: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes xyxy, scores and class indices in a tile, by descending score, counted in its pixels.

    Args:
        tile: [h, w, 3] uint8.
        every_class: a cell may be of several classes, and else is of the best one.
    """
    found = []
    for y in range(0, tile.shape[0], CELL):
        for x in range(0, tile.shape[1], CELL):
            colour = tile[y : y + CELL, x : x + CELL].astype(float).mean(axis=(0, 1)) / 255
            scores = 0.9 * (1.5 * colour - 0.5 * colour.sum())
            labels = range(3) if every_class else [int(scores.argmax())]
            found += [(scores[i], i, (x, y, x + CELL, y + CELL)) for i in labels if scores[i] >= 0.01]
    found.sort(key=lambda row: -row[0])
    boxes = np.array([row[2] for row in found], float).reshape(-1, 4)
    return boxes, np.array([row[0] for row in found]), np.array([row[1] for row in found], int)
