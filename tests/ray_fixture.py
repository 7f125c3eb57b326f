"""One Ray for all tests that need one: starting it takes ten seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

# The smallest object store that Ray allows is 75 MiB: what hangs in a tiny one shall hang here.
_STORE_BYTES = 80 * 2**20

RAY_ENVIRONMENT = {
    # Token authentication would write to the home folder.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
"""What Ray's processes are started with."""


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
