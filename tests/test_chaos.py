"""Random kills of processes and nodes lose, double and change no image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray_fixture import own_ray_environment


@pytest.mark.slow
@pytest.mark.chaos
def test_whatever_is_killed_whenever_no_image_is_lost_doubled_or_wrong(tmp_path: Path) -> None:
    images = 240
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", str(tmp_path / "chaos"), "--images", str(images), "--deaths", "3"],
        cwd=Path(__file__).parents[1],
        env=own_ray_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads((tmp_path / "chaos" / "outcome.json").read_text())
    faults = outcome["faults"]
    assert (faults["node"], faults["frontier"], faults["driver"]) == (2, 1, 1)
    assert all(faults.get(kind, 0) >= 1 for kind in ("reader", "scale actor", "detector actor")), faults
    assert (outcome["lost"], outcome["doubled"], outcome["wrong"]) == (0, 0, 0)
    # Two drivers were lost, each with the images that it had open, or had not written: a shard's, and those in work.
    assert 0 < outcome["done_twice"] <= images // 2
