"""Which example each worker sees when: a function of seed, epoch and rank, so that a run can be taken up anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.errors import UserError

__all__ = ["Epochs", "Pick"]


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
