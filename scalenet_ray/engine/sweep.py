"""A sweep: Ray Tune chooses policies, tries them on growing subsets of the images, and goes on after a kill."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from scalenet_ray.core import storage
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.front import front
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.search_space import Choice, Range, SearchSpace, changed_policy, start_values
from scalenet_ray.engine.kept import Keeper
from scalenet_ray.engine.recursion_trial import RecursionTrial, TrialTask
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.shares import gpu_share
from scalenet_ray.engine.worker_errors import from_worker

__all__ = ["ResumableAsha", "Sweep", "best_policies", "best_trials", "run_sweep", "start_trials"]

Searcher = Literal["optuna", "random", "grid"]
"""optuna: where earlier trials did well (TPE); random: anywhere; grid: every combination of listed values."""

_NAME = "tune"


@dataclass(frozen=True)
class Sweep:
    """How a sweep is done.

    Attributes:
        searcher: who chooses.
        trials: how many; a grid has as many as it has combinations.
        at_once: trials side by side, a CPU each, and with --device cuda a share of a GPU each.
        keep: keep what networks said of tiles for all trials.
        stop_early: end trials that do worse than others on the same subset (ASHA); only with a ceiling.
        seed: of the searcher.
    """

    searcher: Searcher = "optuna"
    trials: int = 50
    at_once: int = 2
    keep: bool = True
    stop_early: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "at_once"):
            if getattr(self, name) < 1:
                msg = f"{name} must be 1 or more, got {getattr(self, name)}"
                raise UserError(msg)


def run_sweep(
    space: SearchSpace, task: TrialTask, sweep: Sweep, uri: str, say: Callable[[str], None], *, resume: bool
) -> list[dict[str, Any]]:
    """Try policies.

    Args:
        space: what may change.
        task: what each trial does.
        sweep: how.
        uri: the run folder, local or s3://; Tune's own folder, which TensorBoard reads, is tune/ in it.
        say: takes a line for the person who waits.
        resume: go on with the sweep that is there.

    Returns:
        Each trial as a row: "trial", its "values" by path, what `RecursionTrial` tells of it, "complete" (it saw all
        images), and "error", why it failed, or None.

    Raises:
        UserError: if a grid is asked for a range, or there is no sweep to go on with.
    """
    join_ray()
    # Of a trial that fails the trace is in its folder, and its last line in the trials' table.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Signals are left to whoever handles them.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # What is decided is on disk soon: a killed sweep loses a few seconds.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    # Addresses may be relative to where the job was started.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    keeper: Any = Keeper.remote() if sweep.keep else None
    resources = {"cpu": 1, "gpu": gpu_share(task.networks.device, sweep.at_once)}
    trainable = tune.with_resources(tune.with_parameters(RecursionTrial, task=task, keeper=keeper), resources)
    # The file system that all else here is read by: its retries, its endpoint, its credentials.
    file_system, folder = storage.as_arrow(uri)
    if resume and storage.exists(storage.join(uri, _NAME, "tuner.pkl")):
        tuner = tune.Tuner.restore(
            storage.join(folder, _NAME),
            trainable,
            storage_filesystem=file_system,
            resume_errored=False,
            restart_errored=False,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=_param_space(space, sweep),
            tune_config=_tune_config(space, task, sweep),
            run_config=tune.RunConfig(
                name=_NAME,
                storage_path=folder,
                storage_filesystem=file_system,
                stop={"training_iteration": len(task.subsets)},
                callbacks=[_Lines(say, None if sweep.searcher == "grid" else sweep.trials)],
                verbose=0,
            ),
        )
    with warnings.catch_warnings():
        # A trial that was cut short begins anew, and says again what its searcher knows already.
        warnings.filterwarnings("ignore", "The reported value is ignored because this `step")
        return [_row(result, task) for result in tuner.fit()]


def best_trials(rows: Sequence[dict[str, Any]], task: TrialTask) -> dict[str, dict[str, Any]]:
    """The best trial under the ceiling, named "tuned"; without a ceiling the front, named "front-1" and so on.

    One that reads the ground truth is not among them: what is tuned is followed where there is none.

    Args:
        rows: as `run_sweep` gives them.
        task: what the trials did.

    Returns:
        Name -> its row.

    Raises:
        UserError: if no trial saw all images, or none stayed under the ceiling.
    """
    complete = [row for row in rows if row["complete"] and row["AP_small"] == row["AP_small"]]
    if not complete:
        failed = next((row["error"] for row in rows if row["error"]), "no trial came to its end")
        msg = f"no trial of {len(rows)} saw all images to its end: {failed}"
        raise UserError(msg)
    complete = [row for row in complete if task.policies[row["values"]["policy"]].kind != "oracle"]
    if not complete:
        msg = "all trials that saw all images read the ground truth: let the sweep start from a policy that reads none"
        raise UserError(msg)
    if task.ceiling is None:
        chosen = [complete[i] for i in front([(row["passes"], row["AP_small"]) for row in complete])]
        return {f"front-{i}": row for i, row in enumerate(chosen, start=1)}
    under = [row for row in complete if row["passes"] <= task.ceiling]
    if not under:
        least = min(row["passes"] for row in complete)
        msg = (
            f"no trial of {len(rows)} stays at {task.ceiling:g} passes an image or under, the cheapest takes "
            f"{least:.2f}: raise the ceiling, or let the space hold cheaper policies"
        )
        raise UserError(msg)
    return {"tuned": max(under, key=lambda row: row["AP_small"])}


def best_policies(rows: Sequence[dict[str, Any]], task: TrialTask) -> list[Policy]:
    """The policies of `best_trials`, by their names there.

    Raises:
        UserError: as there.
    """
    return [_policy(row, task, name) for name, row in best_trials(rows, task).items()]


def start_trials(
    rows: Sequence[dict[str, Any]], task: TrialTask, space: SearchSpace
) -> dict[str, dict[str, Any] | None]:
    """The trials of the policies that a sweep starts from, as they are.

    Args:
        rows: as `run_sweep` gives them.
        task: what the trials did.
        space: what may change.

    Returns:
        Name -> its row; None for a policy that lies outside the space, or whose trial did not see all images.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name, policy in task.policies.items():
        start = start_values(policy, space)
        wanted = None if start is None else {"policy": name, **start}
        same = (row for row in rows if row["complete"] and wanted is not None and _same_values(row["values"], wanted))
        found[name] = next(same, None)
    return found


def _same_values(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two trials are of one policy; a searcher may hand numbers back through a logarithm."""
    return values.keys() == wanted.keys() and all(
        math.isclose(value, wanted[path]) if isinstance(value, float) else value == wanted[path]
        for path, value in values.items()
    )


def _policy(row: dict[str, Any], task: TrialTask, name: str) -> Policy:
    values = dict(row["values"])
    return changed_policy(task.policies[values.pop("policy")], name, values)


def _param_space(space: SearchSpace, sweep: Sweep) -> dict[str, Any]:
    """The space in Tune's own terms."""
    fields: dict[str, Range | Choice] = {"policy": Choice(space.policies), **space.fields}
    if sweep.searcher != "grid":
        return {path: _domain(field) for path, field in fields.items()}
    ranges = [path for path, field in fields.items() if isinstance(field, Range)]
    if ranges:
        msg = (
            f"a grid wants lists, {{of: [VALUE, ...]}}, got ranges for {', '.join(ranges)}: list values, or use optuna"
        )
        raise UserError(msg)
    return {path: tune.grid_search(list(field.options)) for path, field in fields.items() if isinstance(field, Choice)}


def _domain(field: Range | Choice) -> Any:
    if isinstance(field, Choice):
        return tune.choice(list(field.options))
    if field.whole:
        # Tune's own ends before the higher one.
        low, high = int(field.low), int(field.high) + 1
        return tune.lograndint(low, high) if field.log else tune.randint(low, high)
    return tune.loguniform(field.low, field.high) if field.log else tune.uniform(field.low, field.high)


def _tune_config(space: SearchSpace, task: TrialTask, sweep: Sweep) -> tune.TuneConfig:
    """Who chooses, and who ends trials early; the policies that a sweep starts from are tried first."""
    starts = [(name, start_values(policy, space)) for name, policy in task.policies.items()]
    points = [{"policy": name, **values} for name, values in starts if values is not None]
    single = task.ceiling is not None
    objective: dict[str, Any] = {"metric": "score", "mode": "max"}
    front_objective: dict[str, Any] = {"metric": ["AP_small", "passes"], "mode": ["max", "min"]}
    if sweep.searcher == "optuna":
        searcher: Any = OptunaSearch(points_to_evaluate=points, seed=sweep.seed, **({} if single else front_objective))
    else:
        first = [] if sweep.searcher == "grid" else points
        searcher = BasicVariantGenerator(first, max_concurrent=sweep.at_once, random_state=sweep.seed)
    steps = len(task.subsets)
    stops = single and sweep.stop_early and steps > 1
    return tune.TuneConfig(
        **(objective if single else {}),
        search_alg=searcher,
        scheduler=ResumableAsha(max_t=steps, grace_period=1, reduction_factor=2) if stops else None,
        num_samples=1 if sweep.searcher == "grid" else sweep.trials,
        max_concurrent_trials=sweep.at_once,
        reuse_actors=True,
    )


class ResumableAsha(ASHAScheduler):
    """ASHA that knows, after a resume, what ended trials had reached: Tune does not keep its scheduler's memory."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take up a trial; of one that has ended, what it came to at each step."""
        super().on_trial_add(tune_controller, trial)
        if trial.is_finished() and trial.last_result:
            steps = trial.last_result[self._time_attr]
            # Tune keeps the last ten of each figure.
            scores = list(trial.metric_n_steps[self._metric]["10"])[-steps:]
            for step, score in enumerate(scores, start=1):
                self.on_trial_result(tune_controller, trial, {self._time_attr: step, self._metric: score})


def _row(result: Any, task: TrialTask) -> dict[str, Any]:
    metrics = result.metrics or {}
    names = ("AP", "AP_small", "AP_large", "passes", "score", "images", "images_failed", "hits", "misses")
    return {
        "trial": metrics.get("trial_id") or str(result.path).rstrip("/").rsplit("/", 1)[-1],
        "values": dict(result.config or {}),
        **{name: metrics.get(name, float("nan")) for name in names},
        "complete": result.error is None and metrics.get("images") == task.subsets[-1],
        "error": None if result.error is None else str(from_worker(result.error)),
    }


class _Lines(tune.Callback):
    """A line for each trial that ends.

    Args:
        say: takes it.
        total: trials in all, if it is known.
    """

    def __init__(self, say: Callable[[str], None], total: int | None) -> None:
        self._say = say
        self._of = "" if total is None else f" of {total}"
        self._ended = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what it came to."""
        self._ended += 1
        last = trial.last_result
        self._say(
            f"trial {self._ended}{self._of}: AP_small {last['AP_small']:.1f} at {last['passes']:.2f} passes on "
            f"{last['images']} images, {last['hits']} answers kept, {last['misses']} new"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it failed; the sweep goes on."""
        self._ended += 1
        self._say(f"trial {self._ended}{self._of}: {trial.trial_id} failed, the sweep goes on")
