"""Distributed training on Ray Train, with Ray Data as input and resumable checkpoints in the run folder.

The batch of a step depends on seed, epoch and rank alone, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.engine.placement import cpu_share
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.train_worker import Assignment, work
from scalenet_ray.engine.worker_errors import from_worker, with_message
from scalenet_ray.training.recipe import Recipe
from scalenet_ray.training.schedule import Epochs, Training

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


def train(recipe: Recipe, training: Training, folder: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Train a recipe, from the last checkpoint of the run in `folder` if there is one.

    Args:
        recipe: the network, its examples and its loss.
        training: epochs, batch size, workers and optimizer settings.
        folder: the run folder, local, s3://, gs:// or az://; holds checkpoints/ and, at the end, the recipe's file.
        report: called at the end of each epoch with a row: "epoch" from 1, "loss", "learning_rate" (at its end), "val"
            (the recipe's metrics), "images_per_second", "seconds", "failed" (reasons of unusable images). Each call
            must write the complete log, as an OSError is raised only if the last call raised it.

    Raises:
        UserError: if there are no examples, or the loss is NaN or infinite; it names step and images.
        WorkerError: if workers failed too often, or a checkpoint could not be written.
    """
    join_ray()
    # Workers keep the working directory: a recipe may hold relative paths.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    sizes = recipe.sizes()
    # Raises a `UserError` if there are no examples.
    Epochs(*sizes, training.batch_size, training.workers, training.seed)
    cpus = cpu_share(training.workers * (1 + training.readers))
    resources = {"CPU": cpus} | ({"GPU": training.gpus_per_worker} if training.gpus_per_worker else {})
    file_system, path = storage.as_arrow(folder)
    events = Queue(actor_options={"num_cpus": 0})
    assignment = Assignment(recipe=recipe, training=training, sizes=sizes, events=events, reader_cpus=cpus)
    trainer = _Trainer(
        work,
        train_loop_config={"assignment": assignment},
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
    with _forwarded(events, report) as stopped:
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            cause = from_worker(error)
            msg = f"training stopped: {cause}; the last checkpoint is in {folder}: fix it and rerun with --resume"
            raise with_message(cause, msg) from None
    if stopped:
        msg = f"{stopped[0]}: lower the learning rate or look at these"
        raise UserError(msg)
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as last:
        content = Path(last, recipe.file_name).read_bytes()
    storage.write_bytes_atomic(storage.join(folder, recipe.file_name), content)


class _Trainer(TorchTrainer):
    """`TorchTrainer` without a signal handler: Ray's handler would continue to train after the first SIGINT."""

    def _register_sigint_handler(self, controller: Any) -> None:
        del controller


@contextmanager
def _forwarded(events: Queue, report: Callable[[dict[str, Any]], None]) -> Iterator[list[str]]:
    """Call `report` with the workers' events, from a thread; yield a list that gets the reason if they stop early.

    Errors of `report` are raised at the end of the block: a bug always, an OSError unless a later call succeeded.
    """
    stopped: list[str] = []
    over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        listener = thread.submit(_forward, events, report, over, stopped)
        try:
            yield stopped
        finally:
            over.set()
            wait([listener])
            events.shutdown()
    error = listener.result()
    if error is not None and not stopped:
        raise error


def _forward(
    events: Queue, report: Callable[[dict[str, Any]], None], over: threading.Event, stopped: list[str]
) -> OSError | None:
    """Call `report` until `over` is set and no event is left; return the OSError of the last call, if it raised one."""
    failure: OSError | None = None
    while not (over.is_set() and events.empty()):
        if events.empty():
            time.sleep(_POLL_SECONDS)
            continue
        row = events.get()
        if "stopped" in row:
            stopped.append(row["stopped"])
            continue
        try:
            report(row)
            failure = None
        except OSError as error:
            failure = error
            _LOG.warning("epoch %d could not be written down, training goes on: %s", row["epoch"], error)
    return failure
