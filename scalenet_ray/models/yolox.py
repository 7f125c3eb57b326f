"""Adapter of YOLOX detectors (Ge et al., 2021) as ONNX files, with onnxruntime and numpy.

The file is written by YOLOX's exporter without decoding: input [batch, 3, height, width] float32 BGR in 0..255; output
[batch, rows, 5 + classes], one row per cell of strides 8, 16 and 32 (x, y, w, h, objectness, class scores, with the
sigmoid applied). Fixed batch, height and width are made dynamic.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # type: ignore[attr-defined]

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.merge import nms
from scalenet_ray.core.networks import DetectionsWithFeatures
from scalenet_ray.data.storage import read_bytes
from scalenet_ray.models.coco_categories import COCO_CATEGORIES
from scalenet_ray.models.devices import is_tensorrt
from scalenet_ray.models.onnx_graph import expose_features, free_axes
from scalenet_ray.models.onnx_session import (
    EngineSession,
    on_gpu,
    open_session,
    providers_of,
    session_options,
    tiles_at_once,
    with_engine,
)
from scalenet_ray.models.padding import STRIDE, detect_by_canvas, fixed_canvas, padded, stride_canvas

__all__ = ["YoloxDetector"]

_CELL_STRIDES = (8, 16, 32)
_ANSWER_MAPS = 5
_DEFAULT_INPUT_SIDE = 416
_DEFAULT_IOU_THRESHOLD = 0.65


class YoloxDetector:
    """`Detector` with a YOLOX network.

    Attributes:
        session: session of the network.
        input_side: longer side of a whole image's tile: that of the exported input, else 416.
        categories: class id -> name: the file's metadata `categories`, else COCO's 80.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS within each class.
        description: what the file was taken for, in words, if `onnx:PATH` found it to be YOLOX's.

    Args:
        session: session of the network.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS within each class; None for YOLOX's 0.65.
        categories: class id -> name; None for those of the metadata, else COCO's.
        exported_side: input side of the export, if the session's input was made dynamic.
        open_features: creates a session with feature maps as additional outputs; None if not supported.

    Raises:
        UserError: if the input or output of the network is not YOLOX's.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        score_threshold: float = 0.01,
        iou_threshold: float | None = None,
        categories: Mapping[int, str] | None = None,
        exported_side: int | None = None,
        open_features: Callable[[], onnxruntime.InferenceSession] | None = None,
    ) -> None:
        self.session: onnxruntime.InferenceSession | EngineSession = session
        self._open_features = open_features
        self.score_threshold = score_threshold
        self.iou_threshold = _DEFAULT_IOU_THRESHOLD if iou_threshold is None else iou_threshold
        source, target = session.get_inputs()[0], session.get_outputs()[0]
        self._input_name = source.name
        self._one_by_one, self._fixed_hw = _read_input_shape(source.shape)
        self.input_side = min(self._fixed_hw) if self._fixed_hw else exported_side or _DEFAULT_INPUT_SIDE
        self._few_to = self.input_side if on_gpu(session) else None
        self.categories = _read_categories(session.get_modelmeta().custom_metadata_map, target.shape, categories)
        self._category_ids = np.array(sorted(self.categories), np.int64)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: str = "cpu",
        score_threshold: float = 0.01,
        iou_threshold: float | None = None,
        categories: Mapping[int, str] | None = None,
    ) -> YoloxDetector:
        """Load an ONNX file.

        Args:
            path: local path or a store's address.
            device: as for `onnx_session.providers_of`. On the CPU, OMP_NUM_THREADS sets the number of threads.
            score_threshold: minimum score of a detection.
            iou_threshold: IoU threshold of NMS within each class; None for YOLOX's 0.65.
            categories: class id -> name; None for those of the metadata, else COCO's.

        Raises:
            FileNotFoundError: if the file does not exist.
            UserError: if it is not an ONNX file or not YOLOX's, or the device is not available in onnxruntime.
        """
        data = read_bytes(path)
        session = open_session(data, path, device)
        options, providers = session_options(), providers_of(device)
        try:
            exported = cls(session, score_threshold=score_threshold, iou_threshold=iou_threshold, categories=categories)
            freed, data = _free_session(session, data, options, providers)
            detector = cls(
                freed,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                categories=categories,
                exported_side=exported.input_side,
                open_features=functools.partial(_feature_session, data, options, providers),
            )
            if is_tensorrt(device):
                detector.session = with_engine(freed, data, path, device, detector.canvas_hw, detector.input_side)
            return detector
        except ValueError as error:
            msg = f"{path}: {error}"
            raise UserError(msg) from error

    feature_stride = _CELL_STRIDES[0]
    description = ""

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas (height, width) of a tile of (height, width).

        Raises:
            UserError: if the tile exceeds the network's fixed input.
        """
        if self._fixed_hw is not None:
            return fixed_canvas(hw, self._fixed_hw)
        return stride_canvas(hw, few_to=self._few_to)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles; see `Detector`."""
        return detect_by_canvas(pixels, self.canvas_hw, self._detect_group, self._few_to is not None)

    @functools.cached_property
    def _featured(self) -> onnxruntime.InferenceSession:
        if self._open_features is None:
            msg = "this YOLOX shows no feature maps: load it from its file"
            raise UserError(msg)
        return self._open_features()

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the feature maps of strides 8, 16 and 32, including five of the output.

        Raises:
            UserError: if the network does not have YOLOX's structure.
        """
        return tuple(output.shape[1] + _ANSWER_MAPS for output in self._featured.get_outputs()[1:])

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """Detect on tiles, [h, w, 3] uint8 RGB each, with feature maps; see `DetectWithFeatures`.

        A level's feature map is the common input of its box and class branches, with five channels of its output
        appended: logits of the objectness, of the best class and of their product, and the logarithms of width and
        height in cells.
        """
        return detect_by_canvas(pixels, self.canvas_hw, self._detect_group_with_features, self._few_to is not None)

    def _detect_group_with_features(
        self, tiles: list[np.ndarray], canvas: tuple[int, int]
    ) -> list[DetectionsWithFeatures]:
        return [
            DetectionsWithFeatures(
                self._decode(rows, canvas, tile.shape[:2]),
                tuple(np.concatenate(level) for level in zip(maps, _answer_maps(rows, canvas), strict=True)),
            )
            for tile, (rows, *maps) in zip(tiles, self._run_all(self._featured, tiles, canvas), strict=True)
        ]

    def _detect_group(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[Detections | TileError]:
        return [
            self._decode(rows, canvas, tile.shape[:2])
            for tile, (rows,) in zip(tiles, self._run_all(self.session, tiles, canvas), strict=True)
        ]

    def _run_all(
        self, session: onnxruntime.InferenceSession | EngineSession, tiles: list[np.ndarray], canvas: tuple[int, int]
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Output of each tile, [rows, 5 + classes], followed by its feature maps if the session has them."""
        at_once = 1 if self._one_by_one else tiles_at_once(session, len(tiles))
        for start in range(0, len(tiles), at_once):
            batch = _batch(tiles[start : start + at_once], canvas)
            output, *levels = (np.asarray(array) for array in session.run(None, {self._input_name: batch}))
            yield from zip(self._checked(output, batch), *levels, strict=True)

    def _checked(self, output: np.ndarray, batch: np.ndarray) -> np.ndarray:
        cells, _ = _grid(batch.shape[2:])
        wanted = (len(batch), len(cells), 5 + len(self.categories))
        if output.shape != wanted:
            msg = (
                f"YOLOX must answer {list(batch.shape)} with {list(wanted)}, one row for each cell of strides "
                f"8, 16 and 32, got {list(output.shape)}: export the network with these three strides"
            )
            raise UserError(msg)
        return output

    def _decode(self, rows: np.ndarray, canvas: tuple[int, int], tile_hw: tuple[int, int]) -> Detections | TileError:
        """Output of a tile, [rows, 5 + classes] -> its detections in tile pixels."""
        bad = rows.size - int(np.isfinite(rows).sum())
        if bad:
            return TileError(
                f"the detector gave {bad} values that are NaN or infinite: check its weights and precision"
            )
        cells, strides = _grid(canvas)
        # Class scores are at most 1: rows with a low objectness can't reach the threshold.
        likely = np.flatnonzero(rows[:, 4] >= self.score_threshold)
        likely_rows = rows[likely]
        best = likely_rows[:, 5:].argmax(axis=1)
        scores = likely_rows[:, 4] * likely_rows[np.arange(len(best)), 5 + best]
        chosen = scores >= self.score_threshold
        kept, best, scores = likely[chosen], best[chosen], scores[chosen]
        with np.errstate(over="ignore"):
            centres = (rows[kept, :2] + cells[kept]) * strides[kept]
            halves = np.exp(rows[kept, 2:4]) * strides[kept] / 2
        boxes = np.concatenate([centres - halves, centres + halves], axis=1)
        if not np.isfinite(boxes).all():
            return TileError("the detector gave boxes of infinite size: check its weights and precision")
        order = nms(boxes, scores, best, self.iou_threshold)
        height, width = tile_hw
        found = Detections(
            np.clip(boxes[order], 0, [width, height, width, height]), scores[order], self._category_ids[best[order]]
        )
        # Boxes in the padding are empty after clipping.
        return found[found.areas > 0]


def _free_session(
    session: onnxruntime.InferenceSession, data: bytes, options: onnxruntime.SessionOptions, providers: list[Any]
) -> tuple[onnxruntime.InferenceSession, bytes]:
    """Make batch and input size of a session dynamic, if possible; returns the session and the content of its file.

    The result is tested: equal outputs (within rounding) at the fixed size, and the expected number of rows at another
    size and batch. If a test fails, the original session is returned.
    """
    source = session.get_inputs()[0]
    shape = source.shape
    if len(shape) != 4 or all(isinstance(size, str) for size in (shape[0], *shape[2:])):
        return session, data
    fixed = [size if isinstance(size, int) else STRIDE for size in (1, *shape[1:])]
    probe = np.random.default_rng(0).uniform(0, 255, fixed).astype(np.float32)
    other = np.zeros((2, fixed[1], 2 * STRIDE, 3 * STRIDE), np.float32)
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    try:
        freed_data = free_axes(data)
        freed = onnxruntime.InferenceSession(freed_data, options, providers=providers)
        before = np.asarray(session.run(None, {source.name: probe})[0])
        after = np.asarray(freed.run(None, {source.name: probe}, quiet)[0])
        rows = np.asarray(freed.run(None, {source.name: other}, quiet)[0]).shape[:2]
    except (ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.InvalidArgument, ort_errors.RuntimeException):
        return session, data
    same = before.shape == after.shape and np.allclose(before, after, rtol=1e-4, atol=1e-4)
    fits = same and rows == (2, len(_grid(other.shape[2:])[0]))
    return (freed, freed_data) if fits else (session, data)


def _feature_session(
    data: bytes, options: onnxruntime.SessionOptions, providers: list[Any]
) -> onnxruntime.InferenceSession:
    """Create a session with the feature map of each level as an additional output."""
    return onnxruntime.InferenceSession(expose_features(data), options, providers=providers)


def _batch(tiles: list[np.ndarray], canvas: tuple[int, int]) -> np.ndarray:
    """Tiles -> [B, 3, H, W] float32 BGR in 0..255, padded at the right and below."""
    return np.ascontiguousarray(padded(tiles, canvas)[..., ::-1].transpose(0, 3, 1, 2), dtype=np.float32)


def _answer_maps(rows: np.ndarray, canvas: tuple[int, int]) -> list[np.ndarray]:
    """[rows, 5 + classes] -> [5, h, w] float32 per level: logits of the scores, and log sides in cells."""
    found, best = rows[:, 4], rows[:, 5:].max(axis=1)
    chances = np.clip(np.stack([found, best, found * best]), 1e-4, 1 - 1e-4)
    maps = np.concatenate([np.log(chances / (1 - chances)), rows[:, 2:4].T])
    sides = [(canvas[0] // stride, canvas[1] // stride) for stride in _CELL_STRIDES]
    ends = np.cumsum([h * w for h, w in sides])[:-1]
    return [level.reshape(5, *hw) for level, hw in zip(np.split(maps, ends, axis=1), sides, strict=True)]


@functools.lru_cache(maxsize=16)
def _grid(canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cells (x, y) [rows, 2] and strides [rows, 1] of a canvas's rows, float32."""
    cells, strides = [], []
    for stride in _CELL_STRIDES:
        y, x = np.mgrid[: canvas[0] // stride, : canvas[1] // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((x.size, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _read_input_shape(shape: list[Any]) -> tuple[bool, tuple[int, int] | None]:
    """True if the batch size is fixed to 1, and the fixed (height, width), or None if dynamic."""
    wanted = "[batch, 3, height, width], batch 1 or free, height and width multiples of 32 or free"
    is_yolox = len(shape) == 4 and shape[1] == 3 and (shape[0] == 1 or not isinstance(shape[0], int))
    fixed = [side for side in shape[2:] if isinstance(side, int)]
    if not is_yolox or len(fixed) == 1 or any(side < STRIDE or side % STRIDE for side in fixed):
        msg = f"the input must be {wanted}, got {shape}: export the network so"
        raise UserError(msg)
    return shape[0] == 1, (fixed[0], fixed[1]) if fixed else None


def _read_categories(
    metadata: Mapping[str, str], output_shape: list[Any], given: Mapping[int, str] | None
) -> dict[int, str]:
    """Categories that are given, else of the metadata, else COCO's; class index i is the i-th id in ascending order."""
    if given is not None:
        categories = dict(given)
    elif "categories" in metadata:
        categories = {int(key): str(name) for key, name in json.loads(metadata["categories"]).items()}
    else:
        categories = dict(COCO_CATEGORIES)
    if len(output_shape) != 3 or (isinstance(output_shape[2], int) and output_shape[2] != 5 + len(categories)):
        msg = (
            f"the output must be [batch, rows, {5 + len(categories)}] for {len(categories)} categories, got "
            f"{output_shape}: name the network's own in the ONNX metadata 'categories', as JSON of id -> name"
        )
        raise UserError(msg)
    return categories
