"""Scale Net: the paper's networks and lighter ones, their checkpoints, and the predictor for tiles.

A checkpoint is a safetensors file with the network's configuration in the header.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.models.devices import device_on_this_machine, translate_oom
from scalenet_ray.models.weights import load_weights, save_weights

__all__ = [
    "PRESETS",
    "ScaleNetConfig",
    "ScaleNetPredictor",
    "build_scale_net",
    "load_scale_net",
    "load_state",
    "normalised",
    "read_checkpoint",
    "save_scale_net",
    "squashed",
]

Architecture = Literal["fcn", "unet", "light-unet"]
Kind = Literal["classes", "regression"]
Padding = Literal["each", "input"]

_FORMAT = "scale_net"
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LIGHT_WIDTHS = (32, 64, 96, 128)
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
        if self.in_channels not in (1, 3):
            msg = f"in_channels must be 3 (RGB) or 1 (grey), got {self.in_channels}"
            raise UserError(msg)
        if (self.kind == "regression") != (self.input_side is None):
            msg = f"a regression takes tiles as they are and classes a fixed side, got {self.kind}, {self.input_side}"
            raise UserError(msg)
        if self.architecture != "fcn" and (self.input_side is None or self.input_side < 32 or self.input_side % 32):
            msg = f"a U-Net's input_side must be a multiple of 32, got {self.input_side}"
            raise UserError(msg)
        if self.architecture == "unet" and self.encoder is None:
            msg = "the architecture unet wants the name of an encoder, got none: e.g. vgg16"
            raise UserError(msg)

    @property
    def output_stride(self) -> int:
        """Cell side of the output in input pixels."""
        return _LIGHT_STRIDE if self.architecture == "light-unet" else 1

    @property
    def output_hw(self) -> tuple[int, int]:
        """(h, w) of the class map in cells.

        Raises:
            UserError: if the input has no fixed size.
        """
        if self.input_side is None:
            msg = "the output of a net that takes tiles as they are is as large as its input: it has no fixed size"
            raise UserError(msg)
        side = self.input_side // self.output_stride
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


class DigitsFcn(nn.Module):
    """Three convolutions, each followed by ReLU (Table 1)."""

    def __init__(self, in_channels: int, out_channels: int, padding: Padding = "each") -> None:
        super().__init__()
        each = padding == "each"
        last = nn.Conv2d(32, out_channels, 5, padding=2 * each)
        # With a bias of 0 the last ReLU may start inactive everywhere, with zero gradients.
        nn.init.ones_(last.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(
            nn.Identity() if each else nn.ZeroPad2d(8),
            nn.Conv2d(in_channels, 16, 7, padding=3 * each),
            nn.ReLU(),
            nn.Conv2d(16, 32, 7, padding=3 * each),
            nn.ReLU(),
            last,
            nn.ReLU(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        return self.layers(images)


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class LightEncoder(nn.Module):
    """Encoder of five stages with stride 2; all but the first have two 3 x 3 convolutions."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.stem = _block(in_channels, 16, stride=2)
        widths = (16, *_LIGHT_WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(_block(before, width, stride=2), _block(width, width))
            for before, width in itertools.pairwise(widths)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, C, H, W] -> feature maps of strides 4, 8, 16 and 32."""
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


class LightUNet(nn.Module):
    """U-Net with a narrow decoder and output at a quarter of the input's side."""

    def __init__(self, config: ScaleNetConfig, out_channels: int) -> None:
        super().__init__()
        if config.encoder is None:
            self.encoder: nn.Module = LightEncoder(config.in_channels)
            widths = _LIGHT_WIDTHS
        else:
            self.encoder = smp.encoders.get_encoder(config.encoder, in_channels=config.in_channels, weights=None)
            widths = tuple(self.encoder.out_channels)[-4:]  # type: ignore[arg-type]
        narrow = _LIGHT_WIDTHS[:3]
        inputs = (narrow[1] + widths[0], narrow[2] + widths[1], widths[3] + widths[2])
        self.decoder = nn.ModuleList(_block(i, o) for i, o in zip(inputs, narrow, strict=True))
        self.head = nn.Conv2d(narrow[0], out_channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, out, H / 4, W / 4]."""
        quarter, eighth, sixteenth, x = self.encoder(images)[-4:]
        for skip, block in zip((sixteenth, eighth, quarter), reversed(self.decoder), strict=True):
            x = block(torch.cat([functional.interpolate(x, size=skip.shape[-2:]), skip], dim=1))
        return self.head(x)


class _Regression(nn.Module):
    """Removes the channel axis of a regression: [B, 1, h, w] -> [B, h, w]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, h, w]."""
        return self.net(images)[:, 0]


def build_scale_net(config: ScaleNetConfig) -> nn.Module:
    """Build a network with random weights: [B, C, H, W] of `normalised` -> logits [B, 6, h, w] or scales [B, h, w]."""
    out_channels = config.classes if config.kind == "classes" else 1
    if config.architecture == "fcn":
        net: nn.Module = DigitsFcn(config.in_channels, out_channels, config.padding)
    elif config.architecture == "unet":
        net = smp.Unet(config.encoder or "", encoder_weights=None, in_channels=config.in_channels, classes=out_channels)
    else:
        net = LightUNet(config, out_channels)
    return net if config.kind == "classes" else _Regression(net)


def squashed(tile: np.ndarray, config: ScaleNetConfig) -> np.ndarray:
    """Resize a tile, [h, w, 3] uint8 RGB, to [side, side, 3]; returned unchanged if the input has no fixed size."""
    if config.input_side is None:
        return tile
    image = Image.fromarray(tile).resize((config.input_side, config.input_side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def normalised(images: torch.Tensor, config: ScaleNetConfig) -> torch.Tensor:
    """[B, H, W, 3] uint8 RGB -> [B, C, H, W] float32: in 0..1 for "fcn", else normalized by ImageNet's statistics."""
    batch = images.permute(0, 3, 1, 2).float()
    if config.architecture == "fcn" and config.in_channels == 3:
        return batch / 255.0
    if config.in_channels == 1:
        # ITU-R 601-2, as in Pillow's conversion to grey.
        return (batch * torch.tensor([0.299, 0.587, 0.114], device=batch.device).view(1, 3, 1, 1)).sum(1, True) / 255.0
    mean = torch.tensor(_MEAN, device=batch.device).view(3, 1, 1) * 255.0
    deviation = torch.tensor(_DEVIATION, device=batch.device).view(3, 1, 1) * 255.0
    return ((batch - mean) / deviation).contiguous(memory_format=torch.channels_last)


def read_checkpoint(path: str | Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the tensors and the configuration, JSON under `name` in the header, of a safetensors file.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the header has no such entry.
    """
    tensors, header = load_weights(str(path))
    if name not in header:
        msg = f"{path} must have '{name}' in its header, got {sorted(header)}: it is the checkpoint of something else"
        raise UserError(msg)
    return tensors, json.loads(header[name])


def load_state(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a checkpoint's weights into a model, converted to the model's precision.

    Raises:
        UserError: if names or shapes differ.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        msg = f"the weights in {path} do not fit the network that its own header describes: {error}"
        raise UserError(msg) from error


def save_scale_net(model: nn.Module, config: ScaleNetConfig, path: str | Path) -> None:
    """Write weights and configuration as a safetensors file, local or s3://."""
    save_weights(model.state_dict(), {_FORMAT: json.dumps(asdict(config))}, str(path))


def load_scale_net(path: str | Path, device: str = "cpu") -> tuple[nn.Module, ScaleNetConfig]:
    """Load a checkpoint of `save_scale_net`: the network in evaluation mode, and its configuration.

    Raises:
        UserError: if it is not a Scale Net's checkpoint, or the weights do not match its configuration.
    """
    tensors, fields = read_checkpoint(path, _FORMAT)
    try:
        config = ScaleNetConfig(**fields)
    except (TypeError, ValueError) as error:
        msg = f"{path} holds a scale net that this version can't build: {error}"
        raise UserError(msg) from error
    model = build_scale_net(config)
    load_state(model, tensors, path)
    return model.eval().to(device_on_this_machine(device)), config


class ScaleNetPredictor:
    """`ScalePredictor` with a trained Scale Net, one forward pass per batch of equal sizes.

    Attributes:
        config: configuration of the network.
        input_pixels: input pixels per tile; 0 if the input has no fixed size.
    """

    def __init__(self, path: str | Path, device: str = "cpu", *, mixed_precision: bool = False) -> None:
        model, self.config = load_scale_net(path, device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self._autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision)
        self.input_pixels = (self.config.input_side or 0) ** 2

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile] = ()) -> list[ScaleMap | TileError]:
        """Predict the scale maps of tiles.

        Args:
            pixels: B tiles, [h, w, 3] uint8 RGB each.
            tiles: not used.

        Returns:
            B scale maps, or a TileError where the network returned NaN or infinite values.

        Raises:
            OutOfMemoryError: if the batch does not fit the device's memory.
        """
        return translate_oom(lambda: self._predict_by_size(pixels))

    def _predict_by_size(self, pixels: Sequence[np.ndarray]) -> list[ScaleMap | TileError]:
        if self.config.input_side is not None:
            return self._predict_batch(pixels) if len(pixels) else []
        maps: dict[int, ScaleMap | TileError] = {}
        for hw in dict.fromkeys(tile.shape[:2] for tile in pixels):
            index = [i for i, tile in enumerate(pixels) if tile.shape[:2] == hw]
            maps.update(zip(index, self._predict_batch([pixels[i] for i in index]), strict=True))
        return [maps[i] for i in range(len(pixels))]

    def _predict_batch(self, pixels: Sequence[np.ndarray]) -> list[ScaleMap | TileError]:
        with torch.inference_mode(), self._autocast:
            tiles = torch.from_numpy(np.stack([squashed(tile, self.config) for tile in pixels]))
            output = self.model(normalised(tiles.to(self.device), self.config)).float()
            output = output.softmax(dim=1) if self.config.kind == "classes" else output
        return [self._map(values) for values in output.cpu().numpy()]

    def _map(self, values: np.ndarray) -> ScaleMap | TileError:
        try:
            return ScaleMap(prob=values) if self.config.kind == "classes" else ScaleMap(scale=values)
        except TileError as error:
            return error
