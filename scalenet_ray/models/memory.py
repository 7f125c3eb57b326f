"""What libraries raise when a batch does not fit, as the one error that the engine knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from scalenet_ray.core.errors import OutOfMemoryError

__all__ = ["saying_what_does_not_fit"]

T = TypeVar("T")

# torch's OutOfMemoryError and its CPU allocator's plain RuntimeError, cuBLAS and cuDNN through either, ONNX Runtime's
# arena: neither library has one class for them all.
_MESSAGE = re.compile(
    r"out of memory|can't allocate memory|failed to allocate memory|(ALLOC|ALLOCATION)_FAILED", re.IGNORECASE
)


def saying_what_does_not_fit(call: Callable[[], T]) -> T:
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
