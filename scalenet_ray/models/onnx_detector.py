"""Adapter of the usual exports of detectors to ONNX: `onnx:PATH`, with onnxruntime and numpy."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.merge import nms
from scalenet_ray.core.networks import DetectionsWithFeatures
from scalenet_ray.data.policy_files import read_yaml
from scalenet_ray.data.storage import read_bytes
from scalenet_ray.models.class_names import classes_of
from scalenet_ray.models.devices import is_tensorrt
from scalenet_ray.models.onnx_graph import expose_features, resizes_input
from scalenet_ray.models.onnx_layouts import ANSWER_MAPS, DECODED_YOLOX, YOLOX, Layout, yolox_answer_maps
from scalenet_ray.models.onnx_network import OnnxNetwork, free_network
from scalenet_ray.models.onnx_session import (
    on_gpu,
    open_session,
    providers_of,
    session_options,
    tiles_at_once,
    with_engine,
)
from scalenet_ray.models.padding import STRIDE, detect_by_canvas, fixed_canvas, in_tile, padded, stride_canvas

_WITH_FILE = re.compile(r"(.+\.onnx)@(.+)", re.DOTALL)
_GIVEN = ("names", "categories", "mean", "std", "channel_order", "padding", "imgsz")
"""Keys of the metadata that a YAML file may give in their place."""

_LOG = logging.getLogger(__name__)


class OnnxDetector:
    """`Detector` with a network in ONNX of one of the kinds of `onnx_layouts`.

    Tiles are padded with grey to their canvas and given as RGB in 0..1, or as YOLOX takes them, with the mean and
    standard deviation of the file's metadata if it has them.

    Attributes:
        description: what the file was taken for, in words; "" if it was not loaded from a file.

    Args:
        network: the network.
        layout: its kind.
        categories: class id -> name. A network that gives positions gives them in the order of the ids; detections
            of other ids are dropped.
        input_side: longer side of a whole image's tile, where the network's input is not fixed.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS; None for that of the kind.
    """

    def __init__(
        self,
        network: OnnxNetwork,
        layout: Layout,
        categories: Mapping[int, str],
        *,
        input_side: int,
        score_threshold: float = 0.01,
        iou_threshold: float | None = None,
    ) -> None:
        self._network = network
        self._layout = layout
        self.categories = dict(categories)
        self._class_ids = np.array(sorted(self.categories), np.int64)
        self.score_threshold = score_threshold
        self.iou_threshold = layout.iou_threshold if iou_threshold is None else iou_threshold
        self.description = ""
        self._fixed_hw = network.fixed_hw
        canvases, stride = network.trial_canvases
        self._least_side, self._stride_factor = layout.least_side or min(canvases[0]), max(1, stride // STRIDE)
        self.input_side = min(self._fixed_hw) if self._fixed_hw else input_side
        self._few_to = self.input_side // self._stride_factor if on_gpu(network.session) else None

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas (height, width) of a tile of (height, width).

        Raises:
            UserError: if the tile exceeds the network's fixed input.
        """
        if self._fixed_hw is not None:
            return fixed_canvas(hw, self._fixed_hw)
        factor, least = self._stride_factor, self._least_side
        shrunk = -(-max(hw[0], least) // factor), -(-max(hw[1], least) // factor)
        height, width = stride_canvas(shrunk, few_to=self._few_to)
        return factor * height, factor * width

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detect on tiles; see `Detector`."""
        return detect_by_canvas(pixels, self.canvas_hw, self._detect_group, self._few_to is not None)

    def _detect_group(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[Detections | TileError]:
        answers = self._run(self._network, self._layout.outputs, tiles, canvas)
        return [self._decode(outputs, canvas, tile.shape[:2]) for tile, outputs in zip(tiles, answers, strict=True)]

    def _run(
        self, network: OnnxNetwork, positions: Sequence[int], tiles: list[np.ndarray], canvas: tuple[int, int]
    ) -> Iterator[Sequence[np.ndarray]]:
        """The outputs at these positions for each tile, in as many calls as the device takes."""
        at_once = network.batch or tiles_at_once(network.session, len(tiles))
        at_once = at_once if self._layout.batched else 1
        for start in range(0, len(tiles), at_once):
            outputs = network(padded(tiles[start : start + at_once], canvas, network.padding))
            chosen = [
                outputs[i].astype(np.float32) if outputs[i].dtype == np.float16 else outputs[i] for i in positions
            ]
            yield from zip(*chosen, strict=True) if self._layout.batched else [chosen]

    def _decode(
        self, outputs: Sequence[np.ndarray], canvas: tuple[int, int], tile_hw: tuple[int, int]
    ) -> Detections | TileError:
        """Outputs of a tile -> its detections in tile pixels."""
        bad = sum(output.size - int(np.isfinite(output).sum()) for output in outputs)
        if bad:
            return TileError(
                f"the detector gave {bad} values that are NaN or infinite: check its weights and precision"
            )
        boxes, scores, classes = self._layout.decode(outputs, canvas, self.score_threshold)
        if not np.isfinite(boxes).all():
            return TileError("the detector gave boxes of infinite size: check its weights and precision")
        if self._layout.gives_ids:
            known = np.isin(classes, self._class_ids)
            boxes, scores, classes = boxes[known], scores[known], classes[known]
        else:
            strange = classes[(classes < 0) | (classes >= len(self._class_ids))]
            if len(strange):
                return TileError(
                    f"the detector gave class {strange[0]}, its classes are {len(self._class_ids)}: name all of them, "
                    "one a line, as onnx:PATH@FILE"
                )
            classes = self._class_ids[classes]
        if not self._layout.suppressed:
            kept = nms(boxes, scores, classes, self.iou_threshold)
            boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        return in_tile(Detections(boxes, scores, classes), tile_hw)


class YoloxDetector(OnnxDetector):
    """`OnnxDetector` with a YOLOX, which provides feature maps for a scale head.

    `open_features` makes the network with a feature map of each level as further outputs, finest first.
    """

    feature_stride = 8

    def __init__(
        self,
        network: OnnxNetwork,
        layout: Layout,
        categories: Mapping[int, str],
        open_features: Callable[[], OnnxNetwork],
        **settings: Any,
    ) -> None:
        super().__init__(network, layout, categories, **settings)
        self._featured = functools.cache(open_features)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the feature maps of strides 8, 16 and 32, including those of the output.

        Raises:
            UserError: if the network does not have YOLOX's structure.
        """
        _, *maps = self._featured().session.get_outputs()
        return tuple(output.shape[1] + ANSWER_MAPS for output in maps)

    def with_features(self, pixels: Sequence[np.ndarray]) -> list[DetectionsWithFeatures]:
        """Detect on tiles, [h, w, 3] uint8 RGB each, with feature maps; see `DetectWithFeatures`.

        A level's feature map is the common input of its box and class branches, with `yolox_answer_maps` appended.
        """
        return detect_by_canvas(pixels, self.canvas_hw, self._features_group, self._few_to is not None)

    def _features_group(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> list[DetectionsWithFeatures]:
        network = self._featured()
        positions = range(len(network.session.get_outputs()))
        return [
            DetectionsWithFeatures(
                self._decode([rows], canvas, tile.shape[:2]),
                tuple(np.concatenate(level) for level in zip(maps, yolox_answer_maps(rows, canvas), strict=True)),
            )
            for tile, (rows, *maps) in zip(tiles, self._run(network, positions, tiles, canvas), strict=True)
        ]


def load_onnx_detector(
    what: str, *, device: str = "cpu", score_threshold: float = 0.01, iou_threshold: float | None = None
) -> OnnxDetector:
    """Load a detector in ONNX, of whatever kind its outputs show.

    What it was taken for is logged, and in the detector's `description`. A fixed batch and size are made dynamic where
    that changes no output. The input side is that of a fixed input, else the metadata's `imgsz`, else that of the kind.

    Args:
        what: PATH or PATH@FILE: the ONNX file, and a text file with its classes' names, one a line, or a YAML file that
            gives metadata: `names`, `mean`, `std`, `channel_order`, `padding`, `imgsz`. Without names they come from
            the metadata, or are COCO's 80. Local paths or a store's addresses.
        device: as for `onnx_session.providers_of`. On the CPU, OMP_NUM_THREADS sets the number of threads.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS; None for that of the kind.

    Raises:
        FileNotFoundError: if a file does not exist.
        UserError: if it is not an ONNX file or no detector's of a known kind, the names do not fit it, or the device is
            not available in onnxruntime.
    """
    match = _WITH_FILE.fullmatch(what)
    path, names_file = match.groups() if match else (what, None)
    data = read_bytes(path)
    session = open_session(data, path, device)
    metadata = session.get_modelmeta().custom_metadata_map
    if names_file is not None and names_file.lower().endswith((".yaml", ".yml", ".json")):
        metadata, names_file = metadata | _given_metadata(names_file), None
    try:
        network, layout = _recognised(session, data, metadata)
        categories, source = classes_of(layout.classes, metadata, names_file, first_id=layout.first_id)
        input_side = _input_side(metadata, max(network.fixed_hw or [layout.input_side]))
    except UserError as error:
        msg = f"{path}: {error}"
        raise UserError(msg) from error
    network, data = free_network(network, data, layout, device)
    settings: Any = {"input_side": input_side, "score_threshold": score_threshold, "iou_threshold": iou_threshold}
    if layout.family == YOLOX:
        open_features = functools.partial(_open_features, network, data, device)
        detector = YoloxDetector(network, layout, categories, open_features, **settings)
    else:
        detector = OnnxDetector(network, layout, categories, **settings)
    if is_tensorrt(device):
        network.session = with_engine(network.session, data, path, device, detector.canvas_hw, detector.input_side)
    detector.description = f"{layout.family}, {layout.shapes}; {_axes(network)}; classes: {source}"
    _LOG.info("%s was taken for %s", path, detector.description)
    return detector


def load_yolox(what: str, **settings: Any) -> YoloxDetector:
    """Load a YOLOX in ONNX: arguments and errors of `load_onnx_detector`, which refuses no other kind.

    Raises:
        UserError: if the network is of another kind.
    """
    detector = load_onnx_detector(what, **settings)
    if not isinstance(detector, YoloxDetector):
        msg = f"yolox-onnx:{what} must hold a YOLOX without decoding, got {detector.description}: use onnx:PATH"
        raise UserError(msg)
    return detector


def _open_features(network: OnnxNetwork, data: bytes, device: str) -> OnnxNetwork:
    """A network, of which `data` is the ONNX file, with its feature maps as additional outputs."""
    content = expose_features(data)
    return network.on(onnxruntime.InferenceSession(content, session_options(), providers=providers_of(device)))


def _given_metadata(uri: str) -> dict[str, str]:
    """Metadata from a YAML or JSON file, as an ONNX file holds it; other keys, such as a data.yaml's, are left out."""
    values = read_yaml(uri)
    given = {key: values[key] for key in _GIVEN if key in values} if isinstance(values, dict) else {}
    if not given:
        msg = f"{uri} must give {', '.join(_GIVEN)} or some of them, got {str(values)[:80]!r}: see docs/how_to/onnx.md"
        raise UserError(msg)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}


def _recognised(
    session: onnxruntime.InferenceSession, data: bytes, metadata: Mapping[str, str]
) -> tuple[OnnxNetwork, Layout]:
    """The network and its kind; refuses networks that are no detectors or can't be used as they are."""
    task = metadata.get("task", "detect")
    if task != "detect":
        msg = f"the network must detect boxes, got metadata task {task!r}: export a detector"
        raise UserError(msg)
    network = OnnxNetwork(session, metadata)
    if resizes_input(data):
        msg = (
            "a network must take tiles as they are, got one that resizes its input, which undoes the zoom: export it "
            "without, torchvision's after model.transform.resize = lambda image, target: (image, target)"
        )
        raise UserError(msg)
    layout = network.layout()
    if layout.family == DECODED_YOLOX:
        msg = (
            f"outputs {layout.shapes} must be YOLOX's without decoding, got decoded boxes: export YOLOX without "
            "--decode_in_inference, or use a class of your own"
        )
        raise UserError(msg)
    network.bgr_bytes = layout.bgr_bytes
    return network, layout


def _input_side(metadata: Mapping[str, str], default: int) -> int:
    """The longer side of the metadata's `imgsz`, [height, width] or one number."""
    text = metadata.get("imgsz", str(default))
    sides = [int(number) for number in re.findall(r"\d{1,9}", text)]
    if not sides or min(sides) < 1:
        msg = f"metadata 'imgsz' must be [height, width] in pixels, got {text[:80]!r}"
        raise UserError(msg)
    return max(sides)


def _axes(network: OnnxNetwork) -> str:
    """Batch and size of a network's input, in words."""
    batch = "no batch" if not network.batched else f"batch {network.batch or 'free'}"
    return f"{batch}, {f'size {network.fixed_hw[0]} x {network.fixed_hw[1]}' if network.fixed_hw else 'size free'}"
