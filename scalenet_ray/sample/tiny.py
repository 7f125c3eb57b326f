"""The sample's detector without torch: its configuration, its decoding, and its ONNX file on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError, needs_extra
from scalenet_ray.core.merge import nms
from scalenet_ray.core.networks import DetectionsWithFeatures
from scalenet_ray.models.onnx_session import on_gpu, open_network
from scalenet_ray.models.padding import detect_by_canvas, padded, stride_canvas
from scalenet_ray.models.scale_networks import ONNX_SUFFIX

STRIDES = (8, 16, 32)
NECK_CHANNELS = 64

TINY_DETECTOR = "tiny_detector"
"""Key of the configuration, as JSON, in the metadata of the detector's file."""

_CANDIDATES, _MOST_DETECTIONS = 300, 100


@dataclass(frozen=True)
class TinyNetConfig:
    """Configuration of the detector.

    Attributes:
        category_ids: category id of each class index.
        names: name of each class index.
        input_side: longer side of a whole image's tile in tile pixels.
        iou_threshold: IoU threshold of NMS.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    input_side: int = 192
    iou_threshold: float = 0.6


def tiny_config(fields: Mapping[str, Any]) -> TinyNetConfig:
    """The configuration from what a file holds under `TINY_DETECTOR`."""
    return TinyNetConfig(**{**fields, "category_ids": tuple(fields["category_ids"]), "names": tuple(fields["names"])})


class TinyDetector:
    """`Detector` of the sample, decoded without torch; a library runs the network, once per canvas size.

    Args:
        config: configuration of the network.
        model: the network.
        run: (network, tiles [B, H, W, 3] uint8 on canvases, with features) -> scores [B, cells, classes], boxes
            [B, cells, 4], and where they are asked for the feature maps of the neck, stride 8 first.
        on_gpu: True if it runs on a GPU.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS within each class; None for the configuration's.
    """

    feature_channels = (NECK_CHANNELS,) * len(STRIDES)
    feature_stride = STRIDES[0]

    def __init__(
        self,
        config: TinyNetConfig,
        model: Any,
        run: Callable[[Any, np.ndarray, bool], Sequence[np.ndarray]],
        *,
        on_gpu: bool = False,
        score_threshold: float = 0.01,
        iou_threshold: float | None = None,
    ) -> None:
        self.config, self.model, self._run = config, model, run
        self.score_threshold = score_threshold
        self.iou_threshold = config.iou_threshold if iou_threshold is None else iou_threshold
        self.input_side = config.input_side
        self._few_to = config.input_side if on_gpu else None
        self.categories: Mapping[int, str] = dict(zip(config.category_ids, config.names, strict=True))
        self._ids = np.array(config.category_ids, np.int64)

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The padded canvas that is computed for a tile of (height, width)."""
        return stride_canvas(hw, few_to=self._few_to)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles; see `Detector`. At most 100 detections a tile, the best first."""
        return detect_by_canvas(pixels, self.canvas_hw, self._detect_group, self._few_to is not None)

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """Detect on tiles, [h, w, 3] uint8 RGB each, and return the neck's feature maps; see `DetectWithFeatures`."""
        return detect_by_canvas(pixels, self.canvas_hw, self._features_group, self._few_to is not None)

    def _detect_group(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[Detections | TileError]:
        scores, boxes, *_ = self._run(self.model, padded(tiles, canvas), False)
        return [self._select(scores[i], boxes[i], tile) for i, tile in enumerate(tiles)]

    def _features_group(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[DetectionsWithFeatures]:
        scores, boxes, *levels = self._run(self.model, padded(tiles, canvas), True)
        return [
            DetectionsWithFeatures(self._select(scores[i], boxes[i], tile), tuple(level[i] for level in levels))
            for i, tile in enumerate(tiles)
        ]

    def _select(self, scores: np.ndarray, boxes: np.ndarray, tile: np.ndarray) -> Detections | TileError:
        """Threshold, clip and suppress the scores [cells, classes] and boxes [cells, 4] of a tile."""
        bad = int((~np.isfinite(scores)).sum() + (~np.isfinite(boxes)).sum())
        if bad:
            msg = f"the detector gave {bad} values that are NaN or infinite: check its weights and precision"
            return TileError(msg)
        cells, classes = np.nonzero(scores >= self.score_threshold)
        best = np.argsort(-scores[cells, classes], kind="stable")[:_CANDIDATES]
        cells, classes = cells[best], classes[best]
        height, width = tile.shape[:2]
        chosen = np.clip(boxes[cells], 0, [width, height, width, height])
        # Boxes in the padding are empty after clipping; they must not suppress others.
        solid = (chosen[:, 2:] > chosen[:, :2]).all(axis=1)
        cells, classes, chosen = cells[solid], classes[solid], chosen[solid]
        kept = nms(chosen, scores[cells, classes], classes, self.iou_threshold)[:_MOST_DETECTIONS]
        return Detections(chosen[kept], scores[cells, classes][kept], self._ids[classes[kept]])


def load_tiny_detector(
    path: str | Path,
    *,
    device: str = "cpu",
    score_threshold: float = 0.01,
    iou_threshold: float | None = None,
    mixed_precision: bool = False,
) -> TinyDetector:
    """Load the sample's detector, or one trained as it is, from .onnx, or from .safetensors, which needs torch.

    Thresholds are those of `TinyDetector`; other arguments and errors as for `load_predictor`.
    """
    thresholds: dict[str, Any] = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
    if not str(path).endswith(ONNX_SUFFIX):
        with needs_extra():
            from scalenet_ray.sample.detector import load_tiny_net, tiny_detector
        return tiny_detector(*load_tiny_net(path), device=device, mixed_precision=mixed_precision, **thresholds)
    if mixed_precision:
        msg = f"mixed precision is for weights as safetensors, got {path}, which has a precision of its own: give those"
        raise UserError(msg)
    session, _, fields = open_network(str(path), TINY_DETECTOR, device=device)
    return TinyDetector(tiny_config(fields), session, _run_session, on_gpu=on_gpu(session), **thresholds)


def _run_session(session: onnxruntime.InferenceSession, tiles: np.ndarray, features: bool) -> list[np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    answer = session.run(names if features else names[:2], {session.get_inputs()[0].name: tiles})
    return [np.asarray(output) for output in answer]
