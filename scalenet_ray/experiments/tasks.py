"""Ray tasks with dependencies, whose outcomes stay in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.worker_errors import from_worker, with_message
from scalenet_ray.runs.folder import RunFolder


@dataclass(frozen=True)
class Task:
    """A Ray task of an experiment.

    Attributes:
        name: unique name; the outcome is written to units/NAME.json in the run folder.
        work: function to run in a worker process; returns plain values.
        after: names of the tasks that must be done first.
        method: row of the table that a score belongs to.
        test_set: column of the table that a score belongs to.
    """

    name: str
    work: Callable[[], Mapping[str, Any]]
    after: tuple[str, ...] = ()
    method: str | None = None
    test_set: str | None = None


def run_tasks(
    tasks: Sequence[Task], run: RunFolder, say: Callable[[str], None], *, gpus: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Run the tasks without an outcome in the run folder in parallel on Ray; returns outcomes by name, in their order.

    Args:
        tasks: tasks, started in this order where dependencies allow.
        run: run folder.
        say: called with each line of progress.
        gpus: GPUs per task; a share such as 0.25 lets four tasks use one.

    Raises:
        UserError: if a task raised it; finished tasks stay done.
        WorkerError: if a task raised another error.
    """
    files = {task.name: f"units/{task.name}.json" for task in tasks}
    outcomes = {name: outcome for name, file in files.items() if (outcome := run.read_json(file)) is not None}
    run.standing = f"{len(outcomes)} of {len(tasks)} done"
    waiting = [task for task in tasks if task.name not in outcomes]
    if not waiting:
        return outcomes
    join_ray()
    # Ray retries lost processes only: an error in the code would occur again.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_work)
    running: dict[ray.ObjectRef, str] = {}
    started, done_before = time.monotonic(), len(outcomes)
    while waiting or running:
        for task in [task for task in waiting if all(name in outcomes for name in task.after)]:
            running[remote.remote(task.work)] = task.name
            waiting.remove(task)
        (ref,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(ref)
        try:
            outcomes[name] = ray.get(ref)
        except RayError as error:
            for other in running:
                ray.cancel(other, force=True)
            cause = from_worker(error)
            msg = f"{name} failed: {cause}; what is done stays in {run.uri}: fix it and rerun with --resume"
            raise with_message(cause, msg) from None
        run.write_json(files[name], outcomes[name])
        run.standing = f"{len(outcomes)} of {len(tasks)} done"
        left = (time.monotonic() - started) / (len(outcomes) - done_before) * (len(tasks) - len(outcomes))
        numbers = (f"{key} {value:.4g}" for key, value in outcomes[name].items() if isinstance(value, int | float))
        say(f"{run.standing}: {name} {' '.join(numbers)}, about {left / 60:.0f} min left")
    return {task.name: outcomes[task.name] for task in tasks}


def _work(work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    return dict(work())
