"""Resumable hyperparameter search for policies on Ray Tune; `trial` evaluates one policy."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.policy_form import changed_policy
from scalenet_ray.data import storage
from scalenet_ray.data.policy_files import Choice, Range, SearchSpace, start_values
from scalenet_ray.engine.placement import gpu_share
from scalenet_ray.engine.prediction_cache import CacheActor
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.study import StudyFile
from scalenet_ray.engine.trial import RecursionTrial, TrialSettings
from scalenet_ray.engine.worker_errors import from_worker
from scalenet_ray.evaluation.compare import pareto_front
from scalenet_ray.runs.documents import TrialRow

Searcher = Literal["optuna", "random", "grid"]
"""optuna: Bayesian optimization (TPE); random: random search; grid: every combination of listed values."""


_NAME = "tune"


@dataclass(frozen=True)
class Sweep:
    """Search settings.

    Attributes:
        searcher: search algorithm.
        trials: number of trials; a grid has one per combination.
        at_once: number of concurrent trials, each with a CPU, and with --device cuda a share of a GPU.
        keep: share a cache of network outputs between all trials.
        stop_early: stop trials that perform worse than others on the same subset (ASHA); needs a ceiling.
        seed: random seed of the searcher.
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


def _configure_tune() -> None:
    """Set what Tune reads from the environment."""
    # A failed trial's traceback is in its folder, and its error in the table of trials.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Keep the signal handlers of the job.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Tune's newer output prints lines in spite of verbose=0, and names a folder of events that Ray takes away.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Save the state of the search often: a killed sweep loses a few seconds.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    # Addresses may be relative to the working directory of the job.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"


def check_searcher(space: SearchSpace, sweep: Sweep) -> None:
    """Check that the searcher of a sweep can work through a space.

    Raises:
        UserError: if it is grid and the space holds a range.
    """
    ranges = [path for path, field in space.fields.items() if isinstance(field, Range)]
    if sweep.searcher == "grid" and ranges:
        msg = (
            f"a grid wants lists, {{of: [VALUE, ...]}}, got ranges for {', '.join(ranges)}: list values, or use optuna"
        )
        raise UserError(msg)


def open_cache(sweep: Sweep) -> Any:
    """The cache of network outputs that all trials of a sweep share; None if it keeps none."""
    join_ray()
    return CacheActor.remote() if sweep.keep else None


def run_sweep(
    space: SearchSpace,
    task: TrialSettings,
    sweep: Sweep,
    uri: str,
    say: Callable[[str], None],
    *,
    cache_actor: Any,
    resume: bool,
) -> list[TrialRow]:
    """Run the trials of a sweep.

    Args:
        space: the search space.
        task: settings that all trials share.
        sweep: search settings.
        uri: the run folder, local, s3://, gs:// or az://; TensorBoard reads Tune's own folder in it, tune/, and
            optuna-dashboard the file study.log, which a local one has.
        say: called with a line of text when a trial ends.
        cache_actor: from `open_cache`.
        resume: resume an existing sweep.

    Returns:
        A row per trial: "trial", its "values" by path, the metrics of `Evaluation`, "complete" (whether it saw all
        images), and "error", the reason of its failure, or None.
    """
    _configure_tune()
    resources = {"cpu": 1, "gpu": gpu_share(task.networks.device, sweep.at_once)}
    trainable = tune.with_resources(tune.with_parameters(RecursionTrial, task=task, cache_actor=cache_actor), resources)
    path = storage.local_path(storage.join(uri, "study.log"))
    studies = [StudyFile(path, space, task.subsets[-1], single=task.ceiling is not None)] if path else []
    for study in studies:
        study.open()
        say(
            f"to watch it: optuna-dashboard {path} (pip install optuna-dashboard), or "
            f"tensorboard --logdir {storage.join(uri, _NAME)} (pip install tensorboard)"
        )
    # The same file system as for all other files, with its retries, endpoint and credentials.
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
                callbacks=[_Lines(say, None if sweep.searcher == "grid" else sweep.trials), *studies],
                verbose=0,
            ),
        )
    with warnings.catch_warnings():
        # An interrupted trial starts again and reports results that the searcher knows.
        warnings.filterwarnings("ignore", "The reported value is ignored because this `step")
        results = tuner.fit()
    values = tune.ExperimentAnalysis(storage.join(folder, _NAME), storage_filesystem=file_system).get_all_configs()
    return [_row(result, values, task) for result in results]


def best_trials(rows: Sequence[TrialRow], task: TrialSettings) -> dict[str, TrialRow]:
    """Select the best trial under the ceiling, "tuned"; without a ceiling the Pareto front, "front-1" and so on.

    Policies that read the ground truth are excluded, as they cannot be applied to other images.

    Args:
        rows: from `run_sweep`.
        task: settings of the trials.

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
    complete = [row for row in complete if not task.policies[row["values"]["policy"]].reads_truth]
    if not complete:
        msg = "all trials that saw all images read the ground truth: let the sweep start from a policy that reads none"
        raise UserError(msg)
    if task.ceiling is None:
        chosen = [complete[i] for i in pareto_front([(row["passes"], row["AP_small"]) for row in complete])]
        return {f"front-{i}": row for i, row in enumerate(chosen, start=1)}
    under = [row for row in complete if row["passes"] <= task.ceiling]
    if not under:
        fewest = min(row["passes"] for row in complete)
        msg = (
            f"no trial of {len(rows)} stays at {task.ceiling:g} passes an image or under, the cheapest takes "
            f"{fewest:.2f}: raise the ceiling, or let the space hold cheaper policies"
        )
        raise UserError(msg)
    return {"tuned": max(under, key=lambda row: row["AP_small"])}


def best_policies(rows: Sequence[TrialRow], task: TrialSettings) -> list[Policy]:
    """The policies of `best_trials`, with the same names.

    Raises:
        UserError: as `best_trials`.
    """
    return [_policy(row, task, name) for name, row in best_trials(rows, task).items()]


def _start_points(task: TrialSettings, space: SearchSpace) -> list[dict[str, Any]]:
    """The unmodified policies inside the search space, as points of Tune's parameter space."""
    starts = [(name, start_values(policy, space)) for name, policy in task.policies.items()]
    return [{"policy": name, **values} for name, values in starts if values is not None]


def _policy(row: TrialRow, task: TrialSettings, name: str) -> Policy:
    values = dict(row["values"])
    return changed_policy(task.policies[values.pop("policy")], name, values)


def _param_space(space: SearchSpace, sweep: Sweep) -> dict[str, Any]:
    """The search space as Tune's parameter space."""
    fields: dict[str, Range | Choice] = {"policy": Choice(space.policies), **space.fields}
    if sweep.searcher != "grid":
        return {path: _domain(field) for path, field in fields.items()}
    return {path: tune.grid_search(list(field.options)) for path, field in fields.items() if isinstance(field, Choice)}


def _domain(field: Range | Choice) -> Any:
    if isinstance(field, Choice):
        return tune.choice(list(field.options))
    if field.whole:
        # The upper bound of Tune is exclusive.
        low, high = int(field.low), int(field.high) + 1
        return tune.lograndint(low, high) if field.log else tune.randint(low, high)
    return tune.loguniform(field.low, field.high) if field.log else tune.uniform(field.low, field.high)


def _tune_config(space: SearchSpace, task: TrialSettings, sweep: Sweep) -> tune.TuneConfig:
    """Searcher and scheduler; the unmodified policies are the first trials, except in a grid."""
    points = _start_points(task, space)
    single, steps = task.ceiling is not None, len(task.subsets)
    objective: dict[str, Any] = {"metric": "score", "mode": "max"}
    front_objective: dict[str, Any] = {"metric": ["AP_small", "passes"], "mode": ["max", "min"]}
    if sweep.searcher == "optuna":
        goals = {} if single else front_objective
        searcher: Any = PruningOptuna(steps=steps, points_to_evaluate=points, seed=sweep.seed, **goals)
    else:
        first = [] if sweep.searcher == "grid" else points
        searcher = BasicVariantGenerator(first, max_concurrent=sweep.at_once, random_state=sweep.seed)
    stops = single and sweep.stop_early and steps > 1
    return tune.TuneConfig(
        **(objective if single else {}),
        search_alg=searcher,
        scheduler=ResumableAsha(max_t=steps, grace_period=1, reduction_factor=2) if stops else None,
        num_samples=1 if sweep.searcher == "grid" else sweep.trials,
        max_concurrent_trials=sweep.at_once,
        reuse_actors=True,
        trial_dirname_creator=_trial_id,
    )


class PruningOptuna(OptunaSearch):
    """Optuna, told that trials which were stopped early are pruned: their AP is of fewer images.

    Args:
        steps: number of steps of a trial that was not stopped.
        **settings: those of `OptunaSearch`.
    """

    def __init__(self, *, steps: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._steps = steps

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the result of a whole trial on to the study, and none of another."""
        whole = result is not None and result["training_iteration"] == self._steps
        super().on_trial_complete(trial_id, result if whole else None, error)


class ResumableAsha(ASHAScheduler):
    """ASHA that restores the results of finished trials after a resume, which Tune does not save."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial; for a finished one, replay its result of each step."""
        super().on_trial_add(tune_controller, trial)
        if trial.is_finished() and trial.last_result:
            steps = trial.last_result[self._time_attr]
            # Tune keeps the last ten values of each metric.
            scores = list(trial.metric_n_steps[self._metric]["10"])[-steps:]
            for step, score in enumerate(scores, start=1):
                self.on_trial_result(tune_controller, trial, {self._time_attr: step, self._metric: score})


def _trial_id(trial: Any) -> str:
    """The name of a trial's folder: TensorBoard shows the beginning of it."""
    return trial.trial_id


def _row(result: Any, values: Mapping[str, Mapping[str, Any]], task: TrialSettings) -> TrialRow:
    """The row of a trial; `values` by trial, as the results of one that failed may name another of its actor."""
    metrics = result.metrics or {}
    trial = str(result.path).rstrip("/").rsplit("/", 1)[-1]
    names = ("AP", "AP_small", "AP_large", "passes", "score", "images", "images_failed", "hits", "misses")
    row = {
        "trial": trial,
        "values": dict(values[trial]),
        **{name: metrics.get(name, float("nan")) for name in names},
        "complete": result.error is None and metrics.get("images") == task.subsets[-1],
        "error": None if result.error is None else str(from_worker(result.error)),
    }
    return cast(TrialRow, row)


class _Lines(tune.Callback):
    """Callback that prints a line for each trial that ends.

    Args:
        say: called with the line.
        total: number of trials, if known.
    """

    def __init__(self, say: Callable[[str], None], total: int | None) -> None:
        self._say = say
        self._of = "" if total is None else f" of {total}"
        self._ended = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the metrics of a finished trial."""
        self._ended += 1
        last = trial.last_result
        self._say(
            f"trial {self._ended}{self._of}: AP_small {last['AP_small']:.1f} at {last['passes']:.2f} passes on "
            f"{last['images']} images, {last['hits']} answers kept, {last['misses']} new"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial failed; the sweep continues."""
        self._ended += 1
        self._say(f"trial {self._ended}{self._of}: {trial.trial_id} failed, the sweep goes on")
