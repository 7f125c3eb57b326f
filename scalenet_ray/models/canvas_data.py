"""The data sets of the experiments on canvases: MNIST and CIFAR-10 by torchvision, scikit-learn's digits anywhere."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, MNIST

from scalenet_ray.core.canvases import resized
from scalenet_ray.core.errors import UserError

__all__ = ["Pictures", "load_pictures"]

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
