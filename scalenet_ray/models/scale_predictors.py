"""Scale predictors by file: Scale Nets and scale heads as ONNX run on onnxruntime, as safetensors in torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from scalenet_ray.core.errors import TileError, UserError, needs_extra
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.models.detectors import ShowsFeatures
from scalenet_ray.models.devices import translate_oom
from scalenet_ray.models.onnx_session import open_network
from scalenet_ray.models.scale_networks import (
    SCALE_HEAD,
    SCALE_NET,
    HeadConfig,
    ScaleNetConfig,
    check_features,
    head_config,
    map_of,
    net_config,
    squashed,
)

if TYPE_CHECKING:
    from scalenet_ray.models.scale_head import ScaleHeadPredictor
    from scalenet_ray.models.scale_net import ScaleNetPredictor

__all__ = ["ONNX_SUFFIX", "OnnxScaleHead", "OnnxScaleNet", "load_predictor"]

ONNX_SUFFIX = ".onnx"
"""The ending of a network's file that onnxruntime reads."""


class OnnxScaleNet:
    """A Scale Net exported to ONNX as `ScalePredictor`: tiles' pixels -> scale maps, without torch.

    The graph takes uint8 RGB [batch, h, w, 3] and returns class probabilities or scales: normalisation and softmax are
    inside it.

    Args:
        session: the network.
        config: its configuration.

    Attributes:
        config: the network's configuration.
        input_pixels: pixels looked at for a tile; 0 for a net that takes each tile as it is.
    """

    def __init__(self, session: onnxruntime.InferenceSession, config: ScaleNetConfig) -> None:
        self.config = config
        self.input_pixels = (config.input_side or 0) ** 2
        self._session = session
        self._input_name = session.get_inputs()[0].name

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile] = ()) -> list[ScaleMap | TileError]:
        """Predict the scale maps of tiles, those of one size together.

        Args:
            pixels: B tiles, each [h, w, 3] uint8 RGB.
            tiles: their recipes, which a network has no need of.

        Returns:
            B scale maps, or a TileError for the tile that the network broke on.

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        inputs = [squashed(tile, self.config) for tile in pixels]
        maps: dict[int, ScaleMap | TileError] = {}
        for hw in dict.fromkeys(tile.shape[:2] for tile in inputs):
            index = [i for i, tile in enumerate(inputs) if tile.shape[:2] == hw]
            maps.update(zip(index, translate_oom(lambda at=index: self._run([inputs[i] for i in at])), strict=True))
        return [maps[i] for i in range(len(inputs))]

    def _run(self, inputs: list[np.ndarray]) -> list[ScaleMap | TileError]:
        output = np.asarray(self._session.run(None, {self._input_name: np.stack(inputs)})[0])
        if self.config.kind == "classes":
            return [map_of(prob=values) for values in output]
        return [map_of(scale=values) for values in output]


class OnnxScaleHead:
    """A scale head exported to ONNX as `FeatureScalePredictor`: a detector's feature maps -> scale maps with gains.

    Args:
        session: the network.
        config: its configuration.

    Attributes:
        config: the head's configuration.
        input_pixels: 0: it looks at no pixels of its own.
    """

    input_pixels = 0

    def __init__(self, session: onnxruntime.InferenceSession, config: HeadConfig) -> None:
        self.config = config
        self._session = session
        self._input_names = [entry.name for entry in session.get_inputs()]

    def check(self, detector: ShowsFeatures) -> None:
        """Compare a detector with the one that the head was trained on; raises as `check_features`."""
        check_features(self.config, detector)

    def from_features(
        self, features: Sequence[tuple[np.ndarray, ...]], tiles: Sequence[Tile]
    ) -> list[ScaleMap | TileError]:
        """Predict the scale maps of tiles, those of one canvas together.

        Args:
            features: B times the maps of `DetectionsWithFeatures.features`, [C, h, w] float32 each.
            tiles: their recipes; a map covers its tile, not the canvas's padding.

        Returns:
            B scale maps, or a TileError for the tile that the network broke on.

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        maps: dict[int, ScaleMap | TileError] = {}
        shapes = [tuple(level.shape for level in levels) for levels in features]
        for shape in dict.fromkeys(shapes):
            index = [i for i, other in enumerate(shapes) if other == shape]
            prob, gain = translate_oom(lambda at=index: self._run([features[i] for i in at]))
            for i, tile_prob, tile_gain in zip(index, prob, gain, strict=True):
                rows, columns = (-(-side // self.config.stride) for side in (tiles[i].height, tiles[i].width))
                maps[i] = map_of(prob=tile_prob[:, :rows, :columns], gain=tile_gain[:rows, :columns])
        return [maps[i] for i in range(len(features))]

    def _run(self, features: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray]:
        batch = [np.stack(level) for level in zip(*features, strict=True)]
        prob, gain = self._session.run(None, dict(zip(self._input_names, batch, strict=True)))
        return np.asarray(prob), np.asarray(gain)


def load_predictor(
    path: str | Path, device: str = "cpu", *, mixed_precision: bool = False
) -> OnnxScaleNet | OnnxScaleHead | ScaleNetPredictor | ScaleHeadPredictor:
    """Load a Scale Net or a scale head; its file says which it is.

    Args:
        path: weights, local or in a store: .onnx of `scalenet-ray export-onnx`, or .safetensors, which needs torch.
        device: where it computes, as torch names it.
        mixed_precision: run under bfloat16 autocast; for safetensors alone.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if the file is of neither, is damaged, is ONNX and mixed precision is asked for, or needs torch and
            that is not installed.
    """
    if not str(path).endswith(ONNX_SUFFIX):
        with needs_extra():
            from scalenet_ray.models.scale_head import load_torch_predictor
        return load_torch_predictor(path, device, mixed_precision=mixed_precision)
    if mixed_precision:
        msg = f"mixed precision is for weights as safetensors, got {path}, which has a precision of its own: give those"
        raise UserError(msg)
    session, kind, fields = open_network(str(path), SCALE_NET, SCALE_HEAD, device=device)
    if kind == SCALE_HEAD:
        return OnnxScaleHead(session, head_config(fields, str(path)))
    return OnnxScaleNet(session, net_config(fields, str(path)))
