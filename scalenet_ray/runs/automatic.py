"""Resources of a run, chosen from what the cluster has and a trial of the networks, where the user has set none.

Pure functions of numbers, without Ray: `engine.placement` asks the cluster, `models.network_trial` tries the networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scalenet_ray.core.networks import NetworkTrial, TrialCall
from scalenet_ray.runs.resources import PoolSize, ResourceChoice, Resources, limits

_TILES_PER_IMAGE = 2
"""Tiles for which an image is read once, about."""

TILES_PER_SECOND_OF_A_PIPELINE = 2000
"""Tiles that a driver and its queue pass on in half of a core's time each (docs/results.md)."""

_WORTH_A_LARGER_BATCH = 0.95
"""A larger batch is taken if a tile takes at most this share of its seconds in the smaller one."""

_SHARE_OF_MEMORY = 0.8
"""Share of a memory that may be used."""

_CPUS_PER_PIPELINE = 4
"""CPUs of the cluster for each pipeline, at least."""

_SHORTEST_SECONDS = 1e-4


@dataclass(frozen=True)
class Cluster:
    """CPUs, GPUs and memory (bytes, 0 if unknown) of a cluster; `most_` is what its autoscaler may add up to."""

    cpus: float
    gpus: float = 0.0
    memory: int = 0
    most_cpus: float = 0.0
    most_gpus: float = 0.0

    @property
    def may_have_gpus(self) -> bool:
        """True if it has a GPU, or its autoscaler may add one."""
        return max(self.gpus, self.most_gpus) > 0


def choose_resources(choice: ResourceChoice, cluster: Cluster, trial: NetworkTrial) -> Resources:
    """Choose what the user has left open; raises `UserError` if the user's values do not fit each other.

    On GPUs, there is a detector actor for each, and readers enough to feed them. On CPUs, detectors and readers share
    the cores by the seconds that a tile takes of each. A pool grows with the nodes that the cluster may add.
    """
    gpus = 1.0 if trial.device != "cpu" else 0.0
    if choice.gpus_per_detector_actor is not None:
        gpus = choice.gpus_per_detector_actor
    scale_gpus = choice.gpus_per_scale_actor
    if scale_gpus is None:
        scale_gpus = gpus if choice.scale_actors is not None else 0.0
    call = _best_call(trial, gpus)
    seconds = max(call.seconds / call.tiles, _SHORTEST_SECONDS)
    read_seconds = max(trial.read_seconds / _TILES_PER_IMAGE, _SHORTEST_SECONDS)
    cpus = max(1, math.floor(max(cluster.cpus, cluster.most_cpus)))
    detectors = choice.detector_actors
    if detectors is None:
        if gpus:
            taken = limits(choice.scale_actors)[1] * scale_gpus
            now, most = (math.floor((count - taken) / gpus) for count in (cluster.gpus, cluster.most_gpus))
        elif trial.device != "cpu":
            now = most = 1  # The user shares the GPU out, and Ray does not count it.
        else:
            share = seconds / (seconds + read_seconds)
            now, most = (_share_of_cpus(count, share, cluster, trial) for count in (cluster.cpus, cpus))
        detectors = max(1, now), max(1, now, most)
    fewest, most = limits(detectors)
    wanted = math.ceil(most / seconds * read_seconds)
    readers = choice.readers or max(1, min(wanted, cpus if gpus else cpus - most))
    rate = min(most / seconds, readers / read_seconds)
    pipelines = choice.advanced.pipelines
    if pipelines is None:
        others = [limits(choice.scale_actors)[0]] if choice.scale_actors is not None else []
        wanted = math.ceil(rate / TILES_PER_SECOND_OF_A_PIPELINE)
        pipelines = max(1, min(wanted, cpus // _CPUS_PER_PIPELINE, readers, most, *others))
    readers = choice.readers or max(readers, pipelines)
    if choice.detector_actors is None:
        # Each pipeline has an actor of its own from the start.
        fewest, most = max(fewest, pipelines), max(most, pipelines)
        detectors = fewest if fewest == most else (fewest, most)
    else:
        pipelines = pipelines if choice.advanced.pipelines else min(pipelines, fewest)
    choice = replace(
        choice, advanced=replace(choice.advanced, pipelines=pipelines), readers=readers, detector_actors=detectors
    )
    return choice.completed(
        gpus_per_detector_actor=gpus,
        gpus_per_scale_actor=scale_gpus,
        scale_batch_size=call.tiles,
        detector_batch_size=call.tiles,
    )


def _share_of_cpus(cpus: float, share: float, cluster: Cluster, trial: NetworkTrial) -> int:
    """Number of detectors on a share of the CPUs, fewer if the memory is not enough for them."""
    count = max(1, round(math.floor(cpus) * share))
    if cluster.memory and trial.process_bytes:
        memory = _SHARE_OF_MEMORY * cluster.memory * max(1.0, cpus / max(cluster.cpus, 1.0))
        count = min(count, max(1, math.floor(memory / trial.process_bytes)))
    return count


def _best_call(trial: NetworkTrial, gpus: float) -> TrialCall:
    """The call of the trial with the fastest batch that fits an actor's share of the GPU."""
    share = min(1.0, gpus) if gpus else 1.0
    room = _SHARE_OF_MEMORY * share * trial.gpu_bytes
    best, *larger = trial.calls
    for call in larger:
        fits = not trial.gpu_bytes or call.device_bytes <= room
        if fits and call.seconds / call.tiles <= _WORTH_A_LARGER_BATCH * best.seconds / best.tiles:
            best = call
    return best


def in_words(resources: Resources, cluster: Cluster, device: str) -> str:
    """The resources in one line, e.g. "8 GPUs: 8 detectors of 1 GPU, batch 32, 12 readers, 2 pipelines"."""
    on_gpu = device != "cpu"
    count = max(cluster.gpus, cluster.most_gpus) if on_gpu else max(cluster.cpus, cluster.most_cpus)
    gpus = resources.gpus_per_detector_actor
    parts = [_counted(resources.detector_actors, "detector") + (f" of {gpus:g} GPU" if gpus else "")]
    if resources.scale_actors is not None:
        of = f" of {resources.gpus_per_scale_actor:g} GPU" if resources.gpus_per_scale_actor else ""
        parts.append(_counted(resources.scale_actors, "Scale Net actor") + of)
    parts += [
        f"batch {resources.detector_batch_size}",
        _counted(resources.readers, "reader"),
        _counted(len(resources.per_pipeline), "pipeline"),
    ]
    kind = "GPU" if on_gpu else "CPU"
    return f"{count:g} {kind}{'' if count == 1 else 's'}: {', '.join(parts)}"


def _counted(size: PoolSize, word: str) -> str:
    fewest, most = limits(size)
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{number} {word}{'' if most == 1 else 's'}"
