"""Data sets of the experiments: MNIST and CIFAR-10 as torchvision lays them out, and scikit-learn's digits."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, MNIST

from scalenet_ray.core.errors import UserError

Resampling = Literal["bicubic", "bilinear", "nearest", "bilinear-aliased"]
"""Resampling filters. The first two are Pillow's and antialiased; the others are not."""

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

_SKLEARN_SIDE = 28
_SKLEARN_TEST_EVERY = 3


class Pictures(NamedTuple):
    """Labelled images with one object each.

    Attributes:
        pixels: [N, s, s, 3] uint8; grey images have three equal channels.
        labels: [N] int64 class indices.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def part(self, which: slice) -> Pictures:
        """The images and labels of a slice."""
        return Pictures(self.pixels[which], self.labels[which])


class _UnverifiedCifar10(CIFAR10):
    """CIFAR-10 without torchvision's checksum test: files in the standard layout are read, re-encoded ones too."""

    def _check_integrity(self) -> bool:
        return all(Path(self.root, self.base_folder, name).is_file() for name, _ in (*self.train_list, *self.test_list))


def load_pictures(name: str, data: str | None, *, train: bool) -> Pictures:
    """Load a data set.

    Args:
        name: "mnist", "cifar10" or "digits".
        data: folder with MNIST/raw or cifar-10-batches-py; downloaded by torchvision if missing. Not used for "digits".
        train: load the training split, else the test split.

    Raises:
        UserError: if the data set needs a folder and none is given.
        RuntimeError: if the files are missing and the download fails.
    """
    if name == "digits":
        return _sklearn_digits(train)
    if data is None:
        msg = f"{name} needs --data, the folder that holds it or that it is fetched into, got none"
        raise UserError(msg)
    if name == "mnist":
        mnist = _mnist(data, train)
        return Pictures(np.repeat(mnist.data.numpy()[..., None], 3, axis=3), mnist.targets.numpy().astype(np.int64))
    cifar = _UnverifiedCifar10(data, train=train, download=not Path(data, CIFAR10.base_folder).is_dir())
    return Pictures(cifar.data, np.array(cifar.targets, np.int64))


def _mnist(data: str, train: bool) -> MNIST:
    """Load MNIST. Compressed files are unpacked into a temporary folder, since `data` may be read-only."""
    raw = Path(data, "MNIST", "raw")
    packed = sorted(raw.glob("*-ubyte.gz"))
    if not packed or any(raw.glob("*-ubyte")):
        return MNIST(data, train=train, download=True)
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(folder, "MNIST", "raw")
        copies.mkdir(parents=True)
        for file in packed:
            shutil.copy(file, copies)
        return MNIST(folder, train=train, download=True)


def _sklearn_digits(train: bool) -> Pictures:
    """Load scikit-learn's digits at 28 x 28; every third is a test image, as the file is sorted by writer."""
    digits: Any = load_digits()
    is_test = np.arange(len(digits.target)) % _SKLEARN_TEST_EVERY == 0
    chosen = np.flatnonzero(is_test != train)
    small = np.repeat((digits.images[chosen] * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    pixels = np.stack([resized(picture, _SKLEARN_SIDE) for picture in small])
    return Pictures(pixels, digits.target[chosen].astype(np.int64))


def resized(picture: np.ndarray, side: int, method: Resampling = "bicubic") -> np.ndarray:
    """Resample a square image [s, s, 3] uint8 to [side, side, 3]; returns the input itself if it has that size."""
    if picture.shape[:2] == (side, side):
        return picture
    if method == "bilinear-aliased":
        return cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)
    return np.asarray(Image.fromarray(picture).resize((side, side), _PILLOW[method]))


def centred(picture: np.ndarray, side: int) -> np.ndarray:
    """Pad a square image [s, s, 3] uint8 with black to a canvas [side, side, 3], or crop its middle if it is larger.

    If s and `side` differ by an odd number, the centre is off by half a pixel.
    """
    have = picture.shape[0]
    if have >= side:
        start = (have - side) // 2
        return picture[start : start + side, start : start + side]
    canvas = np.zeros((side, side, picture.shape[2]), np.uint8)
    start = (side - have) // 2
    canvas[start : start + have, start : start + have] = picture
    return canvas
