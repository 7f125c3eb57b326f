"""Base of the detectors in torch: device, precision, thresholds, and one forward pass for the tiles of a canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.models.padding import detect_by_canvas

HW = tuple[int, int]

ReadTile = Callable[[int], Detections | TileError]
"""Position of a tile in its batch -> its detections in tile pixels."""


class TorchSettings(TypedDict, total=False):
    """Settings of every detector in torch.

    Attributes:
        device: torch device; "cpu" by default.
        score_threshold: minimum score of a detection; 0.01 by default.
        iou_threshold: IoU threshold of NMS within each class, and between tiles; None for the detector's own.
        mixed_precision: run under bfloat16 autocast.
    """

    device: str
    score_threshold: float
    iou_threshold: float | None
    mixed_precision: bool


class TorchDetector:
    """Base of a `Detector` in torch.

    A subclass has `model`, `categories`, `input_side` and `canvas_hw`, runs the network in `_forward` and reads its
    outputs in `_reader`. Arguments are the IoU threshold of the network itself, and `TorchSettings`.

    Raises:
        UserError: if the device is not available.
    """

    canvas_hw: Callable[[HW], HW]

    def __init__(
        self,
        own_iou_threshold: float,
        *,
        device: str = "cpu",
        score_threshold: float = 0.01,
        iou_threshold: float | None = None,
        mixed_precision: bool = False,
    ) -> None:
        self._device = device_on_this_machine(device)
        self._on_gpu = self._device.type == "cuda"
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=mixed_precision)
        self.score_threshold = score_threshold
        self.iou_threshold = own_iou_threshold if iou_threshold is None else iou_threshold

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles; see `Detector`."""
        return detect_by_canvas(pixels, self.canvas_hw, self._detect_group, self._on_gpu)

    def _detect_group(self, tiles: list[np.ndarray], canvas: HW) -> list[Detections | TileError]:
        with torch.inference_mode():
            with self._autocast:
                outputs = self._forward(tiles, canvas)
            finite, read = self._reader(outputs, tiles, canvas)
            return [
                read(i)
                if whole
                else TileError("the detector gave values that are NaN or infinite: check its weights and precision")
                for i, whole in enumerate(finite.tolist())
            ]

    def _forward(self, tiles: list[np.ndarray], canvas: HW) -> Any:
        """Outputs of the network for tiles of one canvas, under autocast if wanted."""
        raise NotImplementedError

    def _reader(self, outputs: Any, tiles: list[np.ndarray], canvas: HW) -> tuple[torch.Tensor, ReadTile]:
        """For a batch's outputs: [B] bool, the tiles whose outputs are finite, and what reads one of these tiles."""
        raise NotImplementedError


def tensors_in(nested: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict | list | tuple):
        for part in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors_in(part)


def finite_rows(outputs: Any) -> torch.Tensor:
    """[B] bool: where all of the tensors [B, ...] in nested dicts, lists and tuples are finite."""
    return torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in tensors_in(outputs)]).all(0)


def in_float32(nested: Any) -> Any:
    """Nested dicts, lists and tuples of tensors, those in bfloat16 as float32."""
    if isinstance(nested, torch.Tensor):
        return nested.float() if nested.dtype == torch.bfloat16 else nested
    if isinstance(nested, dict):
        return {key: in_float32(value) for key, value in nested.items()}
    return type(nested)(map(in_float32, nested)) if isinstance(nested, list | tuple) else nested


def without_autocast(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Call a module outside of autocast, on inputs in float32.

    For what computes boxes: in bfloat16 a coordinate of 640 pixels is off by up to 2.
    """
    with torch.autocast(next(tensors_in(inputs)).device.type, enabled=False):
        return forward(*in_float32(inputs))
