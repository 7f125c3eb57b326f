"""Trials of a sweep: policies evaluated on growing subsets of the images, first those that it starts from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray import tune

from scalenet_ray.core.answers import RaisedOn, fails_on_all
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.policy_form import changed_policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data import storage
from scalenet_ray.data.coco import CocoDataset, oracle_from, read_annotations
from scalenet_ray.data.formats import to_results
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.engine.placement import gpu_share
from scalenet_ray.engine.prediction_cache import CachedDetector, CachedScalePredictor, PredictionCache
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.batch import image_opener
from scalenet_ray.runs.documents import Starts, TrialMetrics

STARTS = "starts.json"
"""The starting policies of a sweep and its ceilings (`Starts`), which it keeps when it is resumed."""


@dataclass(frozen=True)
class TrialSettings:
    """Settings that all trials of a sweep share.

    Attributes:
        policies: the policies that trials modify, by name.
        networks: the detector and Scale Net.
        annotations: address of the instances file.
        folder: folder of the images.
        subsets: number of images after each step, in ascending order; a trial that is stopped early saw fewer.
        ceilings: maximum number of detector passes per image after each step; None to search the whole Pareto front.
        max_pixels: larger images are refused before they are decoded.
    """

    policies: Mapping[str, Policy]
    networks: NetworkSpec
    annotations: str
    folder: str
    subsets: tuple[int, ...]
    ceilings: tuple[float, ...] | None
    max_pixels: int

    @property
    def ceiling(self) -> float | None:
        """Maximum number of detector passes per image over all images; None without a limit."""
        return None if self.ceilings is None else self.ceilings[-1]


class Evaluation:
    """Evaluation of one policy after another in one process, step by step on growing subsets of the images.

    Args:
        task: settings of the sweep.
        cache_actor: the sweep's `CacheActor`; None to start each policy with an empty cache.
    """

    def __init__(self, task: TrialSettings, cache_actor: Any) -> None:
        self._task = task
        self._cache = PredictionCache(cache_actor)
        self._dataset: CocoDataset = read_annotations(task.annotations)
        self._detector = task.networks.load_detector(self._dataset.categories, self._dataset.unused_categories)
        self._open_image = image_opener(task.folder, task.max_pixels)

    def begin(self, policy: str, values: Mapping[str, Any]) -> None:
        """Begin with another policy.

        Args:
            policy: name of the policy that it modifies.
            values: its own values by path.
        """
        self._policy = changed_policy(self._task.policies[policy], "trial", values)
        self._cache.begin()
        self._results: list[dict[str, Any]] = []
        self._passes = 0.0
        self._failed = self._done = 0
        self._raised = RaisedOn()

    def step(self) -> TrialMetrics:
        """Process the images up to the end of the next subset; return the metrics over all images so far."""
        self._cache.fetch()
        end = next((size for size in self._task.subsets if size > self._done), self._task.subsets[-1])
        for images, record in enumerate(self._dataset.images[self._done : end], start=self._done + 1):
            self._process(record, no_more=images == self._task.subsets[-1])
        self._done = end
        self._cache.share()
        ids = [record.image_id for record in self._dataset.images[:end]]
        metrics = evaluate(self._dataset, self._results, image_ids=ids)
        passes = self._passes / max(1, end - self._failed)
        ceilings = self._task.ceilings
        ceiling = math.inf if ceilings is None else ceilings[self._task.subsets.index(end)]
        return {
            "AP": metrics["AP"],
            "AP_small": metrics["AP_small"],
            "AP_large": metrics["AP_large"],
            "passes": passes,
            "score": metrics["AP_small"] if passes <= ceiling else ceiling - passes,
            "images": end,
            "images_failed": self._failed,
            "hits": self._cache.hits,
            "misses": self._cache.misses,
        }

    def _process(self, record: ImageRecord, *, no_more: bool) -> None:
        try:
            image = self._open_image(record)
        except TileError:
            self._failed += 1
            return
        result = recursive_detect(
            image,
            record.image_id,
            self._policy,
            detect=CachedDetector(self._detector, self._cache),
            predict_scale=self._predictor(self._policy),
        )
        self._failed += result.failure is not None
        self._raised.add(result.failure and result.failure.reason)
        if self._raised.all_of_the_first(no_more=no_more):
            raise fails_on_all(self._raised.reason, self._raised.images)
        self._passes += result.detector_passes if result.failure is None else 0.0
        self._results += to_results(record.image_id, result.detections, result.image_hw)

    def _predictor(self, policy: Policy) -> Any:
        """The scale predictor of a policy, created once per process; None if it needs none."""
        if not policy.needs_predictor:
            return None
        return self._oracle if policy.reads_truth else self._scale_net

    @cached_property
    def _oracle(self) -> Any:
        return oracle_from(self._task.annotations)

    @cached_property
    def _scale_net(self) -> CachedScalePredictor:
        return CachedScalePredictor(self._task.networks.load_scale_net(), self._detector, self._cache)


class RecursionTrial(tune.Trainable):
    """Tune trainable that evaluates a policy; the next trials of its actor reuse its data set and networks."""

    # `tune.with_parameters` passes the arguments after `config`.
    def setup(self, config: dict[str, Any], task: TrialSettings, cache_actor: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load the data set and the networks."""
        self._evaluation = Evaluation(task, cache_actor)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in this actor."""
        self.config = new_config
        values = {path: value for path, value in new_config.items() if path != "policy"}
        self._evaluation.begin(new_config["policy"], values)
        return True

    def step(self) -> dict[str, Any]:
        """Add the images of the next subset."""
        return {**self._evaluation.step()}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: an interrupted trial starts again, with the cached predictions."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing; see `save_checkpoint`."""


def evaluate_starts(task: TrialSettings, cache_actor: Any, at_once: int) -> dict[str, list[TrialMetrics]]:
    """Evaluate the unmodified policies of a sweep, one after another in a process of Ray.

    Args:
        task: settings of the sweep's trials.
        cache_actor: from `open_cache`; the trials find the network outputs in it.
        at_once: number of concurrent trials, by which GPUs are shared.

    Returns:
        Policy -> its metrics after each subset of the images.

    Raises:
        UserError: if the detector fails on the first images or on all.
    """
    gpus = gpu_share(task.networks.device, at_once)
    with workers_errors():
        return ray.get(_evaluate.options(num_cpus=1, num_gpus=gpus).remote(task, cache_actor))


@ray.remote
def _evaluate(task: TrialSettings, cache_actor: Any) -> dict[str, list[TrialMetrics]]:
    evaluation, steps = Evaluation(task, cache_actor), {}
    for policy in task.policies:
        evaluation.begin(policy, {})
        steps[policy] = [evaluation.step() for _ in task.subsets]
    return steps


def start_ceilings(policies: Mapping[str, Sequence[TrialMetrics]]) -> list[float]:
    """The passes per image of the dearest policy after each subset, rounded up to hundredths.

    A subset has a ceiling of its own, as its images may take more passes than the others: trials would be stopped on it
    for what their images are.

    Args:
        policies: from `evaluate_starts`.
    """
    most = [max(metrics["passes"] for metrics in step) for step in zip(*policies.values(), strict=True)]
    return [math.ceil(round(100 * passes, 6)) / 100 for passes in most]


def read_starts(uri: str) -> Starts | None:
    """Read starts.json of a run folder; None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    path = storage.join(uri, STARTS)
    if not storage.exists(path):
        return None
    try:
        starts: Starts = json.loads(storage.read_bytes(path))
    except ValueError as error:
        msg = f"{path} must be what the sweep wrote, got {error}: remove it, to evaluate the starts again"
        raise UserError(msg) from error
    # JSON has no NaN.
    policies: Any = {
        name: [{key: math.nan if value is None else value for key, value in step.items()} for step in steps]
        for name, steps in starts["policies"].items()
    }
    return {"ceilings": starts["ceilings"], "policies": policies}
