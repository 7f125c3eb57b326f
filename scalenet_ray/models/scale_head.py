"""Scale head: a small Scale Net on a frozen detector's feature maps, so that both share one forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.models.scale_net import ScaleNetPredictor, load_state, read_checkpoint
from scalenet_ray.models.scale_networks import SCALE_HEAD, FeaturePredictor, HeadConfig, head_config
from scalenet_ray.models.weights import load_weights, save_weights

_DILATIONS = (2, 4)


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


def save_scale_head(model: nn.Module, config: HeadConfig, path: str) -> None:
    """Write weights and configuration as a safetensors file, local or in a store."""
    save_weights(model.state_dict(), {SCALE_HEAD: json.dumps(asdict(config))}, path)


class ScaleHeadPredictor(FeaturePredictor):
    """`FeatureScalePredictor` with a trained scale head in torch.

    Args:
        path: checkpoint of `save_scale_head`, local or in a store.
        device: torch device.
        mixed_precision: run under bfloat16 autocast.

    Raises:
        UserError: if the file is not a scale head's, or its weights do not match its configuration.
    """

    def __init__(self, path: str | Path, device: str = "cpu", *, mixed_precision: bool = False) -> None:
        tensors, fields = read_checkpoint(path, SCALE_HEAD)
        super().__init__(head_config(fields, str(path)))
        self.model = ScaleHead(self.config)
        load_state(self.model, tensors, path)
        at = device_on_this_machine(device)
        self.model.eval().to(at)
        self.device = device
        self._autocast = torch.autocast(at.type, torch.bfloat16, enabled=mixed_precision)

    def _run(self, levels: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode(), self._autocast:
            logits = self.model([torch.from_numpy(level).to(self.device) for level in levels]).float()
            return logits.softmax(dim=1).cpu().numpy()


def load_torch_predictor(
    path: str | Path, device: str = "cpu", *, mixed_precision: bool = False
) -> ScaleNetPredictor | ScaleHeadPredictor:
    """Load a Scale Net or a scale head, by the header of its file; raises as their predictors do.

    Args:
        path: checkpoint, local or in a store.
        device: torch device.
        mixed_precision: run under bfloat16 autocast.
    """
    _, header = load_weights(str(path))
    predictor = ScaleHeadPredictor if SCALE_HEAD in header else ScaleNetPredictor
    return predictor(path, device, mixed_precision=mixed_precision)
