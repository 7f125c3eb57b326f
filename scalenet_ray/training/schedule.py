"""Training settings, the order of the examples, and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

from scalenet_ray.core.bounds import ABOVE_ZERO, ONE_OR_MORE
from scalenet_ray.core.errors import UserError

_FREE = ("gpus_per_worker", "readers", "keep", "max_restarts")


@dataclass(frozen=True)
class Training:
    """Training settings.

    Attributes:
        workers: number of training processes, each with an equal share of every batch.
        gpus_per_worker: GPUs per training process; 0 to train on CPUs.
        readers: data loading processes per worker.
        epochs: passes over the images.
        batch_size: images per step, over all workers.
        accumulate: gradient accumulation steps per batch, to save memory.
        learning_rate: Adam's peak learning rate, with linear warm-up and cosine decay to 0. By default the recipe's.
        clip_norm: maximum norm of the gradients.
        mixed_precision: run under bfloat16 autocast: faster on GPUs and on CPUs with AMX or AVX-512 BF16, many times
            slower on other CPUs.
        seed: seed of the weights, the order and the augmentation.
        keep: number of best checkpoints to keep besides the last.
        max_restarts: number of times that lost workers are replaced before the run fails.

    Raises:
        UserError: if a batch can't be shared out.
    """

    workers: Annotated[int, ONE_OR_MORE] = 1
    gpus_per_worker: float = 0.0
    readers: Annotated[int, ONE_OR_MORE] = 1
    epochs: Annotated[int, ONE_OR_MORE] = 40
    batch_size: Annotated[int, ONE_OR_MORE] = 16
    accumulate: Annotated[int, ONE_OR_MORE] = 1
    learning_rate: Annotated[float, ABOVE_ZERO] | None = None
    clip_norm: Annotated[float, ABOVE_ZERO] = 10.0
    mixed_precision: bool = False
    seed: int = 0
    keep: Annotated[int, ONE_OR_MORE] = 2
    max_restarts: int = 3

    def __post_init__(self) -> None:
        if self.batch_size % max(1, self.workers * self.accumulate):
            parts = f"{self.workers} workers x {self.accumulate} parts"
            msg = f"batch_size must be a multiple of {parts}, got {self.batch_size}: change one of them"
            raise UserError(msg)

    def settings(self) -> dict[str, Any]:
        """Settings that the weights depend on; they must be the same when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def free_settings(self) -> dict[str, Any]:
        """Settings that the weights do not depend on; they may change when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name in _FREE}


class Pick(NamedTuple):
    """Index of an example and its epoch: a training example, or a validation example if `epoch` is None."""

    example: int
    epoch: int | None


@dataclass(frozen=True)
class Epochs:
    """Sampler of a distributed training run: each epoch has its training batches, then its validation batches.

    Training examples are reshuffled each epoch, and the last incomplete batch is dropped. Every worker gets the same
    number of batches of the same size; the last validation batch is filled up with None.

    Attributes:
        train: number of training examples.
        validation: number of validation examples.
        batch_size: examples per step, over all workers; a multiple of their number.

    Raises:
        UserError: if there is no training example.
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

    @property
    def share(self) -> int:
        """Examples per batch and worker."""
        return self.batch_size // self.workers

    @property
    def train_steps(self) -> int:
        """Training batches per epoch."""
        return max(1, self.train // self.batch_size)

    @property
    def steps(self) -> int:
        """Training and validation batches per epoch."""
        return self.train_steps + math.ceil(self.validation / self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """[train] int64, the order of the training examples in an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.train)

    def picks(self, step: int, rank: int) -> list[Pick | None]:
        """`share` examples of a worker's batch, by its number from the start of the run; None for padding."""
        epoch, place = divmod(step, self.steps)
        if place < self.train_steps:
            order = self.order(epoch)
            first = place * self.batch_size + rank * self.share
            # A data set smaller than a batch is repeated.
            return [Pick(int(order[(first + i) % self.train]), epoch) for i in range(self.share)]
        first = (place - self.train_steps) * self.batch_size + rank * self.share
        return [Pick(i, None) if i < self.validation else None for i in range(first, first + self.share)]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor at a step from 0: linear warm-up to 1 in `warmup` steps, at least 1, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + float(np.cos(np.pi * progress)))
