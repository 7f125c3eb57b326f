"""A small search with its data and state on S3, run twice in a process of its own.

python -m tests.tune_on_s3 s3://BUCKET    Ray's workers have the environment in which it was started
"""

from __future__ import annotations

import json
import sys

from scalenet_ray.core.policy import parse_policy
from scalenet_ray.data.policy_files import Choice, SearchSpace
from scalenet_ray.engine.trial import TrialSettings
from scalenet_ray.engine.tune import Sweep, open_cache, run_sweep
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec


def main(bucket: str) -> None:
    """Sweep, resume, and say what was tried each time."""
    networks = NetworkSpec(SAMPLE_DETECTOR)
    info = networks.describe_detector()
    policy = parse_policy("first-pass", input_side=info.input_side, iou_threshold=info.iou_threshold)
    annotations = f"{bucket}/sample/annotations/instances_train2017.json"
    task = TrialSettings(
        {policy.name: policy}, networks, annotations, f"{bucket}/sample/train2017", (4,), (4.0,), 10**8
    )
    space = SearchSpace((policy.name,), {"recursion.max_windows": Choice((1, 4))})
    for resume in (False, True):
        said: list[str] = []
        sweep = Sweep("grid", keep=False)
        cache_actor = open_cache(sweep)
        rows = run_sweep(space, task, sweep, f"{bucket}/run", said.append, cache_actor=cache_actor, resume=resume)
        complete = sum(row["complete"] for row in rows)
        sys.stdout.write(json.dumps({"tried": len(said), "complete": complete}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
