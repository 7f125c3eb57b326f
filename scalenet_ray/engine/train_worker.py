"""Training loop of a Ray Train worker: data-parallel steps on its share of each batch, and the batches.

The content of a batch depends on seed, epoch and rank alone. Ray Data tasks make batches in order and prefetch a few.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import DataContext
from ray.train.torch import get_device, prepare_model
from ray.util.queue import Queue
from safetensors.numpy import load, save
from torch import distributed, nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.engine.rows import GeneratorSource
from scalenet_ray.training.recipe import Batch, Recipe, Row, clip_and_step, forward_backward
from scalenet_ray.training.schedule import Epochs, Pick, Training, warmup_cosine

STATE_FILE = "state.pt"
"""Optimizer and model state in a checkpoint, from which a run is resumed."""


@dataclass(frozen=True)
class Assignment:
    """Arguments of a worker.

    Attributes:
        recipe: the network, its examples and its loss.
        training: epochs, batch size, workers and optimizer settings.
        sizes: the recipe's numbers of training and validation examples.
        events: receives the first worker's row of each epoch, or {"stopped": reason}.
        reader_cpus: CPUs of each of the worker's readers.
    """

    recipe: Recipe
    training: Training
    sizes: tuple[int, int]
    events: Queue
    reader_cpus: float


class _StoppedError(Exception):
    """The loss is NaN or infinite; raised on all workers."""


def work(config: dict[str, Any]) -> None:
    """Train all epochs, from the last checkpoint if there is one.

    Args:
        config: "assignment", an `Assignment`.
    """
    # Ray Train logs each report at level INFO.
    logging.getLogger().setLevel(logging.WARNING)
    worker = _Worker(config["assignment"])
    try:
        worker.run()
    except _StoppedError as error:
        # Not raised: Ray Train would retry, with the same result.
        if worker.rank == 0:
            worker.events.put({"stopped": str(error)})


class _Worker:
    """State of a worker: model, optimizer and input."""

    def __init__(self, assignment: Assignment) -> None:
        self.recipe, self.training, self.events = assignment.recipe, assignment.training, assignment.events
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.epochs = Epochs(*assignment.sizes, self.training.batch_size, self.workers, self.training.seed)
        self.stream = BatchStream(self.recipe, self.epochs, self.rank, self.training.readers, assignment.reader_cpus)
        torch.manual_seed(self.training.seed)
        self.device = get_device()
        network = self.recipe.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = prepare_model(network)
        # Without the DistributedDataParallel wrapper.
        self.network: nn.Module = getattr(self.model, "module", self.model)
        learning_rate = self.training.learning_rate or self.recipe.learning_rate
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)

    def run(self) -> None:
        """Train the remaining epochs."""
        done = _restore(self.network, self.optimizer)
        train_steps = self.epochs.train_steps
        schedule = make_schedule(self.optimizer, train_steps * self.training.epochs, train_steps * done)
        batches = self.stream.batches(done * self.epochs.steps, self.training.epochs * self.epochs.steps)
        for epoch in range(done, self.training.epochs):
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
                "images_per_second": train_steps * self.training.batch_size / (trained - started),
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
        """Train one epoch and return the mean loss; reasons of unusable images are added to `failed`."""
        torch.manual_seed(int(np.random.default_rng([self.training.seed, epoch, self.rank]).integers(2**63)))
        losses = []
        self.model.train()
        for step in range(self.epochs.train_steps):
            arrays, broken = next(batches)
            failed.update(broken)
            loss = forward_backward(
                self.model,
                self._on_device(arrays),
                self.recipe.loss,
                parts=self.training.accumulate,
                mixed_precision=self.training.mixed_precision,
            )
            if self.workers > 1:
                distributed.all_reduce(loss)
                loss /= self.workers
            try:
                clip_and_step(self.model, self.optimizer, loss, self.training.clip_norm)
            except FloatingPointError as error:
                # The loss is the mean over all workers, so that all of them stop.
                ids = self._gathered([int(i) for i in arrays["image_id"].ravel()])
                named = ", ".join(str(i) for part in ids for i in part)
                msg = f"{error} at step {epoch * self.epochs.train_steps + step} (images {named})"
                raise _StoppedError(msg) from error
            schedule.step()
            losses.append(float(loss))
        return float(np.mean(losses))

    def _validate(self, batches: Iterator[tuple[dict[str, np.ndarray], list[str]]], failed: set[str]) -> dict[str, Any]:
        """Compute the metrics over all validation examples; {} if there are none."""
        if self.workers > 1:
            # Batch norm statistics differ between workers; the checkpoint holds the first worker's.
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
        """Report an epoch to Ray Train and to the driver; the first worker adds the checkpoint."""
        figure = row["val"].get(self.recipe.best_by, float("nan"))
        # NaN, the metric of a class without examples, would break the order of checkpoints.
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
        self.events.put(row)

    def _on_device(self, arrays: dict[str, np.ndarray]) -> Batch:
        return {name: torch.from_numpy(values).to(self.device, non_blocking=True) for name, values in arrays.items()}

    def _gathered(self, value: Any) -> list[Any]:
        """Gather the values of all workers on each worker."""
        if self.workers == 1:
            return [value]
        parts: list[Any] = [None] * self.workers
        distributed.all_gather_object(parts, value)
        return parts


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, done: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over the first 5 % of the steps, at most 500, then cosine decay to 0.

    Args:
        optimizer: its learning rate is the maximum.
        steps: number of steps of the run.
        done: number of steps done before.
    """
    warmup = min(500, max(1, steps // 20))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step + done, steps, warmup))


def _restore(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, if there is one, and return its number of epochs."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


def make_batch(recipe: Recipe, picks: list[Pick | None]) -> pa.Table:
    """Make a batch, packed as one row: "batch" (its arrays, as safetensors) and "failed" (reasons, as JSON).

    An example whose image cannot be used is replaced by a blank one, with the reason in "failed".
    """
    rows: list[Row] = []
    failed: list[str] = []
    for pick in picks:
        try:
            if pick is None:
                rows.append(recipe.blank())
            elif pick.epoch is None:
                rows.append(recipe.validation_example(pick.example))
            else:
                rows.append(recipe.example(pick.example, pick.epoch))
        except TileError as error:
            rows.append(recipe.blank())
            failed.append(error.reason)
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return pa.table({"batch": pa.array([save(arrays)], pa.large_binary()), "failed": [json.dumps(failed)]})


def read_batch(table: pa.Table) -> tuple[dict[str, np.ndarray], list[str]]:
    """Unpack a batch of `make_batch`: arrays by name, [examples, ...] each, and the reasons of failed examples."""
    return load(table["batch"][0].as_py()), json.loads(table["failed"][0].as_py())


class _BatchSource(GeneratorSource):
    """Datasource of one reader, with a row per step of `steps`."""

    def __init__(self, recipe: Recipe, epochs: Epochs, rank: int, steps: range) -> None:
        super().__init__()
        self._recipe, self._epochs, self._rank, self._steps = recipe, epochs, rank, steps

    def read(self, reader: int) -> Iterator[pa.Table]:
        """Yield the batches; there is a single reader."""
        del reader
        for step in self._steps:
            yield make_batch(self._recipe, self._epochs.picks(step, self._rank))


@dataclass(frozen=True)
class BatchStream:
    """Batches of a worker, made by several readers in turn.

    Attributes:
        recipe: makes the examples.
        epochs: selects the examples of each batch.
        rank: the worker's rank.
        readers: number of read tasks.
        cpus: CPUs of each read task.
    """

    recipe: Recipe
    epochs: Epochs
    rank: int
    readers: int
    cpus: float

    def batches(self, first: int, last: int) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
        """Iterate over the batches of the steps `first` to `last - 1`, as `read_batch` returns them."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Emit every batch at once.
        context.target_max_block_size = 1
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns about disabled progress bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        streams = [self._stream(range(first + i, last, self.readers)) for i in range(min(self.readers, last - first))]
        for step in range(last - first):
            yield read_batch(next(streams[step % len(streams)]))

    def _stream(self, steps: range) -> Iterator[pa.Table]:
        source = _BatchSource(self.recipe, self.epochs, self.rank, steps)
        dataset = ray.data.read_datasource(source, num_cpus=self.cpus, override_num_blocks=1)
        return iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
