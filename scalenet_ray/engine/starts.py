"""The policies that a sweep starts from, evaluated before its first trial; its ceiling may be what they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.engine.placement import gpu_share
from scalenet_ray.engine.trial import Evaluation, TrialSettings
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.runs.documents import Starts, TrialMetrics

__all__ = ["STARTS", "evaluate_starts", "read_starts", "start_ceilings"]

STARTS = "starts.json"
"""The starting policies of a sweep and its ceilings (`Starts`), which it keeps when it is resumed."""


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
