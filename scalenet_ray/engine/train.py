"""Training on Ray Train: any number of workers, each fed by Ray Data, checkpoints in the run folder, resumable.

Each worker has readers of its own: Ray Data streams whose only task makes that worker's batches in order. What
a step sees depends on seed, epoch and rank alone, so that a run taken up at an epoch ends as if it had never
stopped. Nothing holds the data set: a reader makes a few batches ahead.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue
from safetensors.numpy import load, save
from torch import distributed, nn

from scalenet_ray.core import storage
from scalenet_ray.core.errors import TileError
from scalenet_ray.engine.epochs import Epochs, Pick
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.shares import cpu_share
from scalenet_ray.models.recipe import Batch, Recipe, Row, clip_and_step, forward_backward

__all__ = ["Training", "train"]

CHECKPOINTS = "checkpoints"
"""Where a run folder has them."""


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
        mixed_precision: compute in bfloat16 what bears it.
        seed: of the weights, of the order and of what is random in the examples.
        keep: how many of the best checkpoints stay, besides the last.
        max_restarts: how often lost workers are replaced before the run gives up.

    Raises:
        ValueError: if a number leaves its range.
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
                raise ValueError(msg)
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                msg = f"{name} must be above 0, got {value}"
                raise ValueError(msg)
        if min(self.max_restarts, self.gpus_per_worker) < 0:
            msg = f"max_restarts and gpus_per_worker must be 0 or more, got {self.max_restarts}, {self.gpus_per_worker}"
            raise ValueError(msg)
        if self.batch_size % (self.workers * self.accumulate):
            parts = f"{self.workers} workers x {self.accumulate} parts"
            msg = f"batch_size must be a multiple of {parts}, got {self.batch_size}: change one of them"
            raise ValueError(msg)


# --- what a worker is fed ---------------------------------------------------------------------------


class _Batches(Datasource):
    """One generator task that makes every `stride`-th batch of a worker, packed as a row each."""

    def __init__(self, recipe: Recipe, epochs: Epochs, rank: int, steps: range) -> None:
        super().__init__()
        self._recipe, self._epochs, self._rank, self._steps = recipe, epochs, rank, steps

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """The one task, whatever `parallelism` Ray Data would like."""
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, metadata)]

    def _read(self) -> Iterator[pa.Table]:
        for step in self._steps:
            yield make_batch(self._recipe, self._epochs.picks(step, self._rank))


def make_batch(recipe: Recipe, picks: list[Pick | None]) -> pa.Table:
    """The examples of a batch, packed as one row: "batch", its arrays as safetensors, and "failed", JSON.

    An example whose image cannot be used is left blank: it costs itself alone, and "failed" says why.
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


def _stream(
    recipe: Recipe, epochs: Epochs, rank: int, first: int, last: int, readers: int, cpus: float
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """A worker's batches from step `first` on, in order, made by `readers` tasks in turn."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Every batch leaves as soon as it is made.
    context.target_max_block_size = 1
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that there are no progress bars.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    streams = []
    for reader in range(min(readers, last - first)):
        source = _Batches(recipe, epochs, rank, range(first + reader, last, readers))
        dataset = ray.data.read_datasource(source, num_cpus=cpus, override_num_blocks=1)
        streams.append(iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1)))
    for step in range(last - first):
        row = next(streams[step % len(streams)])
        yield load(row["batch"][0].as_py()), json.loads(row["failed"][0].as_py())


# --- a worker ---------------------------------------------------------------------------------------


def _work(config: dict[str, Any]) -> None:
    """What each worker does: every step the same as all others, on its share of the batch."""
    recipe: Recipe = config["recipe"]
    how: Training = config["training"]
    news: Queue = config["news"]
    # Where Ray Train would say each report.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    train_images, val_images = config["sizes"]
    epochs = Epochs(train_images, val_images, how.batch_size, workers, how.seed)

    torch.manual_seed(how.seed)
    device = get_device()
    network = recipe.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = prepare_model(network)
    network = getattr(model, "module", model)
    optimizer = torch.optim.Adam(model.parameters(), lr=how.learning_rate or recipe.learning_rate)
    begin = _restore(network, optimizer)
    schedule = _schedule(optimizer, epochs.train_steps * how.epochs, epochs.train_steps * begin)

    steps = epochs.steps
    stream = _stream(recipe, epochs, rank, begin * steps, how.epochs * steps, how.readers, config["cpus"])
    for epoch in range(begin, how.epochs):
        started = time.monotonic()
        torch.manual_seed(int(np.random.default_rng([how.seed, epoch, rank]).integers(2**63)))
        failed: set[str] = set()
        losses = []
        model.train()
        for place in range(epochs.train_steps):
            arrays, broken = next(stream)
            failed.update(broken)
            batch = _on_device(arrays, device)
            loss = forward_backward(
                model, batch, recipe.loss, parts=how.accumulate, mixed_precision=how.mixed_precision
            )
            loss = _mean_over_workers(loss, workers)
            try:
                clip_and_step(model, optimizer, loss, how.clip_norm)
            except FloatingPointError as error:
                # All workers see the same mean, and stop together.
                ids = _gathered([int(i) for i in arrays["image_id"].ravel()], workers)
                if rank == 0:
                    named = ", ".join(str(i) for part in ids for i in part)
                    step = epoch * epochs.train_steps + place
                    news.put({"stopped": f"{error} at step {step} (images {named})"})
                return
            schedule.step()
            losses.append(float(loss))
        trained = time.monotonic()
        counts: dict[str, np.ndarray] = {}
        if workers > 1:
            # Each worker's batch norm has counted its own share; what is saved is the first one's.
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)
        network.eval()
        for _ in range(steps - epochs.train_steps):
            arrays, broken = next(stream)
            failed.update(broken)
            with torch.inference_mode():
                found = recipe.count(network, _on_device(arrays, device))
            counts = {name: counts.get(name, 0) + value for name, value in found.items()}
        row = {
            "epoch": epoch + 1,
            "loss": float(np.mean(losses)),
            "val": recipe.figures(_summed(counts, workers)) if counts else {},
            "images_per_second": epochs.train_steps * how.batch_size / (trained - started),
            "seconds": time.monotonic() - started,
            "failed": sorted({reason for part in _gathered(sorted(failed), workers) for reason in part}),
        }
        _report(recipe, network, optimizer, row, rank)
        if rank == 0:
            news.put(row)


def _schedule(optimizer: torch.optim.Optimizer, steps: int, done: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up over the first twentieth, at most 500 steps, then down to 0 along a cosine."""
    rise = min(500, max(1, steps // 20))

    def factor(step: int) -> float:
        step += done
        fallen = (step - rise) / max(1, steps - rise)
        return (step + 1) / rise if step < rise else 0.5 * (1.0 + float(np.cos(np.pi * fallen)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _on_device(arrays: dict[str, np.ndarray], device: torch.device) -> Batch:
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in arrays.items()}


def _mean_over_workers(value: torch.Tensor, workers: int) -> torch.Tensor:
    if workers > 1:
        distributed.all_reduce(value)
        value /= workers
    return value


def _gathered(value: Any, workers: int) -> list[Any]:
    """Each worker's value, on each worker."""
    if workers == 1:
        return [value]
    parts: list[Any] = [None] * workers
    distributed.all_gather_object(parts, value)
    return parts


def _summed(counts: dict[str, np.ndarray], workers: int) -> dict[str, np.ndarray]:
    parts = _gathered(counts, workers)
    return {name: np.sum([part[name] for part in parts], axis=0) for name in counts}


def _report(recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer, row: dict, rank: int) -> None:
    """Tell Ray Train of an epoch; the first worker brings the checkpoint."""
    figure = row["val"].get(recipe.best_by, float("nan"))
    # NaN (a class that does not occur) would confuse the order of the best.
    metrics = {"epoch": row["epoch"], recipe.best_by: figure if np.isfinite(figure) else -1.0}
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe.save(network, os.path.join(folder, recipe.file_name))
        state = {"epoch": row["epoch"], "model": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, os.path.join(folder, "state.pt"))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the last checkpoint, if there is one: how many epochs are done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


# --- the driver -------------------------------------------------------------------------------------


def train(recipe: Recipe, training: Training, folder: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Train to the end, or from where the run in `folder` stopped.

    Args:
        recipe: what is trained.
        training: how.
        folder: the run folder, local or s3://; gets checkpoints/ and, at the end, the recipe's file.
        report: called with each epoch's row as it ends: "epoch" from 1, "loss", "val" (the recipe's figures),
            "images_per_second", "seconds", "failed" (reasons of images that could not be used).

    Raises:
        ValueError: if there is nothing to train on, or the loss is NaN or infinite; it names step and images.
        RuntimeError: if the workers were lost too often, or a checkpoint could not be written.
    """
    join_ray()
    # Else workers go to a folder of their own, and relative paths of a recipe lead nowhere.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    sizes = recipe.sizes()
    Epochs(*sizes, training.batch_size, training.workers, training.seed)
    cpus = cpu_share(training.workers * (1 + training.readers))
    resources = {"CPU": cpus} | ({"GPU": training.gpus_per_worker} if training.gpus_per_worker else {})
    file_system, path = storage.as_arrow(folder)
    news = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": recipe, "training": training, "sizes": sizes, "news": news, "cpus": cpus},
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=training.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=training.max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep, checkpoint_score_attribute=recipe.best_by),
            logging_config=LoggingConfig("WARNING"),
        ),
    )
    with _listening(news, report) as stopped:
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            # The exception alone: before it Ray tells where it passed.
            cause = str(error).strip().splitlines()[-1]
            msg = f"training stopped: {cause}; the last checkpoint is in {folder}: mend it and add --resume"
            raise RuntimeError(msg) from error
    if stopped:
        msg = f"{stopped[0]}: lower the learning rate or look at these"
        raise ValueError(msg)
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as last:
        content = Path(last, recipe.file_name).read_bytes()
    storage.write_bytes_atomic(storage.join(folder, recipe.file_name), content)


@contextmanager
def _listening(news: Queue, report: Callable[[dict[str, Any]], None]) -> Iterator[list[str]]:
    """Pass on what the workers say, from a thread, until all has been said; yields why they stopped, if they say so.

    Where `report` raises, the rest is passed on all the same; only if its last call raised, that is raised at the end.
    """
    stopped: list[str] = []
    raised: list[Exception] = []
    over = threading.Event()

    def listen() -> None:
        while not (over.is_set() and news.empty()):
            if news.empty():
                time.sleep(0.2)
                continue
            row = news.get()
            if "stopped" in row:
                stopped.append(row["stopped"])
                continue
            raised.clear()
            try:
                report(row)
            except Exception as error:
                raised.append(error)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield stopped
    finally:
        over.set()
        listener.join()
        news.shutdown()
    if raised and not stopped:
        raise raised[0]
