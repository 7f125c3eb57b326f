"""Classifiers of the paper's experiments (sections 'MNIST' and 'CIFAR-10') and their losses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import DeformConv2d

_FILTERS, _KERNEL, _HIDDEN = (16, 32), 5, 128
_VGG_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG_MIN_CHANNELS = 8

ROUTING_ITERATIONS = 3
"""Iterations of dynamic routing (Sabour et al., section 4)."""

_CAPSULE_KERNEL, _CAPSULE_STRIDE = 9, 2
_CAPSNET_CHANNELS, _CAPSULE_TYPES = 256, 32
_PRIMARY_DIM, _DIGIT_DIM = 8, 16
_INITIAL_STD = 0.1
_MARGIN_PRESENT, _MARGIN_ABSENT, _ABSENT_WEIGHT = 0.9, 0.1, 0.5


class _DeformableConv(nn.Module):
    """Deformable convolution: a second convolution predicts the offsets of the taps (Dai et al., 2017, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(in_channels, 2 * kernel**2, kernel, padding=kernel // 2)
        self.conv = DeformConv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        # Zero offsets: it starts as a plain convolution.
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] -> [B, out, H, W], in float32: torchvision's CPU kernel has no bfloat16."""
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.float(), self.offsets(x.float()))


def build_classifier(kind: str, *, side: int, in_channels: int, classes: int = 10, width: float = 1.0) -> nn.Module:
    """Build a classifier with random weights: [B, in_channels, side, side] float32 -> [B, classes] scores.

    Args:
        kind: "plain": two 5 x 5 convolutions of 16 and 32 filters, each with ReLU and 2 x 2 max-pooling, and two fully
            connected layers with 128 hidden units (section 'MNIST'). "deformable": the same with a deformable second
            convolution. "capsnet": `CapsNet`. "vgg11": VGG-11 with batch norm (section 'CIFAR-10'), global average
            pooling and one linear layer instead of VGG's three, as is usual at CIFAR's size.
        side: input side in pixels: at least 4, at least 17 for "capsnet", a multiple of 32 for "vgg11".
        in_channels: 1 for grey, 3 for RGB.
        classes: number of classes.
        width: multiplier of the channels of "capsnet" and "vgg11".
    """
    if kind == "capsnet":
        return CapsNet(side=side, in_channels=in_channels, classes=classes, width=width)
    if kind == "vgg11":
        return _vgg11(in_channels, classes, width)
    first, second = _FILTERS
    return nn.Sequential(
        nn.Conv2d(in_channels, first, _KERNEL, padding=_KERNEL // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _DeformableConv(first, second, _KERNEL)
        if kind == "deformable"
        else nn.Conv2d(first, second, _KERNEL, padding=_KERNEL // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (side // 4) ** 2, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, classes),
    )


def _vgg11(in_channels: int, classes: int, width: float) -> nn.Module:
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in _VGG_STAGES:
        for full in stage:
            before, channels = channels, max(_VGG_MIN_CHANNELS, round(full * width))
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def classifier_loss(kind: str, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Margin loss for "capsnet", cross-entropy for all others, of scores [B, classes] and labels [B], a scalar."""
    return margin_loss(scores, labels) if kind == "capsnet" else functional.cross_entropy(scores, labels.long())


def squash(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors [..., dimensions] of length n to n^2 / (1 + n^2) (Sabour et al., equation 1); zero stays zero."""
    # Not vectors / length: NaN for a zero vector.
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * (length / (1.0 + length**2))


def route(predictions: torch.Tensor) -> torch.Tensor:
    """Dynamic routing by agreement (Sabour et al., procedure 1).

    Only the last iteration is differentiated: the coupling coefficients of earlier ones are constants.

    Args:
        predictions: [B, capsules, classes, dimensions] float, prediction of each lower capsule for each upper one.

    Returns:
        [B, classes, dimensions], the squashed upper capsules.
    """
    constant = predictions.detach()
    logits = torch.zeros_like(constant[..., 0])
    for _ in range(ROUTING_ITERATIONS - 1):
        logits = logits + torch.einsum("bpcd,bcd->bpc", constant, _routed_sum(logits, constant))
    return _routed_sum(logits, predictions)


def _routed_sum(logits: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """[B, capsules, classes] and [B, capsules, classes, dimensions] -> [B, classes, dimensions]."""
    return squash(torch.einsum("bpc,bpcd->bcd", logits.softmax(dim=2), predictions))


class CapsNet(nn.Module):
    """Capsule network: a convolution, primary capsules and one capsule per class (Sabour et al., section 4).

    Without the reconstruction decoder: it is trained with the margin loss alone. `width` multiplies the paper's 256
    channels and 32 primary capsule types; the side is at least 17 pixels.
    """

    def __init__(self, *, side: int, in_channels: int, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        cells = ((side - 2 * _CAPSULE_KERNEL + 1) // _CAPSULE_STRIDE + 1) ** 2
        channels, types = max(1, round(_CAPSNET_CHANNELS * width)), max(1, round(_CAPSULE_TYPES * width))
        self.features = nn.Conv2d(in_channels, channels, _CAPSULE_KERNEL)
        self.primary = nn.Conv2d(channels, types * _PRIMARY_DIM, _CAPSULE_KERNEL, stride=_CAPSULE_STRIDE)
        self.transforms = nn.Parameter(_INITIAL_STD * torch.randn(types * cells, classes, _DIGIT_DIM, _PRIMARY_DIM))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, side, side] -> [B, classes], lengths of the class capsules, below 1."""
        maps = self.primary(functional.relu(self.features(images)))
        capsules = squash(maps.unflatten(1, (-1, _PRIMARY_DIM)).flatten(3).transpose(2, 3).flatten(1, 2))
        return torch.linalg.vector_norm(route(torch.einsum("bpi,pcdi->bpcd", capsules, self.transforms)), dim=-1)


def margin_loss(lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Margin loss: margin 0.9 for the correct class, 0.1 at half the weight for others (Sabour et al., equation 4).

    `lengths` are [B, classes] in 0..1, `labels` [B].
    """
    correct = functional.one_hot(labels.long(), lengths.shape[1]).bool()
    present, absent = functional.relu(_MARGIN_PRESENT - lengths) ** 2, functional.relu(lengths - _MARGIN_ABSENT) ** 2
    return torch.where(correct, present, _ABSENT_WEIGHT * absent).sum(dim=1).mean()
