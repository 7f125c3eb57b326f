"""Devices that networks run on, and out-of-memory errors of the libraries."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from scalenet_ray.core.errors import OutOfMemoryError, UserError

__all__ = [
    "device_named",
    "device_on_this_machine",
    "translate_oom",
]


def device_named(name: str) -> torch.device:
    """A device that some machine may have.

    Raises:
        UserError: if torch knows none of that name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        msg = f"device must be one that torch knows, such as cpu or cuda:0, got {name!r}"
        raise UserError(msg) from error


def device_on_this_machine(name: str) -> torch.device:
    """A device that this machine has.

    Raises:
        UserError: if torch knows none of that name, or finds none here.
    """
    device = device_named(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"device {name!r} was wanted, torch finds {torch.cuda.device_count()} CUDA devices: use device cpu"
        raise UserError(msg)
    if device.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(1, device=device)
        except Exception as error:
            why = str(error).partition("\n")[0]
            msg = f"device {name!r} was wanted, torch cannot use it on this machine: {why}; use device cpu"
            raise UserError(msg) from error
    return device


T = TypeVar("T")


# torch's OutOfMemoryError and its CPU allocator's plain RuntimeError, cuBLAS and cuDNN through either, ONNX Runtime's
# arena: neither library has one class for them all.
_MESSAGE = re.compile(
    r"out of memory|can't allocate memory|failed to allocate memory|(ALLOC|ALLOCATION)_FAILED", re.IGNORECASE
)


def translate_oom(call: Callable[[], T]) -> T:
    """Call a network.

    Raises:
        OutOfMemoryError: if its batch does not fit the device's memory; any other error is let through.
    """
    try:
        return call()
    except Exception as error:
        if not _is_about_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
    # Not `raise ... from error`: the error's frames hold the batch's tensors, and the next try needs their room.
    raise OutOfMemoryError(reason)


def _is_about_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    of_a_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    return of_a_library and _MESSAGE.search(str(error)) is not None
