"""Scale Net: the paper's networks and lighter ones, their checkpoints, and the predictor for tiles.

A checkpoint is a safetensors file with the network's configuration in the header.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.models.scale_networks import SCALE_NET, Padding, ScaleNetConfig, TilePredictor, net_config
from scalenet_ray.models.weights import load_weights, save_weights

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LIGHT_WIDTHS = (32, 64, 96, 128)


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


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class LightEncoder(nn.Module):
    """Encoder of five stages with stride 2; all but the first have two 3 x 3 convolutions."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.stem = conv_block(in_channels, 16, stride=2)
        widths = (16, *_LIGHT_WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(conv_block(before, width, stride=2), conv_block(width, width))
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
        self.decoder = nn.ModuleList(conv_block(i, o) for i, o in zip(inputs, narrow, strict=True))
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
    """Write weights and configuration as a safetensors file, local or in a store."""
    save_weights(model.state_dict(), {SCALE_NET: json.dumps(asdict(config))}, str(path))


def load_scale_net(path: str | Path, device: str = "cpu") -> tuple[nn.Module, ScaleNetConfig]:
    """Load a checkpoint of `save_scale_net`: the network in evaluation mode, and its configuration.

    Raises:
        UserError: if it is not a Scale Net's checkpoint, or the weights do not match its configuration.
    """
    tensors, fields = read_checkpoint(path, SCALE_NET)
    config = net_config(fields, str(path))
    model = build_scale_net(config)
    load_state(model, tensors, path)
    return model.eval().to(device_on_this_machine(device)), config


class ScaleNetPredictor(TilePredictor):
    """`ScalePredictor` with a trained Scale Net in torch, one forward pass per batch of equal sizes.

    Args:
        path: checkpoint of `save_scale_net`, local or in a store.
        device: torch device.
        mixed_precision: run under bfloat16 autocast.
    """

    def __init__(self, path: str | Path, device: str = "cpu", *, mixed_precision: bool = False) -> None:
        model, config = load_scale_net(path, device)
        super().__init__(config)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self._autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision)

    def _run(self, tiles: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), self._autocast:
            output = self.model(normalised(torch.from_numpy(tiles).to(self.device), self.config)).float()
            return (output.softmax(dim=1) if self.config.kind == "classes" else output).cpu().numpy()
