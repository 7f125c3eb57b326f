"""The data sets of the experiments on canvases: MNIST and CIFAR-10 by torchvision, scikit-learn's digits anywhere."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, MNIST

from scalenet_ray.core.errors import UserError

__all__ = [
    "Pictures",
    "Resampling",
    "centred",
    "load_pictures",
    "resized",
]

_ENLARGED = 28


_TEST_SHARE = 3


class Pictures(NamedTuple):
    """Pictures with one object each.

    Attributes:
        pixels: [N, s, s, 3] uint8; grey in all three channels.
        labels: [N] int64, the class of each.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def part(self, which: slice) -> Pictures:
        """Some of them."""
        return Pictures(self.pixels[which], self.labels[which])


class _RewrittenCifar(CIFAR10):
    """CIFAR-10 in its standard files, which need not hold the published bytes: rewritten ones are read as well."""

    def _check_integrity(self) -> bool:
        return all(Path(self.root, self.base_folder, name).is_file() for name, _ in (*self.train_list, *self.test_list))


def load_pictures(name: str, data: str | None, *, train: bool) -> Pictures:
    """The pictures of a data set.

    Args:
        name: "mnist", "cifar10" or "digits".
        data: folder with MNIST/raw or cifar-10-batches-py, as torchvision lays them out; what is missing is
            fetched by torchvision where there is a network. "digits" needs none.
        train: those to learn from, else those to test on.

    Raises:
        UserError: if there is no such data set, or no folder for one that needs it.
        RuntimeError: if its files are not there and cannot be fetched.
    """
    if name == "digits":
        return _sklearn_digits(train)
    if name not in ("mnist", "cifar10"):
        msg = f"the data must be mnist, cifar10 or digits, got {name!r}"
        raise UserError(msg)
    if data is None:
        msg = f"{name} needs --data, the folder that holds it or that it is fetched into, got none"
        raise UserError(msg)
    if name == "mnist":
        mnist = _mnist(data, train)
        return Pictures(np.repeat(mnist.data.numpy()[..., None], 3, axis=3), mnist.targets.numpy().astype(np.int64))
    # What is there is not fetched anew.
    cifar = _RewrittenCifar(data, train=train, download=not Path(data, CIFAR10.base_folder).is_dir())
    return Pictures(cifar.data, np.array(cifar.targets, np.int64))


def _mnist(data: str, train: bool) -> MNIST:
    """MNIST, fetched if it is not there; packed files are unpacked elsewhere, since the folder may be another's."""
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
    """Every third one tests: the set's writers come one after the other."""
    digits: Any = load_digits()
    is_test = np.arange(len(digits.target)) % _TEST_SHARE == 0
    kept = np.flatnonzero(is_test != train)
    small = np.repeat((digits.images[kept] * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    return Pictures(np.stack([resized(one, _ENLARGED) for one in small]), digits.target[kept].astype(np.int64))


Resampling = Literal["bicubic", "bilinear", "area", "nearest", "bicubic-aliased", "bilinear-aliased"]
"""How pictures change their size. Pillow's first three see every pixel when they shrink; the others skip some."""


_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


_OPENCV = {"bicubic-aliased": cv2.INTER_CUBIC, "bilinear-aliased": cv2.INTER_LINEAR}


def resized(picture: np.ndarray, side: int, method: Resampling = "bicubic") -> np.ndarray:
    """A square picture at another size.

    Args:
        picture: [s, s, 3] uint8.
        side: pixels along each side of the result.
        method: how.

    Returns:
        [side, side, 3] uint8; the picture itself if it has that size.

    Raises:
        ValueError: if there is no such method, or no pixel would be left.
    """
    if method not in get_args(Resampling):
        msg = f"resampling must be one of {', '.join(get_args(Resampling))}, got {method!r}"
        raise ValueError(msg)
    if side < 1:
        msg = f"a canvas must have a side of 1 pixel or more, got {side}"
        raise ValueError(msg)
    if picture.shape[:2] == (side, side):
        return picture
    if method in _OPENCV:
        return cv2.resize(picture, (side, side), interpolation=_OPENCV[method])
    return np.asarray(Image.fromarray(picture).resize((side, side), _PILLOW[method]))


def centred(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture in the middle of a black canvas, or the middle of it where it is larger.

    Args:
        picture: [s, s, 3] uint8. Where s and `side` differ by an odd number, the middle is half a pixel off.
        side: pixels along each side of the canvas.

    Returns:
        [side, side, 3] uint8.
    """
    have = picture.shape[0]
    if have >= side:
        start = (have - side) // 2
        return picture[start : start + side, start : start + side]
    canvas = np.zeros((side, side, picture.shape[2]), np.uint8)
    start = (side - have) // 2
    canvas[start : start + have, start : start + have] = picture
    return canvas
