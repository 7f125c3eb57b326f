from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray_fixture import RAY_ENVIRONMENT


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_that_loses_two_nodes_finds_the_same(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.node_losses", str(tmp_path / "outcome.json")],
        cwd=Path(__file__).parents[1],
        env={**environment, **RAY_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["losses"] == 2
    assert outcome["image_ids"] == list(range(1, 31))
    assert outcome["equal"]
    assert outcome["outstanding"] == 0
    # The readers were lost too, and what they had leased was leased again.
    assert outcome["redelivered"] > 0
