"""One trial of a sweep, and the policies that a sweep starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.coco import images_and_categories
from scalenet_ray.engine.prediction_cache import CacheActor
from scalenet_ray.engine.trial import (
    STARTS,
    RecursionTrial,
    TrialSettings,
    evaluate_starts,
    read_starts,
    start_ceilings,
)
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.sample.scenes import write_sample
from tests.scripted_detector import SCRIPTED, answering
from tests.test_tune import NETWORKS, task_on


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("trials") / "sample", train=8, val=1)


def trial_on(task: TrialSettings, config: dict[str, Any], cache_actor: Any = None) -> Any:
    trial = RecursionTrial.__new__(RecursionTrial)
    trial.setup(config, task=task, cache_actor=cache_actor)
    return trial


# --- one trial --------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_trial_adds_images_step_by_step_and_begins_anew_on_another(ray_session: None, data: Path) -> None:
    cache_actor: Any = CacheActor.remote()
    trial = trial_on(task_on(data), {"policy": "first-pass", "recursion.window": 0.4}, cache_actor)
    first, last = trial.step(), trial.step()
    assert (first["images"], last["images"]) == (4, 8)
    assert last["images_failed"] == 0
    assert first["misses"] > 4
    assert last["score"] == last["AP_small"]
    assert trial.reset_config({"policy": "first-pass", "recursion.window": 0.4})
    again = [trial.step(), trial.step()]
    assert [row["misses"] for row in again] == [0, 0]
    assert [row["AP_small"] for row in again] == [first["AP_small"], last["AP_small"]]
    assert [row["passes"] for row in again] == [first["passes"], last["passes"]]


def test_what_exceeds_the_ceiling_of_its_images_scores_below_all_that_does_not(data: Path) -> None:
    trial = trial_on(task_on(data, ceilings=(9.0, 1.5)), {"policy": "first-pass", "recursion.max_windows": 6})
    first, last = trial.step(), trial.step()
    assert first["score"] == first["AP_small"]
    assert last["passes"] > 1.5
    assert last["score"] == pytest.approx(1.5 - last["passes"])


def test_an_image_that_cannot_be_read_costs_itself_alone(data: Path, tmp_path: Path) -> None:
    images = images_and_categories(data / "annotations" / "instances_train2017.json").images
    folder = tmp_path / "images"
    folder.mkdir()
    for record in images[1:]:
        (folder / record.file_name).write_bytes((data / "train2017" / record.file_name).read_bytes())
    trial = trial_on(task_on(data, folder=str(folder)), {"policy": "first-pass"})
    assert [trial.step()["images_failed"], trial.step()["images_failed"]] == [1, 1]


def test_a_trial_whose_detector_raises_on_every_image_ends_with_its_text(data: Path) -> None:
    def broken(tiles: Sequence[np.ndarray]) -> list[Any]:
        msg = "no kernel"
        raise RuntimeError(msg)

    task = task_on(data, networks=NetworkSpec(detector=SCRIPTED))
    with answering(broken, categories=NETWORKS.describe_detector().categories):
        trial = trial_on(task, {"policy": "first-pass"})
        trial.step()
        with pytest.raises(
            UserError, match="the detector raised RuntimeError: no kernel: so on each of the first 8 images"
        ):
            trial.step()


# --- the starts -------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_trials_find_what_the_starts_have_computed_and_may_take_as_much(ray_session: None, data: Path) -> None:
    cache_actor: Any = CacheActor.remote()
    first_pass = task_on(data).policies["first-pass"]
    # It takes fewer passes.
    cheaper = replace(first_pass, name="cheaper", kind="whole")
    task = task_on(data, policies={"cheaper": cheaper, "first-pass": first_pass}, ceilings=None)
    starts = evaluate_starts(task, cache_actor, at_once=1)
    assert [step["passes"] for step in starts["cheaper"]] == [1.0, 1.0]
    trial = trial_on(
        replace(task, ceilings=tuple(start_ceilings(starts))), {"policy": "first-pass"}, cache_actor=cache_actor
    )
    for began in starts["first-pass"]:
        step = trial.step()
        assert step["misses"] == 0
        assert (step["images"], step["passes"], step["score"]) == (began["images"], began["passes"], began["AP_small"])


def test_the_ceiling_of_each_subset_is_what_the_dearest_start_takes_there() -> None:
    starts: Any = {"one": [{"passes": 1.2345}, {"passes": 2.31}], "other": [{"passes": 1.5}, {"passes": 2.0}]}
    assert start_ceilings(starts) == [1.5, 2.31]
    assert start_ceilings({"one": starts["one"]}) == [1.24, 2.31]


def test_a_sweep_reads_its_starts_back(tmp_path: Path) -> None:
    assert read_starts(str(tmp_path)) is None
    written = {"ceilings": [1.24, 2.31], "policies": {"one": [{"AP_small": math.nan}, {"AP_small": 9.5}]}}
    RunFolder(str(tmp_path)).write_json(STARTS, written)
    read: Any = read_starts(str(tmp_path))
    assert read["ceilings"] == [1.24, 2.31]
    assert [step["AP_small"] for step in read["policies"]["one"]] == [pytest.approx(math.nan, nan_ok=True), 9.5]
    (tmp_path / STARTS).write_text("{")
    with pytest.raises(UserError, match=r"must be what the sweep wrote, got .*: remove it"):
        read_starts(str(tmp_path))
