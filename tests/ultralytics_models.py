"""Detectors of Ultralytics, built from configurations without a network: random weights, or those of an ONNX file.

python -m tests.ultralytics_models yolo11n.onnx yolo11n.pt    # Ultralytics' file of an export of YOLO11n
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from onnx import load, numpy_helper
from torch import nn
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, SegmentationModel

from scalenet_ray.models.class_names import COCO_CATEGORIES

NAMES = {0: "cat", 1: "dog", 2: "kite"}
SIDE = 128
"""Side that the files name as that of their training."""

RT_DETR: dict[str, Any] = {
    "nc": 3,
    "scales": {"l": [1.0, 1.0, 256]},
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "AIFI", [32, 4]],
    ],
    # Classes, width, queries, points, heads, layers, width of the feed-forward network.
    "head": [[[2, 3, 5], 1, "RTDETRDecoder", ["nc", 32, 30, 2, 2, 2, 32]]],
}
"""RT-DETR, as small as it can be."""

KINDS = ("yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n", "yolo11n-seg", "yolo26n-seg", "rt-detr")


def build(kind: str) -> Any:
    """A model, the same each time, whose answers depend on what it sees; evaluation mode.

    Fresh batch norms would pass next to nothing on: theirs are set by a batch of coloured blocks.
    """
    torch.manual_seed(0)
    make = RTDETRDetectionModel if kind == "rt-detr" else SegmentationModel if "seg" in kind else DetectionModel
    model: Any = make(RT_DETR if kind == "rt-detr" else f"{kind}.yaml", nc=len(NAMES), verbose=False)
    model.names = dict(NAMES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]
        # Scores around one half.
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[0] == len(NAMES):
            nn.init.normal_(module.weight, std=0.2)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3))
    return model.eval()


def trained(export: Path) -> Any:
    """YOLO11n with the weights of its ONNX file, COCO's 80 classes, evaluation mode."""
    arrays = {each.name: numpy_helper.to_array(each).copy() for each in load(export).graph.initializer}
    model: Any = DetectionModel("yolo11n.yaml", nc=80, verbose=False).eval().fuse(verbose=False)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    model.names = dict(enumerate(COCO_CATEGORIES.values()))
    return model


def save(path: Path, model: Any, **entries: Any) -> str:
    """Write a checkpoint as Ultralytics' trainer does; returns the path."""
    settings = {"imgsz": SIDE, "task": "segment" if isinstance(model, SegmentationModel) else "detect"}
    checkpoint = {"ema": None, "model": model, "train_args": settings, "version": "8.4.0", **entries}
    torch.save(checkpoint, path)
    return str(path)


if __name__ == "__main__":
    save(Path(sys.argv[2]), trained(Path(sys.argv[1])), train_args={"imgsz": 640, "task": "detect"})
