"""The Ray that tests share, which takes ten seconds to start."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

# The smallest object store that Ray allows is 75 MiB: what hangs in a tiny one shall hang here.
_STORE_BYTES = 80 * 2**20

RAY_ENVIRONMENT = {
    # Token authentication would write to the home folder.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    # By default workers have the lowest priority, below a test process beside them.
    "RAY_worker_niceness": "0",
}
"""What Ray's processes are started with."""


@cache
def uses_ray(file: Path) -> bool:
    """Whether a test file has tests that run on the shared Ray."""
    return "mark.ray" in file.read_text()


def own_ray_environment(**more: str) -> dict[str, str]:
    """The environment of a process that starts a Ray of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, **RAY_ENVIRONMENT, **more}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A running Ray with 4 logical CPUs and a tiny object store."""
    import ray

    with patch.dict(os.environ, RAY_ENVIRONMENT):
        os.environ.pop("RAY_ADDRESS", None)
        # A cluster's address that an ended run left behind must not be joined: hence "local".
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
        )
        yield
        ray.shutdown()


@pytest.fixture
def idle_ray(ray_session: None) -> None:
    """The same, once nothing runs on it: actors of a run that failed live on as long as its traceback does."""
    import ray

    gc.collect()
    give_up = time.monotonic() + 120
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > give_up:
            pytest.fail(f"an earlier run holds CPUs: {ray.available_resources().get('CPU', 0)} are free")
        time.sleep(0.1)
