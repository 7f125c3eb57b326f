"""A batch that does not fit a device's memory is halved until it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from scalenet_ray.core.errors import OutOfMemoryError, TileError

__all__ = ["BATCH_HALVED", "in_halves"]

T = TypeVar("T")

BATCH_HALVED = "batch_halved"
"""The mark of it, counted with the limits that acted: on the first tile of each batch that was halved."""

_log = logging.getLogger(__name__)


def in_halves(call: Callable[[slice], Sequence[T]], count: int) -> tuple[list[T | TileError], list[int]]:
    """Call a network on a batch, and on its halves if the batch does not fit, and so on.

    Args:
        call: a slice of the batch -> an answer for each tile; raises `OutOfMemoryError` if it does not fit.
        count: tiles of the batch.

    Returns:
        The answers in order, a `TileError` for a tile that does not fit even alone; and where batches began that were
        halved, once for each.
    """
    waiting = [slice(0, count)] if count else []
    answers: list[T | TileError] = []
    halved: list[int] = []
    while waiting:
        some = waiting.pop()
        try:
            answers += call(some)
            continue
        except OutOfMemoryError as error:
            reason = str(error)
        # Not while the error is handled: it would keep alive what the call had on the device.
        tiles = some.stop - some.start
        if tiles == 1:
            remedy = "give a smaller max_tile_pixels or input side, a device with more memory, or fewer actors to it"
            answers.append(TileError(f"this tile does not fit the device's memory even alone: {remedy} ({reason})"))
            continue
        middle = some.start + tiles // 2
        waiting += [slice(middle, some.stop), slice(some.start, middle)]
        halved.append(some.start)
        _log.warning("a batch of %d tiles does not fit the device's memory and is halved: %s", tiles, reason)
    return answers, halved
