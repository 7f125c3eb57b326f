"""How a recipe is trained: the settings that its weights depend on, and those that they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scalenet_ray.core.errors import UserError

__all__ = ["Training"]

_FREE = ("gpus_per_worker", "readers", "keep", "max_restarts")


@dataclass(frozen=True)
class Training:
    """How a recipe is trained.

    Attributes:
        workers: processes that train, each on its share of every batch.
        gpus_per_worker: 1 to train on GPUs; 0 on CPUs.
        readers: processes that make batches, for each worker.
        epochs: passes over the images.
        batch_size: images a step, of all workers together.
        accumulate: in how many parts a worker goes through its share of a batch, to save memory.
        learning_rate: of Adam, at its highest; it rises over the first steps and falls to 0 along a cosine. By
            default the recipe's own.
        clip_norm: the most that the gradients' norm may be.
        mixed_precision: compute in bfloat16 what bears it: faster on GPUs, and on CPUs that know it (AMX, AVX-512
            BF16); others imitate it, many times slower.
        seed: of the weights, of the order and of what is random in the examples.
        keep: how many of the best checkpoints stay, besides the last.
        max_restarts: how often lost workers are replaced before the run gives up.

    Raises:
        UserError: if a number leaves its range.
    """

    workers: int = 1
    gpus_per_worker: float = 0.0
    readers: int = 1
    epochs: int = 40
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float | None = None
    clip_norm: float = 10.0
    mixed_precision: bool = False
    seed: int = 0
    keep: int = 2
    max_restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "readers", "epochs", "batch_size", "accumulate", "keep"):
            if getattr(self, name) < 1:
                msg = f"{name} must be 1 or more, got {getattr(self, name)}"
                raise UserError(msg)
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                msg = f"{name} must be above 0, got {value}"
                raise UserError(msg)
        if min(self.max_restarts, self.gpus_per_worker) < 0:
            msg = f"max_restarts and gpus_per_worker must be 0 or more, got {self.max_restarts}, {self.gpus_per_worker}"
            raise UserError(msg)
        if self.batch_size % (self.workers * self.accumulate):
            parts = f"{self.workers} workers x {self.accumulate} parts"
            msg = f"batch_size must be a multiple of {parts}, got {self.batch_size}: change one of them"
            raise UserError(msg)

    def settings(self) -> dict[str, Any]:
        """What the weights depend on, by name: a run that is taken up must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def free_settings(self) -> dict[str, Any]:
        """What they do not depend on: devices, readers, what is kept, patience."""
        return {name: value for name, value in asdict(self).items() if name in _FREE}
