"""What each worker of a training run does: every step the same as all others, on its share of the batch."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from ray.util.queue import Queue
from torch import distributed, nn

from scalenet_ray.engine.train_data import BatchStream
from scalenet_ray.training.recipe import Batch, Recipe, clip_and_step, forward_backward
from scalenet_ray.training.schedule import Epochs, Training, warmup_cosine

__all__ = ["STATE_FILE", "Assignment", "make_schedule", "work"]

STATE_FILE = "state.pt"
"""In a checkpoint: what a run is taken up from."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is told.

    Attributes:
        recipe: what is trained.
        training: how.
        sizes: the recipe's, read once.
        news: takes the first worker's rows of epochs, or {"stopped": why}.
        reader_cpus: that each of its readers takes up.
    """

    recipe: Recipe
    training: Training
    sizes: tuple[int, int]
    news: Queue
    reader_cpus: float


class _StoppedError(Exception):
    """The loss is no number; on all workers at once."""


def work(config: dict[str, Any]) -> None:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        config: "assignment", an `Assignment`.
    """
    # Where Ray Train would say each report.
    logging.getLogger().setLevel(logging.WARNING)
    worker = _Worker(config["assignment"])
    try:
        worker.run()
    except _StoppedError as why:
        # Not a failure to Ray Train, which would try again what must come out the same.
        if worker.rank == 0:
            worker.news.put({"stopped": str(why)})


class _Worker:
    """One of the processes that train."""

    def __init__(self, assignment: Assignment) -> None:
        self.recipe, self.how, self.news = assignment.recipe, assignment.training, assignment.news
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.epochs = Epochs(*assignment.sizes, self.how.batch_size, self.workers, self.how.seed)
        self.stream = BatchStream(self.recipe, self.epochs, self.rank, self.how.readers, assignment.reader_cpus)
        torch.manual_seed(self.how.seed)
        self.device = get_device()
        network = self.recipe.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = prepare_model(network)
        # Without what wraps it for many workers.
        self.network: nn.Module = getattr(self.model, "module", self.model)
        learning_rate = self.how.learning_rate or self.recipe.learning_rate
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)

    def run(self) -> None:
        """All epochs that are not done yet."""
        done = _restore(self.network, self.optimizer)
        train_steps = self.epochs.train_steps
        schedule = make_schedule(self.optimizer, train_steps * self.how.epochs, train_steps * done)
        batches = self.stream.batches(done * self.epochs.steps, self.how.epochs * self.epochs.steps)
        for epoch in range(done, self.how.epochs):
            started = time.monotonic()
            failed: set[str] = set()
            loss = self._train(epoch, batches, schedule, failed)
            trained = time.monotonic()
            figures = self._validate(batches, failed)
            row = {
                "epoch": epoch + 1,
                "loss": loss,
                "learning_rate": float(schedule.get_last_lr()[0]),
                "val": figures,
                "images_per_second": train_steps * self.how.batch_size / (trained - started),
                "seconds": time.monotonic() - started,
                "failed": sorted({reason for part in self._gathered(sorted(failed)) for reason in part}),
            }
            self._report(row)

    def _train(
        self,
        epoch: int,
        batches: Iterator[tuple[dict[str, np.ndarray], list[str]]],
        schedule: torch.optim.lr_scheduler.LRScheduler,
        failed: set[str],
    ) -> float:
        """An epoch's steps; adds to `failed` why images could not be used. Returns the mean loss."""
        torch.manual_seed(int(np.random.default_rng([self.how.seed, epoch, self.rank]).integers(2**63)))
        losses = []
        self.model.train()
        for place in range(self.epochs.train_steps):
            arrays, broken = next(batches)
            failed.update(broken)
            loss = forward_backward(
                self.model,
                self._on_device(arrays),
                self.recipe.loss,
                parts=self.how.accumulate,
                mixed_precision=self.how.mixed_precision,
            )
            if self.workers > 1:
                distributed.all_reduce(loss)
                loss /= self.workers
            try:
                clip_and_step(self.model, self.optimizer, loss, self.how.clip_norm)
            except FloatingPointError as error:
                # All workers see the same mean, and stop together.
                ids = self._gathered([int(i) for i in arrays["image_id"].ravel()])
                named = ", ".join(str(i) for part in ids for i in part)
                msg = f"{error} at step {epoch * self.epochs.train_steps + place} (images {named})"
                raise _StoppedError(msg) from error
            schedule.step()
            losses.append(float(loss))
        return float(np.mean(losses))

    def _validate(self, batches: Iterator[tuple[dict[str, np.ndarray], list[str]]], failed: set[str]) -> dict[str, Any]:
        """The figures of all that is validated on, {} where there is nothing."""
        if self.workers > 1:
            # Each worker's batch norm has counted its own share; what is saved is the first one's.
            for buffer in self.network.buffers():
                distributed.broadcast(buffer, 0)
        self.network.eval()
        counts: dict[str, np.ndarray] = {}
        for _ in range(self.epochs.steps - self.epochs.train_steps):
            arrays, broken = next(batches)
            failed.update(broken)
            with torch.inference_mode():
                found = self.recipe.count(self.network, self._on_device(arrays))
            counts = {name: counts.get(name, 0) + value for name, value in found.items()}
        if not counts:
            return {}
        parts = self._gathered(counts)
        return self.recipe.figures({name: np.sum([part[name] for part in parts], axis=0) for name in counts})

    def _report(self, row: dict[str, Any]) -> None:
        """Tell Ray Train of an epoch, and those who listen; the first worker brings the checkpoint."""
        figure = row["val"].get(self.recipe.best_by, float("nan"))
        # NaN (a class that does not occur) would confuse the order of the best.
        metrics = {"epoch": row["epoch"], self.recipe.best_by: figure if np.isfinite(figure) else -1.0}
        if self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.recipe.save(self.network, os.path.join(folder, self.recipe.file_name))
            state = {
                "epoch": row["epoch"],
                "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(state, os.path.join(folder, STATE_FILE))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self.news.put(row)

    def _on_device(self, arrays: dict[str, np.ndarray]) -> Batch:
        return {name: torch.from_numpy(values).to(self.device, non_blocking=True) for name, values in arrays.items()}

    def _gathered(self, value: Any) -> list[Any]:
        """Each worker's value, on each worker."""
        if self.workers == 1:
            return [value]
        parts: list[Any] = [None] * self.workers
        distributed.all_gather_object(parts, value)
        return parts


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, done: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up over the first twentieth, at most 500 steps, then down to 0 along a cosine.

    Args:
        optimizer: its learning rate is the highest.
        steps: of the whole run.
        done: how many of them are.
    """
    warmup = min(500, max(1, steps // 20))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step + done, steps, warmup))


def _restore(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the last checkpoint, if there is one: how many epochs are done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]
