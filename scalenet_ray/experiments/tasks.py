"""An experiment as units of work that Ray runs side by side: each leaves its outcome, and none is done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from scalenet_ray.data import storage
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.worker_errors import from_worker, with_message
from scalenet_ray.runs.folder import RunFolder

__all__ = [
    "Task",
    "run_tasks",
]


@dataclass(frozen=True)
class Task:
    """A piece of an experiment.

    Attributes:
        name: fit for a file name; its outcome is units/NAME.json in the run folder.
        work: what is done, in a process of its own; returns plain values. Weights it leaves where others find them.
        after: names of the units that must be done before.
    """

    name: str
    work: Callable[[], Mapping[str, Any]]
    after: tuple[str, ...] = ()


def run_tasks(
    units: Sequence[Task], run: RunFolder, say: Callable[[str], None], *, gpus: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Do what is not done yet, as many at once as there are CPUs (or GPUs).

    Args:
        units: in the order in which they are begun, where nothing else decides.
        run: the run folder.
        say: takes a line for the person who waits.
        gpus: that each takes up; a share such as 0.25 lets four use one.

    Returns:
        The outcome of each by name, in the order of the units.

    Raises:
        ValueError: if a unit waits for one that is none of them.
        UserError: if a unit raised it; units that are done stay done.
        WorkerError: if a unit raised another error.
    """
    names = {unit.name for unit in units}
    unknown = sorted({name for unit in units for name in unit.after} - names)
    if unknown:
        msg = f"units wait for {', '.join(unknown)}, which the run does not have"
        raise ValueError(msg)
    outcomes = {unit.name: outcome for unit in units if (outcome := _read(run, unit.name)) is not None}
    run.standing = f"{len(outcomes)} of {len(units)} done"
    waiting = [unit for unit in units if unit.name not in outcomes]
    if not waiting:
        return outcomes
    join_ray()
    # A unit with a bug fails again: only lost processes are worth another try, and those Ray retries by itself.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_work)
    running: dict[ray.ObjectRef, str] = {}
    started, done_before = time.monotonic(), len(outcomes)
    while waiting or running:
        ready = [unit for unit in waiting if all(name in outcomes for name in unit.after)]
        for unit in ready:
            running[remote.remote(unit.work)] = unit.name
            waiting.remove(unit)
        (ref,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(ref)
        try:
            outcomes[name] = ray.get(ref)
        except RayError as error:
            cause = from_worker(error)
            for other in running:
                ray.cancel(other, force=True)
            msg = f"{name} failed: {cause}; what is done stays in {run.uri}: mend it and add --resume"
            told = with_message(cause, msg)
            raise told from None
        run.write_json(f"units/{name}.json", outcomes[name])
        run.standing = f"{len(outcomes)} of {len(units)} done"
        left = (time.monotonic() - started) / (len(outcomes) - done_before) * (len(units) - len(outcomes))
        say(f"{len(outcomes)} of {len(units)} done: {name} {_in_words(outcomes[name])}, about {left / 60:.0f} min left")
    return {unit.name: outcomes[unit.name] for unit in units}


def _work(work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    return dict(work())


def _read(run: RunFolder, name: str) -> dict[str, Any] | None:
    uri = storage.join(run.uri, "units", f"{name}.json")
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def _in_words(outcome: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in outcome.items() if isinstance(value, int | float))
