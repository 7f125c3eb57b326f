"""The paper's classifiers of canvases (sections 'MNIST' and 'CIFAR-10'), and what each is trained to lower."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import DeformConv2d

from scalenet_ray.core.errors import UserError

__all__ = [
    "KINDS",
    "ROUTING_ITERATIONS",
    "CapsNet",
    "build_classifier",
    "classifier_loss",
    "margin_loss",
    "route",
    "squash",
]

KINDS = ("plain", "deformable", "capsnet", "vgg11")
"""The classifiers by name."""


_FILTERS, _KERNEL, _HIDDEN = (16, 32), 5, 128


_LEAST_SIDE = 4


_VGG_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


_VGG_STRIDE = 2 ** len(_VGG_STAGES)


_LEAST_CHANNELS = 8


class _DeformableConv(nn.Module):
    """A padded convolution whose taps are moved by what another one says (Dai et al., 2017, section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(in_channels, 2 * kernel**2, kernel, padding=kernel // 2)
        self.conv = DeformConv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        # At zero it starts as the plain convolution.
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] -> [B, out, H, W]; in float32, as torchvision has no other on CPUs."""
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.float(), self.offsets(x.float()))


def build_classifier(kind: str, *, side: int, in_channels: int, classes: int = 10, width: float = 1.0) -> nn.Module:
    """A fresh classifier: [B, in_channels, side, side] float32 -> [B, classes] scores, the largest being the answer.

    Args:
        kind: "plain" is two 5x5 convolutions of 16 and 32 filters, each with ReLU and 2x2 max-pooling, and two fully
            connected layers, 128 wide between them (section 'MNIST'); "deformable" is the same with a second
            convolution whose taps move (Dai et al., 2017); "capsnet" is `CapsNet`, whose scores are lengths; "vgg11"
            is VGG-11 with batch norm (section 'CIFAR-10'), but with the mean over all cells and one linear layer in
            the place of VGG's three large ones, as is usual at CIFAR's size.
        side: of the input, in pixels: at least 4, at least 17 for "capsnet", a multiple of 32 for "vgg11".
        in_channels: 1 for grey, 3 for RGB.
        classes: scores of the output.
        width: what the channels of "capsnet" and "vgg11" are multiplied by; the other two have none but 1.

    Raises:
        UserError: if the kind is unknown, or has no such side or width.
    """
    _check_kind(kind)
    if width <= 0 or (width != 1 and kind in ("plain", "deformable")):
        msg = f"width must be above 0 for capsnet and vgg11 and 1 for the others, got {width} for {kind}: leave it out"
        raise UserError(msg)
    if kind == "capsnet":
        return CapsNet(side=side, in_channels=in_channels, classes=classes, width=width)
    if kind == "vgg11":
        return _vgg11(side, in_channels, classes, width)
    if side < _LEAST_SIDE:
        msg = f"the side for {kind} must be at least {_LEAST_SIDE}, got {side}: use a larger canvas"
        raise UserError(msg)
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


def _vgg11(side: int, in_channels: int, classes: int, width: float) -> nn.Module:
    if side < _VGG_STRIDE or side % _VGG_STRIDE:
        msg = f"the side for vgg11 must be a multiple of {_VGG_STRIDE}, got {side}: use a canvas of such a side"
        raise UserError(msg)
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in _VGG_STAGES:
        for full in stage:
            before, channels = channels, max(_LEAST_CHANNELS, round(full * width))
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def classifier_loss(kind: str, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The margin loss of capsules' lengths for "capsnet", the cross-entropy of logits for all others.

    Args:
        kind: see `build_classifier`.
        scores: [B, classes] float, as the classifier gives them.
        labels: [B] int in 0..classes - 1.

    Returns:
        A scalar, the mean of images.

    Raises:
        UserError: if the kind is unknown, or the shapes do not fit.
    """
    _check_kind(kind)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        msg = f"scores must be [B, classes] and labels [B], got shapes {list(scores.shape)} and {list(labels.shape)}"
        raise UserError(msg)
    return margin_loss(scores, labels) if kind == "capsnet" else functional.cross_entropy(scores, labels.long())


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        msg = f"a classifier's kind must be of {', '.join(KINDS)}, got {kind}: name one of them"
        raise UserError(msg)


ROUTING_ITERATIONS = 3
"""Rounds of routing (Sabour et al., section 4)."""


_CAPSULE_KERNEL, _STRIDE = 9, 2


_CHANNELS, _TYPES = 256, 32


_PRIMARY, _DIGIT = 8, 16


_DEVIATION = 0.1


_PRESENT, _ABSENT, _ABSENT_WEIGHT = 0.9, 0.1, 0.5


def squash(vectors: torch.Tensor) -> torch.Tensor:
    """Shorten vectors of length n to n^2 / (1 + n^2), and keep where they point (Sabour et al., equation 1).

    Args:
        vectors: [..., dimensions] float; those of zeros stay, with a gradient of 0.

    Returns:
        [..., dimensions].
    """
    # Dividing by the length itself would give NaN for a vector of zeros.
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * (length / (1.0 + length**2))


def route(predictions: torch.Tensor) -> torch.Tensor:
    """Dynamic routing (Sabour et al., procedure 1): capsules send most to where others predict the same.

    Only the last round has a gradient: the shares that the earlier ones come to are constants.

    Args:
        predictions: [B, capsules, classes, dimensions] float, what each capsule below predicts of each one above.

    Returns:
        [B, classes, dimensions], the squashed capsules above.
    """
    constant = predictions.detach()
    logits = torch.zeros_like(constant[..., 0])
    for _ in range(ROUTING_ITERATIONS - 1):
        logits = logits + torch.einsum("bpcd,bcd->bpc", constant, _gathered(logits, constant))
    return _gathered(logits, predictions)


def _gathered(logits: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """[B, capsules, classes] and [B, capsules, classes, dimensions] -> [B, classes, dimensions]."""
    return squash(torch.einsum("bpc,bpcd->bcd", logits.softmax(dim=2), predictions))


class CapsNet(nn.Module):
    """A convolution, primary capsules and a capsule a class (Sabour et al., section 4).

    The decoder that reconstructs the picture is left out: the margin loss alone trains it.

    Args:
        side: of the input, in pixels.
        in_channels: 1 for grey, 3 for RGB.
        classes: capsules of the output.
        width: of the layers: 1 is the paper's 256 channels and 32 types of primary capsules.

    Raises:
        UserError: if the side leaves no primary capsule.
    """

    def __init__(self, *, side: int, in_channels: int, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        if side < 2 * _CAPSULE_KERNEL - 1:
            msg = f"a capsnet's side must be at least {2 * _CAPSULE_KERNEL - 1}, got {side}: use a larger canvas"
            raise UserError(msg)
        cells = ((side - 2 * _CAPSULE_KERNEL + 1) // _STRIDE + 1) ** 2
        channels, types = max(1, round(_CHANNELS * width)), max(1, round(_TYPES * width))
        self.features = nn.Conv2d(in_channels, channels, _CAPSULE_KERNEL)
        self.primary = nn.Conv2d(channels, types * _PRIMARY, _CAPSULE_KERNEL, stride=_STRIDE)
        self.transforms = nn.Parameter(_DEVIATION * torch.randn(types * cells, classes, _DIGIT, _PRIMARY))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, side, side] -> [B, classes], the lengths of the classes' capsules, under 1."""
        maps = self.primary(functional.relu(self.features(images)))
        capsules = squash(maps.unflatten(1, (-1, _PRIMARY)).flatten(3).transpose(2, 3).flatten(1, 2))
        return torch.linalg.vector_norm(route(torch.einsum("bpi,pcdi->bpcd", capsules, self.transforms)), dim=-1)


def margin_loss(lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared margins: 0.9 for the right class, 0.1, at half the weight, for all others (Sabour et al., equation 4).

    Args:
        lengths: [B, classes] float in 0..1.
        labels: [B] int in 0..classes - 1.

    Returns:
        A scalar: summed over classes, the mean of images.
    """
    right = functional.one_hot(labels.long(), lengths.shape[1]).bool()
    present, absent = functional.relu(_PRESENT - lengths) ** 2, functional.relu(lengths - _ABSENT) ** 2
    return torch.where(right, present, _ABSENT_WEIGHT * absent).sum(dim=1).mean()
