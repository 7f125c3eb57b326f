"""Training on Ray Train: any number of workers, each fed by Ray Data, checkpoints in the run folder, resumable.

What a step sees depends on seed, epoch and rank alone, so that a run taken up at an epoch ends as if it had
never stopped.
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

__all__ = ["train"]

CHECKPOINTS = "checkpoints"
"""Where a run folder has them."""

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


def train(recipe: Recipe, training: Training, folder: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Train to the end, or from where the run in `folder` stopped.

    Args:
        recipe: what is trained.
        training: how.
        folder: the run folder, local or s3://; gets checkpoints/ and, at the end, the recipe's file.
        report: called with each epoch's row as it ends: "epoch" from 1, "loss", "learning_rate" (at its end), "val"
            (the recipe's figures), "images_per_second", "seconds", "failed" (reasons of images that could not be
            used). It says all that came before each time: an OSError is raised only if its last call ended in one.

    Raises:
        UserError: if there is nothing to train on, or the loss is NaN or infinite; it names step and images.
        WorkerError: if the workers were lost too often, or a checkpoint could not be written.
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
    trainer = _Trainer(
        work,
        train_loop_config={"assignment": Assignment(recipe, training, sizes, news, cpus)},
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
            cause = from_worker(error)
            msg = f"training stopped: {cause}; the last checkpoint is in {folder}: mend it and add --resume"
            told = with_message(cause, msg)
            raise told from None
    if stopped:
        msg = f"{stopped[0]}: lower the learning rate or look at these"
        raise UserError(msg)
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as last:
        content = Path(last, recipe.file_name).read_bytes()
    storage.write_bytes_atomic(storage.join(folder, recipe.file_name), content)


class _Trainer(TorchTrainer):
    """A trainer that leaves signals to whoever handles them: Ray's own handler tries on after the first SIGINT."""

    def _register_sigint_handler(self, controller: Any) -> None:
        del controller


@contextmanager
def _listening(news: Queue, report: Callable[[dict[str, Any]], None]) -> Iterator[list[str]]:
    """Pass on what the workers say, from a thread, until all has been said; yields why they stopped, if they say so.

    What `report` raised is raised at the end: a bug always, an OSError if no later call has gone well.
    """
    stopped: list[str] = []
    over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        listener = thread.submit(_listen, news, report, over, stopped)
        try:
            yield stopped
        finally:
            over.set()
            wait([listener])
            news.shutdown()
    error = listener.result()
    if error is not None and not stopped:
        raise error


def _listen(
    news: Queue, report: Callable[[dict[str, Any]], None], over: threading.Event, stopped: list[str]
) -> OSError | None:
    """Until it is over and nothing is left; returns what the last call of `report` failed with."""
    failure: OSError | None = None
    while not (over.is_set() and news.empty()):
        if news.empty():
            time.sleep(_POLL_SECONDS)
            continue
        row = news.get()
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
