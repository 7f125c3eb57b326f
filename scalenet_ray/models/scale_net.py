"""Scale Nets and scale heads in torch: the networks, their checkpoints, and prediction.

A checkpoint is a safetensors file with the network's configuration in the header.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.models.scale_networks import (
    SCALE_HEAD,
    SCALE_NET,
    HeadConfig,
    Padding,
    ScaleHeadPredictor,
    ScaleNetConfig,
    ScaleNetPredictor,
    head_config,
    net_config,
)
from scalenet_ray.models.weights import load_weights, save_weights

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LIGHT_WIDTHS = (32, 64, 96, 128)
_DILATIONS = (2, 4)


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


class ScaleHead(nn.Module):
    """1 x 1 convolution per feature map, summed on the finest grid, then two residual dilated 3 x 3 convolutions."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in config.feature_channels)
        self.entries = nn.ModuleList(nn.Conv2d(channels, config.width, 1) for channels in config.feature_channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(config.width, config.width, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(config.width),
                nn.ReLU(),
            )
            for dilation in _DILATIONS
        )
        self.answer = nn.Conv2d(config.width, config.classes, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, C, h, w] each, finest first -> logits [B, 6, h, w] of the scale classes."""
        hw = features[0].shape[-2:]
        entries = zip(features, self.norms, self.entries, strict=True)
        parts = [functional.interpolate(entry(norm(level.float())), size=hw) for level, norm, entry in entries]
        x = functional.relu(torch.stack(parts).sum(dim=0))
        for block in self.blocks:
            x = x + block(x)
        return self.answer(x)


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


def save_scale_head(model: nn.Module, config: HeadConfig, path: str) -> None:
    """Write weights and configuration as a safetensors file, local or in a store."""
    save_weights(model.state_dict(), {SCALE_HEAD: json.dumps(asdict(config))}, path)


def load_scale_net(path: str | Path) -> tuple[nn.Module, ScaleNetConfig]:
    """Load a checkpoint of `save_scale_net`: the network in evaluation mode, and its configuration.

    Raises:
        UserError: if it is not a Scale Net's checkpoint, or the weights do not match its configuration.
    """
    tensors, fields = read_checkpoint(path, SCALE_NET)
    config = net_config(fields, str(path))
    model = build_scale_net(config)
    load_state(model, tensors, path)
    return model.eval(), config


class ScaleNetOnPixels(nn.Module):
    """A Scale Net with its normalisation and its softmax."""

    def __init__(self, model: nn.Module, config: ScaleNetConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """[B, h, w, 3] uint8 RGB -> probabilities [B, 6, h, w] or scales [B, h, w]."""
        output = self.model(normalised(tiles, self.config)).float()
        return output.softmax(dim=1) if self.config.kind == "classes" else output


class ScaleHeadOnFeatures(nn.Module):
    """A scale head with its softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] each, finest first -> probabilities [B, 6, h, w]."""
        return self.model(features).float().softmax(dim=1)


def load_torch_predictor(
    path: str | Path, device: str = "cpu", *, mixed_precision: bool = False
) -> ScaleNetPredictor | ScaleHeadPredictor:
    """Load a Scale Net or a scale head, by the header of its file.

    Args:
        path: checkpoint of `save_scale_net` or `save_scale_head`, local or in a store.
        device: torch device.
        mixed_precision: run under bfloat16 autocast.

    Raises:
        UserError: if the file is of another network, or its weights do not match its configuration.
    """
    at = device_on_this_machine(device)
    autocast = torch.autocast(at.type, torch.bfloat16, enabled=mixed_precision)

    def run(model: nn.Module, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Output of the network for a batch."""
        with torch.inference_mode(), autocast:
            return model(*(torch.from_numpy(values).to(at) for values in inputs)).float().cpu().numpy()

    tensors, header = load_weights(str(path))
    if SCALE_HEAD in header:
        config = head_config(json.loads(header[SCALE_HEAD]), str(path))
        head = ScaleHead(config)
        load_state(head, tensors, path)
        return ScaleHeadPredictor(config, ScaleHeadOnFeatures(head).eval().to(at), run)
    net, config = load_scale_net(path)
    model = ScaleNetOnPixels(net, config).to(at, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ScaleNetPredictor(config, model.eval(), run)
