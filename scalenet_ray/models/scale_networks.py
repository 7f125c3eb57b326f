"""Scale Nets and scale heads without torch: presets, configurations, and prediction on batches of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from PIL import Image

from scalenet_ray.core.errors import TileError, UserError, needs_extra
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.models.detectors import ShowsFeatures
from scalenet_ray.models.devices import translate_oom
from scalenet_ray.models.onnx_session import open_network

Architecture = Literal["fcn", "unet", "light-unet"]
Kind = Literal["classes", "regression"]
Padding = Literal["each", "input"]

SCALE_NET = "scale_net"
"""Key of a Scale Net's configuration, as JSON, in the metadata of its file."""

SCALE_HEAD = "scale_head"
"""Key of a scale head's configuration, as JSON, in the metadata of its file."""

ONNX_SUFFIX = ".onnx"
"""The ending of a network's file that onnxruntime reads."""

Run = Callable[[Any, Sequence[np.ndarray]], np.ndarray]
"""(network, its inputs, [B, ...] each) -> its output, float32."""

_LIGHT_STRIDE = 4


@dataclass(frozen=True)
class ScaleNetConfig:
    """Configuration of a Scale Net.

    Attributes:
        preset: name of the preset.
        architecture: "fcn" (paper, Table 1), "unet" (the paper's U-Net, output as large as the input) or "light-unet"
            (a narrow decoder with output at a quarter of the input's side, without the two most expensive stages).
        kind: "classes" predicts logits [B, 6, h, w], "regression" scales [B, h, w].
        input_side: side of the square that tiles are resized to in pixels (the paper: 512). None for the tile's size,
            which a regression needs, since its scales are in tile pixels.
        in_channels: 3 for RGB, 1 for grey.
        encoder: name of a segmentation-models-pytorch encoder; None for `LightEncoder`.
        classes: number of scale classes, for "classes".
        padding: zero padding of the "fcn": of "each" convolution, or once of the "input", so that a black background
            continues beyond the edge.

    Raises:
        UserError: if the fields are inconsistent.
    """

    preset: str
    architecture: Architecture
    kind: Kind = "classes"
    input_side: int | None = 256
    in_channels: int = 3
    encoder: str | None = None
    classes: int = NUM_CLASSES
    padding: Padding = "each"

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture) or self.kind not in get_args(Kind):
            known = f"{', '.join(get_args(Architecture))} and {', '.join(get_args(Kind))}"
            msg = f"a scale net's architecture and kind must be of {known}, got {self.architecture} and {self.kind}"
            raise UserError(msg)
        if self.classes != NUM_CLASSES:
            msg = f"a scale net must have {NUM_CLASSES} classes, got {self.classes}: train it on this version's classes"
            raise UserError(msg)
        if self.architecture != "fcn" and (self.input_side is None or self.input_side < 32 or self.input_side % 32):
            msg = f"a U-Net's input_side must be a multiple of 32, got {self.input_side}"
            raise UserError(msg)

    @property
    def output_stride(self) -> int:
        """Cell side of the output in input pixels."""
        return _LIGHT_STRIDE if self.architecture == "light-unet" else 1

    @property
    def output_hw(self) -> tuple[int, int]:
        """(h, w) of the class map in cells, if the input has a fixed size."""
        side = (self.input_side or 0) // self.output_stride
        return (side, side)


PRESETS: dict[str, ScaleNetConfig] = {
    config.preset: config
    for config in (
        ScaleNetConfig("fcn-digits", "fcn", "regression", input_side=None, in_channels=1),
        ScaleNetConfig("unet-vgg16", "unet", input_side=512, encoder="vgg16"),
        ScaleNetConfig("unet-light", "light-unet", input_side=256),
        ScaleNetConfig("unet-lite0", "light-unet", input_side=256, encoder="tu-tf_efficientnet_lite0"),
    )
}
"""Configurations by name: the paper's two, one for CPUs, and one with ImageNet weights."""


@dataclass(frozen=True)
class HeadConfig:
    """Configuration of a scale head.

    Attributes:
        feature_channels: channels of the detector's feature maps, finest first; each has half the side of the last.
        stride: cell side of the finest feature map and of the output in tile pixels.
        width: number of hidden channels.
        detector: the detector that it was trained on; informative.
        classes: number of scale classes.
    """

    feature_channels: tuple[int, ...]
    stride: int = 8
    width: int = 32
    detector: str = ""
    classes: int = NUM_CLASSES


def squashed(tile: np.ndarray, config: ScaleNetConfig) -> np.ndarray:
    """Resize a tile, [h, w, 3] uint8 RGB, to [side, side, 3]; returned unchanged if the input has no fixed size."""
    if config.input_side is None:
        return tile
    image = Image.fromarray(tile).resize((config.input_side, config.input_side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def net_config(fields: dict[str, Any], path: str) -> ScaleNetConfig:
    """The configuration of a Scale Net from what its file holds under `SCALE_NET`; `path` is for messages.

    Raises:
        UserError: if a field is unknown, missing or wrong.
    """
    try:
        return ScaleNetConfig(**fields)
    except (TypeError, ValueError) as error:
        msg = f"{path} holds a scale net that this version can't build: {error}"
        raise UserError(msg) from error


def head_config(fields: dict[str, Any], path: str) -> HeadConfig:
    """The configuration of a scale head from what its file holds under `SCALE_HEAD`; `path` is for messages.

    Raises:
        UserError: if a field is unknown or missing, or an older version wrote the file.
    """
    try:
        # Older versions name no classes: their heads have another output beside them.
        config = HeadConfig(**{"classes": 0, **fields, "feature_channels": tuple(fields["feature_channels"])})
    except (TypeError, KeyError) as error:
        msg = f"{path} holds a scale head that this version can't build: {error}"
        raise UserError(msg) from error
    if config.classes != NUM_CLASSES:
        msg = (
            f"{path} must hold a scale head of {NUM_CLASSES} classes alone, got one of an older version: train it "
            "again with scalenet-ray train --preset head"
        )
        raise UserError(msg)
    return config


class ScaleNetPredictor:
    """`ScalePredictor` with a Scale Net.

    Args:
        config: configuration of the network.
        model: the network: [B, h, w, 3] uint8 RGB -> class probabilities [B, 6, h, w] or scales [B, h, w], float32.
        run: runs it.

    Attributes:
        input_pixels: pixels computed for a tile; 0 for a net that takes each tile as it is.
    """

    def __init__(self, config: ScaleNetConfig, model: Any, run: Run) -> None:
        self.config, self.model, self._run = config, model, run
        self.input_pixels = (config.input_side or 0) ** 2

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile] = ()) -> list[ScaleMap | TileError]:
        """Predict the scale maps of tiles, [h, w, 3] uint8 RGB each, those of one size together; `tiles` is not used.

        Returns:
            Scale maps, or a TileError where the network returned NaN or infinite values.

        Raises:
            OutOfMemoryError: if a batch does not fit the device's memory.
        """
        name = "prob" if self.config.kind == "classes" else "scale"
        inputs = [squashed(tile, self.config) for tile in pixels]
        maps: dict[int, ScaleMap | TileError] = {}
        for hw in dict.fromkeys(tile.shape[:2] for tile in inputs):
            index = [i for i, tile in enumerate(inputs) if tile.shape[:2] == hw]
            batch = np.stack([inputs[i] for i in index])
            output = translate_oom(lambda batch=batch: self._run(self.model, [batch]))
            maps.update(zip(index, (_map_of(**{name: values}) for values in output), strict=True))
        return [maps[i] for i in range(len(inputs))]


class ScaleHeadPredictor:
    """`FeatureScalePredictor` with a scale head: a detector's feature maps -> class maps.

    The network takes [B, C, h, w] float32 each, finest first, and returns class probabilities [B, 6, h, w], float32.
    """

    input_pixels = 0

    def __init__(self, config: HeadConfig, model: Any, run: Run) -> None:
        self.config, self.model, self._run = config, model, run

    def check(self, detector: ShowsFeatures) -> None:
        """Check that a detector's feature maps match those that the head was trained on.

        Raises:
            UserError: if they do not.
        """
        wanted = (self.config.feature_channels, self.config.stride)
        got = (tuple(detector.feature_channels), detector.feature_stride)
        if wanted != got:
            msg = (
                f"this scale head reads the features of {self.config.detector or 'another detector'}, channels "
                f"{wanted[0]} from stride {wanted[1]} on, got {got[0]} from {got[1]}: train one for this detector"
            )
            raise UserError(msg)

    def from_features(
        self, features: Sequence[tuple[np.ndarray, ...]], tiles: Sequence[Tile]
    ) -> list[ScaleMap | TileError]:
        """Predict the scale maps of tiles from `DetectionsWithFeatures.features`, those of one canvas together.

        A map covers its tile without the padding; returns and raises as `ScaleNetPredictor` does.
        """
        maps: dict[int, ScaleMap | TileError] = {}
        shapes = [tuple(level.shape for level in levels) for levels in features]
        for shape in dict.fromkeys(shapes):
            index = [i for i, other in enumerate(shapes) if other == shape]
            batch = [np.stack(level) for level in zip(*(features[i] for i in index), strict=True)]
            for i, prob in zip(index, translate_oom(lambda batch=batch: self._run(self.model, batch)), strict=True):
                rows, columns = (-(-side // self.config.stride) for side in (tiles[i].height, tiles[i].width))
                maps[i] = _map_of(prob=prob[:, :rows, :columns])
        return [maps[i] for i in range(len(features))]


def _map_of(**values: Any) -> ScaleMap | TileError:
    """A network's output for one tile as a scale map, or the error for NaN values."""
    try:
        return ScaleMap(**values)
    except TileError as error:
        return error


def load_predictor(
    path: str | Path, device: str = "cpu", *, mixed_precision: bool = False
) -> ScaleNetPredictor | ScaleHeadPredictor:
    """Load a Scale Net or a scale head; its file says which it is.

    Args:
        path: weights, local or in a store: .onnx of `scalenet-ray export-onnx`, or .safetensors, which needs torch.
        device: where it computes, as torch names it.
        mixed_precision: run under bfloat16 autocast; for safetensors alone.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if the file is of neither or damaged, or does not fit the arguments, or torch is not installed.
    """
    if not str(path).endswith(ONNX_SUFFIX):
        with needs_extra():
            from scalenet_ray.models.scale_net import load_torch_predictor
        return load_torch_predictor(path, device, mixed_precision=mixed_precision)
    if mixed_precision:
        msg = f"mixed precision is for weights as safetensors, got {path}, which has a precision of its own: give those"
        raise UserError(msg)
    session, kind, fields = open_network(str(path), SCALE_NET, SCALE_HEAD, device=device)
    if kind == SCALE_HEAD:
        return ScaleHeadPredictor(head_config(fields, str(path)), session, _run_session)
    return ScaleNetPredictor(net_config(fields, str(path)), session, _run_session)


def _run_session(session: onnxruntime.InferenceSession, inputs: Sequence[np.ndarray]) -> np.ndarray:
    names = [entry.name for entry in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, inputs, strict=True)))[0])
