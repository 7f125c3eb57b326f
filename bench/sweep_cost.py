"""Cost of a sweep's trials with and without the prediction cache, one and two at once, for the same random trials.

SCALENET_RAY_DATA=DATA .venv/bin/python -m bench.sweep_cost
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
import tyro

from bench.workloads import photographs, ratio
from scalenet_ray.data.policy_files import read_space
from scalenet_ray.engine.trial import TrialSettings
from scalenet_ray.engine.tune import Sweep, open_cache, run_sweep
from scalenet_ray.models.spec import NetworkSpec

_SPACE = Path(__file__).parents[1] / "scalenet_ray" / "commands" / "tune_recursion.yaml"
_WAYS = {"kept": (True, 1), "not kept": (False, 1), "kept, two at once": (True, 2), "not kept, two at once": (False, 2)}


@dataclass(frozen=True)
class SweepCost:
    """Cost of a sweep's trials.

    Attributes:
        rounds: how often each way is gone.
        trials: in a sweep.
        images: to a trial.
    """

    rounds: int = 3
    trials: int = 10
    images: int = 100


def main(job: SweepCost) -> None:
    """Print trials a minute as ratios; each sweep begins with nothing kept, and starts its own processes."""
    workload, space = photographs(), read_space(_SPACE)
    policies = {name: workload.policy(name) for name in space.policies}
    networks = NetworkSpec(detector=workload.detector)
    task = TrialSettings(
        policies, networks, str(workload.annotations), str(workload.folder), (job.images,), None, 10**8
    )
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(job.rounds):
        for name, (keep, at_once) in _WAYS.items():
            sweep = Sweep("random", job.trials, at_once, keep=keep)
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                run_sweep(space, task, sweep, folder, lambda _: None, cache_actor=open_cache(sweep), resume=False)
                rates[name].append(60 * job.trials / (time.perf_counter() - start))
            print(f"{name}: {rates[name][-1]:.1f} trials a minute", flush=True)
    ray.shutdown()
    figures = {
        "kept over not kept": ratio(rates["kept"], rates["not kept"]),
        "two at once over one, kept": ratio(rates["kept, two at once"], rates["kept"]),
        "two at once over one, not kept": ratio(rates["not kept, two at once"], rates["not kept"]),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(SweepCost))
