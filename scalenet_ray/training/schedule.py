"""Training settings, the order of the examples, and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from scalenet_ray.core.errors import UserError

__all__ = [
    "Epochs",
    "Pick",
    "Training",
    "warmup_cosine",
]

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


class Pick(NamedTuple):
    """An example to make: of the training ones in `epoch`, or, where that is None, of those to validate on."""

    example: int
    epoch: int | None


@dataclass(frozen=True)
class Epochs:
    """The batches of a training run, for each worker: epoch after epoch, training batches, then validation's.

    Each epoch goes through the training examples in an order of its own; what does not fill a batch is left out
    of that epoch. All workers have equally many batches of one size: where the examples to validate on run
    out, places stay empty.

    Attributes:
        train: how many training examples.
        validation: how many to validate on.
        batch_size: examples a step, of all workers together.
        workers: how many.
        seed: of the orders.

    Raises:
        UserError: if there is nothing to train on, or the batch cannot be shared out.
    """

    train: int
    validation: int
    batch_size: int
    workers: int
    seed: int

    def __post_init__(self) -> None:
        if self.train < 1:
            msg = f"training wants at least one image, got {self.train}: check the split and the limit"
            raise UserError(msg)
        if self.batch_size < 1 or self.batch_size % self.workers:
            msg = f"batch_size must be a multiple of the workers, got {self.batch_size} for {self.workers}"
            raise UserError(msg)

    @property
    def share(self) -> int:
        """Examples of a batch that are one worker's."""
        return self.batch_size // self.workers

    @property
    def train_steps(self) -> int:
        """Training batches of an epoch."""
        return max(1, self.train // self.batch_size)

    @property
    def steps(self) -> int:
        """All batches of an epoch."""
        return self.train_steps + math.ceil(self.validation / self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """[train] int64, the training examples as that epoch takes them."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.train)

    def picks(self, step: int, rank: int) -> list[Pick | None]:
        """The examples of a worker's batch.

        Args:
            step: counted from the first of the run; `step % steps` is its place in its epoch.
            rank: the worker's.

        Returns:
            `share` picks; None for a place that stays empty.
        """
        epoch, place = divmod(step, self.steps)
        if place < self.train_steps:
            order = self.order(epoch)
            first = place * self.batch_size + rank * self.share
            # A set smaller than a batch is gone through more than once.
            return [Pick(int(order[(first + i) % self.train]), epoch) for i in range(self.share)]
        first = (place - self.train_steps) * self.batch_size + rank * self.share
        return [Pick(i, None) if i < self.validation else None for i in range(first, first + self.share)]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor: linear warm-up to 1, then cosine decay to 0.

    Args:
        step: current step, from 0.
        steps: number of steps of the run.
        warmup: number of warm-up steps, at least 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + float(np.cos(np.pi * progress)))
