"""A run in a process of its own that prints its progress, for tests that kill it.

python -m tests.killable_run RUN_FOLDER LOG_FOLDER

It joins the Ray of RAY_ADDRESS or starts one, writes shards of four images, and goes on with what is there.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.engine.session import RaySession
from scalenet_ray.runs.batch import PolicyRun, Progress
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.resources import AdvancedResources, ResourceChoice
from tests.faults import FaultyScale, Given, Scenes, SlowDetector, WorkLog, policy_of, records_of
from tests.oracles import RandomScale

RECORDS = records_of(48)
SCENES = Scenes(unreadable={7})
POLICY = policy_of("scalenet")
SHARD = 4
OPEN_IMAGES = 6


def say(progress: Progress) -> None:
    """How many images this driver has finished."""
    sys.stdout.write(f"{progress.images}\n")
    sys.stdout.flush()


def main() -> None:
    """Run, a line for each finished image."""
    output, log = sys.argv[1:]
    networks = NetworkFactories(Given(SlowDetector(0.05)), Given(FaultyScale(RandomScale(), WorkLog(Path(log)))))
    resources = ResourceChoice(
        scale_batch_size=2, detector_batch_size=4, advanced=AdvancedResources(max_open_images=OPEN_IMAGES)
    )
    session = RaySession(resources)
    start = partial(session.start, policy=POLICY, networks=networks, open_image=SCENES)
    run = RunFolder(output)
    with (
        patch("scalenet_ray.runs.batch._IMAGES_PER_SHARD", SHARD),
        patch("scalenet_ray.runs.batch._SECONDS_BETWEEN_REPORTS", -1.0),
        run.begin({"images": len(RECORDS)}, resume=True),
    ):
        PolicyRun(RECORDS, POLICY.name, start, run, say).finish()


if __name__ == "__main__":
    main()
