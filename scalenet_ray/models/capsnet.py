"""CapsNet (Sabour, Frosst and Hinton, 2017): capsules, dynamic routing and the margin loss, without the decoder."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scalenet_ray.core.errors import UserError

__all__ = ["ROUTING_ITERATIONS", "CapsNet", "margin_loss", "route", "squash"]

ROUTING_ITERATIONS = 3
"""Rounds of routing (Sabour et al., section 4)."""

_KERNEL, _STRIDE = 9, 2
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
        if side < 2 * _KERNEL - 1:
            msg = f"a capsnet's side must be at least {2 * _KERNEL - 1}, got {side}: use a larger canvas"
            raise UserError(msg)
        cells = ((side - 2 * _KERNEL + 1) // _STRIDE + 1) ** 2
        channels, types = max(1, round(_CHANNELS * width)), max(1, round(_TYPES * width))
        self.features = nn.Conv2d(in_channels, channels, _KERNEL)
        self.primary = nn.Conv2d(channels, types * _PRIMARY, _KERNEL, stride=_STRIDE)
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
