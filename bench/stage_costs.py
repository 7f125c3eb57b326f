"""Where the plain loop's time goes: its stages as shares of the whole, which add up.

    SCALENET_RAY_DATA=DATA .venv/bin/python -m bench.stage_costs

The loop runs under Python's profiler; each stage is the time inside its functions, and what is in none is the rest.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
from dataclasses import dataclass

import tyro

from bench.contenders import CONTENDERS
from bench.workloads import Workload, photographs

__all__ = ["stage_shares"]

_STAGES = {
    "decode": (("images.py", "decode_image"),),
    "cut": (("images.py", "cut_tile"),),
    "detector": (("yolox.py", "__call__"),),
    "plan": (("recursion.py", "expand"), ("look.py", "scale_map_of_detections")),
    "merge": (("results.py", "merge_image"), ("merge.py", "carry_to_image")),
}
_NETWORK = ("onnxruntime_inference_collection.py", "run")


@dataclass(frozen=True)
class StageCosts:
    """The plain loop over the photographs.

    Attributes:
        policy: how to zoom.
    """

    policy: str = "first-pass"


def stage_shares(workload: Workload, policy_name: str) -> dict[str, float]:
    """Shares of the loop's time, in percent; `network` is a part of `detector` and comes apart from it."""
    detect = CONTENDERS[policy_name](workload)
    paths = [workload.folder / record.file_name for record in workload.records]
    detect(paths[0])
    profiler = cProfile.Profile(builtins=False)
    profiler.enable()
    for path in paths:
        detect(path)
    profiler.disable()
    spent = pstats.Stats(profiler)
    total = spent.total_tt  # type: ignore[attr-defined]
    inside = {
        (os.path.basename(file), name): cumulative
        for (file, _, name), (_, _, _, cumulative, _) in spent.stats.items()  # type: ignore[attr-defined]
    }
    seconds = {stage: sum(inside[function] for function in functions) for stage, functions in _STAGES.items()}
    seconds["network"] = inside[_NETWORK]
    seconds["detector"] -= seconds["network"]
    seconds["rest"] = total - sum(seconds.values())
    return {stage: 100 * each / total for stage, each in seconds.items()}


def main(job: StageCosts) -> None:
    """Print the shares."""
    print(json.dumps(stage_shares(photographs(), job.policy), indent=1))


if __name__ == "__main__":
    main(tyro.cli(StageCosts))
