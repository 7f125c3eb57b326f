"""Hyperparameter sweep on Ray Tune over growing subsets of the images, resumable."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from scalenet_ray.core.answers import RaisedOn, fails_on_all
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data import storage
from scalenet_ray.data.coco import CocoDataset, ImageRecord, oracle_from, read_annotations, to_results
from scalenet_ray.data.policy_files import Choice, Range, SearchSpace, changed_policy, start_values
from scalenet_ray.engine.placement import gpu_share
from scalenet_ray.engine.prediction_cache import CacheActor, CachedDetector, CachedScalePredictor, PredictionCache
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.worker_errors import from_worker
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.evaluation.compare import pareto_front
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.batch import image_opener
from scalenet_ray.runs.documents import TrialRow

__all__ = [
    "RecursionTrial",
    "ResumableAsha",
    "Sweep",
    "TrialSettings",
    "best_policies",
    "best_trials",
    "run_sweep",
    "start_trials",
]

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
    space: SearchSpace, task: TrialSettings, sweep: Sweep, uri: str, say: Callable[[str], None], *, resume: bool
) -> list[TrialRow]:
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
    keeper: Any = CacheActor.remote() if sweep.keep else None
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


def best_trials(rows: Sequence[TrialRow], task: TrialSettings) -> dict[str, TrialRow]:
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
    complete = [row for row in complete if not task.policies[row["values"]["policy"]].reads_truth]
    if not complete:
        msg = "all trials that saw all images read the ground truth: let the sweep start from a policy that reads none"
        raise UserError(msg)
    if task.ceiling is None:
        chosen = [complete[i] for i in pareto_front([(row["passes"], row["AP_small"]) for row in complete])]
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


def best_policies(rows: Sequence[TrialRow], task: TrialSettings) -> list[Policy]:
    """The policies of `best_trials`, by their names there.

    Raises:
        UserError: as there.
    """
    return [_policy(row, task, name) for name, row in best_trials(rows, task).items()]


def start_trials(rows: Sequence[TrialRow], task: TrialSettings, space: SearchSpace) -> dict[str, TrialRow | None]:
    """The trials of the policies that a sweep starts from, as they are.

    Args:
        rows: as `run_sweep` gives them.
        task: what the trials did.
        space: what may change.

    Returns:
        Name -> its row; None for a policy that lies outside the space, or whose trial did not see all images.
    """
    found: dict[str, TrialRow | None] = {}
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


def _policy(row: TrialRow, task: TrialSettings, name: str) -> Policy:
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


def _tune_config(space: SearchSpace, task: TrialSettings, sweep: Sweep) -> tune.TuneConfig:
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


def _row(result: Any, task: TrialSettings) -> TrialRow:
    metrics = result.metrics or {}
    names = ("AP", "AP_small", "AP_large", "passes", "score", "images", "images_failed", "hits", "misses")
    row = {
        "trial": metrics.get("trial_id") or str(result.path).rstrip("/").rsplit("/", 1)[-1],
        "values": dict(result.config or {}),
        **{name: metrics.get(name, float("nan")) for name in names},
        "complete": result.error is None and metrics.get("images") == task.subsets[-1],
        "error": None if result.error is None else str(from_worker(result.error)),
    }
    return cast(TrialRow, row)


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


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep do alike.

    Attributes:
        policies: those that trials start from, by name.
        networks: the detector and Scale Net.
        annotations: address of the instances file.
        folder: of the images.
        subsets: how many images each step ends at, the last one all; what is stopped early saw fewer.
        ceiling: the most detector passes an image; None to ask for the whole front.
        max_pixels: larger images are refused before they are decoded.
    """

    policies: Mapping[str, Policy]
    networks: NetworkSpec
    annotations: str
    folder: str
    subsets: tuple[int, ...]
    ceiling: float | None
    max_pixels: int


class RecursionTrial(tune.Trainable):
    """A policy, step by step over more images; each step tells what it found on all of them so far.

    Results: "AP_small", "AP", "AP_large" in percent, "passes" an image, "images_failed", "score" (AP_small, or below 0
    by how far the passes exceed the ceiling), "hits" and "misses" of what was kept.
    """

    # What comes after the configuration is given by `tune.with_parameters`.
    def setup(self, config: dict[str, Any], task: TrialSettings, keeper: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what all policies need; an actor goes on to its next trial with it."""
        self._task = task
        self._kept = PredictionCache(keeper)
        self._dataset: CocoDataset = read_annotations(task.annotations)
        self._detector = task.networks.load_detector(self._dataset.categories, self._dataset.unused_categories)
        self._predictors: dict[str, Any] = {}
        self._open_image = image_opener(task.folder, task.max_pixels)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self.config = new_config
        values = {path: value for path, value in new_config.items() if path != "policy"}
        self._policy = changed_policy(self._task.policies[new_config["policy"]], "trial", values)
        self._kept.begin()
        self._results: list[dict[str, Any]] = []
        self._passes = 0.0
        self._failed = self._done = 0
        self._raised = RaisedOn()
        return True

    def step(self) -> dict[str, Any]:
        """Work through the images up to the end of the next subset."""
        self._kept.fetch()
        end = next((size for size in self._task.subsets if size > self._done), self._task.subsets[-1])
        for images, record in enumerate(self._dataset.images[self._done : end], start=self._done + 1):
            self._work(record, no_more=images == self._task.subsets[-1])
        self._done = end
        self._kept.share()
        ids = [record.image_id for record in self._dataset.images[:end]]
        figures = evaluate(self._dataset, self._results, image_ids=ids)
        passes = self._passes / max(1, end - self._failed)
        ceiling = self._task.ceiling
        return {
            **{name: figures[name] for name in ("AP", "AP_small", "AP_large")},
            "passes": passes,
            "score": figures["AP_small"] if ceiling is None or passes <= ceiling else ceiling - passes,
            "images": end,
            "images_failed": self._failed,
            "hits": self._kept.hits,
            "misses": self._kept.misses,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that is cut short begins anew, on what was kept."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing; see `save_checkpoint`."""

    def _work(self, record: ImageRecord, *, no_more: bool) -> None:
        try:
            image = self._open_image(record)
        except TileError:
            self._failed += 1
            return
        result = recursive_detect(
            image,
            record.image_id,
            self._policy,
            detect=CachedDetector(self._detector, self._kept),
            predict_scale=self._predictor(self._policy),
        )
        self._failed += result.failure is not None
        self._raised.add(result.failure and result.failure.reason)
        if self._raised.all_of_the_first(no_more=no_more):
            raise fails_on_all(self._raised.reason, self._raised.images)
        self._passes += result.detector_passes if result.failure is None else 0.0
        self._results += to_results(record.image_id, result.detections, result.image_hw)

    def _predictor(self, policy: Policy) -> Any:
        """What tells scales to a policy, made once for all trials of this process."""
        if not policy.needs_predictor:
            return None
        kind = "oracle" if policy.reads_truth else "scale net"
        if kind not in self._predictors:
            if kind == "oracle":
                self._predictors[kind] = oracle_from(self._task.annotations)
            else:
                self._predictors[kind] = CachedScalePredictor(
                    self._task.networks.load_scale_net(), self._detector, self._kept
                )
        return self._predictors[kind]
