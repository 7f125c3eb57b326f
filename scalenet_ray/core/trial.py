"""Result of a short trial of a run's networks on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NetworkTrial", "TrialCall"]


class TrialCall(NamedTuple):
    """A call of the networks.

    Attributes:
        tiles: tiles of the batch.
        seconds: duration.
        device_bytes: memory in use on the GPU after it, the networks included; 0 on a CPU.
    """

    tiles: int
    seconds: float
    device_bytes: int = 0


@dataclass(frozen=True)
class NetworkTrial:
    """Result of a trial.

    Attributes:
        device: the device, cpu or cuda.
        calls: calls with growing batches, one at least.
        read_seconds: seconds to read an image and cut its tile.
        process_bytes: peak resident memory of the process.
        gpu_bytes: memory of the GPU; 0 on a CPU.
    """

    device: str
    calls: tuple[TrialCall, ...]
    read_seconds: float = 0.0
    process_bytes: int = 0
    gpu_bytes: int = 0
