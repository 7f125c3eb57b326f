"""torch devices, and translation of the libraries' out-of-memory errors."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from scalenet_ray.core.errors import OutOfMemoryError, UserError, needs_extra

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_TILES_ON_GPU = 16

# Messages of torch's OutOfMemoryError, of its CPU allocator's RuntimeError, of cuBLAS and cuDNN, and of ONNX Runtime's
# arena: there is no common class.
_MESSAGE = re.compile(
    r"out of memory|can't allocate memory|failed to allocate memory|(ALLOC|ALLOCATION)_FAILED", re.IGNORECASE
)


def has_gpu_driver() -> bool:
    """True if this machine has NVIDIA's or AMD's driver; unlike torch, it costs no time or memory to ask."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def is_tensorrt(device: str) -> bool:
    """True for tensorrt and tensorrt:INDEX: a GPU on which detectors in ONNX run in TensorRT."""
    return device.partition(":")[0] == "tensorrt"


def is_gpu(device: str) -> bool:
    """True for the name of a GPU, in torch (cuda, cuda:INDEX) or in TensorRT."""
    return device.partition(":")[0] == "cuda" or is_tensorrt(device)


def batch_size_on(device: str) -> int:
    """Tiles of one image in a call of the networks on a device: on a GPU a call costs more than a tile."""
    return _TILES_ON_GPU if is_gpu(device) else 1


def device_named(name: str) -> torch.device:
    """Parse the name of a device, without checking that this machine has it.

    Raises:
        UserError: if the name is not valid in torch, or torch is not installed.
    """
    if is_tensorrt(name):
        msg = f"device {name!r} is for networks in ONNX, got one in torch: use device cuda, or export it to ONNX"
        raise UserError(msg)
    with needs_extra():
        import torch
    try:
        return torch.device(name)
    except RuntimeError as error:
        msg = f"device must be one that torch knows, such as cpu or cuda:0, got {name!r}"
        raise UserError(msg) from error


def device_on_this_machine(name: str) -> torch.device:
    """Parse the name of a device and check that this machine has it.

    Raises:
        UserError: if the name is not valid in torch, or the device is not available.
    """
    device = device_named(name)
    import torch

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


def translate_oom(call: Callable[[], T]) -> T:
    """Run a call and translate out-of-memory errors; other errors are propagated.

    Raises:
        OutOfMemoryError: if the call ran out of memory.
    """
    try:
        return call()
    except Exception as error:
        if not _is_about_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
    # Not `raise ... from error`: the traceback's frames hold the batch's tensors, whose memory a retry needs.
    raise OutOfMemoryError(reason)


def _is_about_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    of_a_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    return of_a_library and _MESSAGE.search(str(error)) is not None
