"""eval_coco on Ray equals the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.runs.resources import AdvancedResources, ResourceChoice
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import load_job, same_results

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("ray-job") / "sample", train=1, val=12)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the reference finds."""
    output = tmp_path_factory.mktemp("local") / "run"
    assert load_job("eval_coco").main(job_on(data, output, "local")) == 0
    return json.loads((output / "results.json").read_text())


def job_on(data: Path, output: Path, engine: str, **changes: Any) -> Any:
    job = load_job("eval_coco").EvalCoco(
        data=str(data),
        policies=("scalenet",),
        output=str(output),
        engine=engine,
        networks=NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET),
    )
    return replace(job, **changes)


@pytest.mark.parametrize(
    "resources",
    [
        ResourceChoice(),
        pytest.param(
            ResourceChoice(
                readers=2,
                detector_actors=(1, 2),
                scale_batch_size=1,
                detector_batch_size=1,
                advanced=AdvancedResources(max_open_images=3),
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ResourceChoice(readers=2, scale_actors=2, detector_actors=2, advanced=AdvancedResources(pipelines=2)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["defaults", "single tiles and a growing pool", "two pipelines"],
)
def test_real_networks_on_ray_find_what_the_reference_finds(
    ray_session: None, data: Path, tmp_path: Path, expected: list[dict[str, Any]], resources: ResourceChoice
) -> None:
    assert load_job("eval_coco").main(job_on(data, tmp_path / "run", "ray", resources=resources)) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert expected
    assert same_results(found, expected)
